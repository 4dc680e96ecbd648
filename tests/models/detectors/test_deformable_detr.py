import math
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from visionkit.engine import load_config
from visionkit.models.detectors.deformable_detr import DeformableAttention, Prediction, Predictions
from visionkit.registry import MODELS, ConfigError
from visionkit.structures import ImageBatch, InstanceData, Sample
from visionkit.testing import check_model
from visionkit.transforms import build_pipeline

VARIANTS = {"plain": {}, "refine": {"with_box_refine": True}, "two stage": {"with_box_refine": True, "two_stage": True}}
CARDS = Path(__file__).parents[3] / "configs" / "deformable_detr"
TRUTH = ((8.0, 8, 40, 40), (60.0, 20, 90, 60))

every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def config(**changes):
    return {
        "type": "DeformableDETR",
        "backbone": {"type": "ResNet", "depth": 18, "norm": "GN", "out_stages": (3, 4)},
        "neck": {"type": "ChannelMapper", "out_channels": 32, "num_levels": 3},
        "num_classes": 3, "num_queries": 12, "num_heads": 4, "num_points": 2, "encoder_layers": 1, "decoder_layers": 2,
        "hidden_channels": 64, "dropout": 0.0,
    } | changes


def build(**changes):
    torch.manual_seed(0)
    return MODELS.build(config(**changes))


def sample(boxes=TRUTH, labels=(0, 2), size=(64, 96)) -> Sample:
    sample = Sample(metainfo={"img_id": 1, "img_shape": size, "ori_shape": (2 * size[0], 2 * size[1]), "scale_factor": (0.5, 0.5)})
    sample.gt_instances = InstanceData(bboxes=torch.tensor(boxes).view(-1, 4), labels=torch.tensor(labels, dtype=torch.int64))
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    return sample


def images(count: int, size=(64, 96)) -> ImageBatch:
    return ImageBatch(torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1)), [size] * count)


@torch.no_grad()
def shake(model: nn.Module) -> nn.Module:
    """Moves every parameter, so that nothing is at its start: offsets, attention and heads begin as zeros."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


# ------------------------------------------------------------------------------------------------------------- the whole model

@every_variant
def test_deformable_detr_keeps_the_model_contract(variant):
    check_model(build(**variant), num_classes=3)


@every_variant
def test_it_starts_with_boxes_at_their_references_and_classes_at_one_percent(variant):
    model = build(**variant)
    first_stage, layers = model(images(1))
    for prediction in layers:
        assert prediction.logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.5)
    if first_stage is None:
        references = model.reference_points(model.queries.weight[:, :32]).sigmoid()
        torch.testing.assert_close(layers[0].boxes[0, :, :2], references, rtol=0, atol=1e-4)
        torch.testing.assert_close(layers[0].boxes[..., 2:], torch.full((1, 12, 2), 1 / (1 + math.exp(2))))     # -2 as a logit
    else:
        usable = first_stage.boxes[0, :, 0] < 1
        sides = torch.tensor([0.05, 0.1, 0.2]).repeat_interleave(torch.tensor([96, 24, 6]))                     # appendix A.4
        torch.testing.assert_close(first_stage.boxes[0, usable, 2:], sides[usable, None].expand(-1, 2))
    torch.testing.assert_close(layers[1].boxes, layers[0].boxes, rtol=0, atol=1e-5)                             # nothing to refine yet


@every_variant
def test_every_layer_is_matched_anew_and_has_its_own_terms(variant):
    model = shake(build(**variant))
    calls = []
    model.matcher.register_forward_hook(lambda module, arguments, pairs: calls.append(arguments))
    losses = model(images(2), [sample(), sample()], mode="loss")
    suffixes = ["_0", ""] + ["_proposal"] * ("two_stage" in variant)
    assert list(losses) == [f"loss_{term}{suffix}" for suffix in suffixes for term in ("class", "box", "giou")]
    assert [tuple(logits.shape[:2]) for logits, _, _ in calls] == [(2, 12), (2, 12)] + [(2, 126)] * ("two_stage" in variant)
    assert not torch.equal(calls[0][0], calls[1][0])
    labels = [[target.labels.tolist() for target in targets] for _, _, targets in calls]
    assert labels[:2] == [[[0, 2], [0, 2]]] * 2
    assert labels[2:] == [[[0, 0], [0, 0]]] * ("two_stage" in variant)                                          # object or not


@every_variant
def test_images_without_objects_teach_the_classes_only(variant):
    losses = build(**variant)(images(2), [sample((), ()), sample((), ())], mode="loss")
    assert all(loss.isfinite() for loss in losses.values())
    assert {name for name, loss in losses.items() if loss.item() == 0} == {name for name in losses if "class" not in name}


@every_variant
def test_the_order_of_objects_makes_no_difference(variant):
    model = shake(build(**variant))
    losses, others = (model(images(1), [sample(boxes, labels)], mode="loss") for boxes, labels in ((TRUTH, (0, 2)), (TRUTH[::-1], (2, 0))))
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(others[name].item(), rel=1e-5)


def test_queries_have_no_order():
    model = shake(build(with_box_refine=True)).eval()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    before = model(images(1)).layers[-1]
    model.queries.weight.data = model.queries.weight.data[order]
    for ours, theirs in zip(model(images(1)).layers[-1], before, strict=True):
        torch.testing.assert_close(ours, theirs[:, order], rtol=0, atol=1e-5)


def test_refined_layers_learn_for_themselves_and_plain_ones_share_their_heads():
    model = shake(build(with_box_refine=True))
    model(images(1)).layers[1].boxes.sum().backward()
    assert model.regress[0].layers[0].weight.grad is None                       # the boxes it handed on are taken as given
    assert model.regress[1].layers[0].weight.grad.any()
    model = build()
    assert model.regress[0] is model.regress[1]
    assert model.classify[0] is model.classify[1]


def test_the_second_stage_starts_from_the_best_boxes_of_the_first_and_takes_them_as_given():
    model = shake(build(**VARIANTS["two stage"]))
    with torch.no_grad():                                                       # what every unusable pixel says, now with a high score
        model.classify[-1].weight[0] = model.proposal_features(torch.zeros(32))
    seen = []
    model.decoder[0].register_forward_hook(lambda module, arguments, output: seen.append(arguments[2]))
    first_stage, layers = model(ImageBatch(images(2).tensor, [(64, 96), (48, 96)]))
    for logits, boxes, reference, height in zip(*first_stage, seen[0], (1, 0.75), strict=True):
        usable = boxes[:, 0] < 1
        best = logits[usable, 0].topk(12).indices
        torch.testing.assert_close(reference[:, 0], boxes[usable][best] * torch.tensor([1, height, 1, height]))
    assert logits[~usable, 0].min() > logits[usable, 0].max()                   # of the second image, which is padded
    layers[-1].boxes.sum().backward()
    assert model.regress[-1].layers[0].weight.grad is None


@every_variant
def test_what_an_image_is_padded_to_makes_no_difference(variant):
    """The transformer on feature maps with and without padding, which holds anything; measured: boxes and logits differ by 1e-6."""
    model = shake(build(**variant)).eval()
    generator = torch.Generator().manual_seed(3)
    alone = [torch.randn(1, 32, *size, generator=generator) for size in ((6, 10), (3, 5), (2, 3))]
    padded = [torch.randn(2, 32, *size, generator=generator) for size in ((10, 12), (5, 6), (3, 3))]
    for small, large in zip(alone, padded, strict=True):
        large[:1, :, :small.shape[2], :small.shape[3]] = small
    with torch.inference_mode():
        expected = model.transform(alone, ImageBatch(torch.zeros(1, 3, 48, 80), [(48, 80)])).layers[-1]
        found = model.transform(padded, ImageBatch(torch.zeros(2, 3, 80, 96), [(48, 80), (80, 96)])).layers[-1]
    torch.testing.assert_close(found.boxes[:1], expected.boxes, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.logits[:1], expected.logits, rtol=0, atol=1e-5)


@every_variant
def test_a_batch_of_mixed_sizes_learns_and_predicts(variant):
    model = shake(build(**variant))
    batch = ImageBatch.stack([torch.randn(3, 64, 96), torch.randn(3, 50, 40)], divisor=32)
    small = sample(((5.0, 5, 20, 30),), (1,), size=(50, 40))
    sum(model(batch, [sample(), small], mode="loss").values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.eval()
    with torch.inference_mode():
        large, small = (result.pred_instances for result in model(batch, [sample(), small], mode="predict"))
    for found, (height, width) in ((large, (128, 192)), (small, (100, 80))):
        assert len(found) == 36                                                 # 12 queries of 3 classes
        assert found.bboxes.min() >= 0
        assert found.bboxes[:, 2].max() <= width
        assert found.bboxes[:, 3].max() <= height


def test_predictions_are_the_best_of_all_queries_and_classes_without_suppression():
    model = build(num_queries=3, max_per_image=4)
    logits = torch.tensor([[[2.0, 1.5, -4], [-5, -6, 3], [1.0, -7, -8]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.1, 0.9, 0.4, 0.4], [0.5, 0.5, 0.2, 0.4]]])                  # two of them the same
    model.forward = lambda _: Predictions(None, [None, Prediction(logits, boxes)])
    (result,) = model.predict(images(1), [sample()])                            # of an original of 128 x 192
    found = result.pred_instances
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 2.0, 1.5, 1.0]).sigmoid())
    assert found.labels.tolist() == [2, 0, 1, 0]
    middle = [76.8, 38.4, 115.2, 89.6]
    torch.testing.assert_close(found.bboxes, torch.tensor([[0.0, 89.6, 57.6, 128], middle, middle, middle]))    # the first is clipped


def test_predictions_below_a_threshold_are_left_out():
    model = build(score_threshold=0.5)
    logits = torch.full((1, 12, 3), -1.0)
    logits[0, 5, 1] = 1
    model.forward = lambda _: Predictions(None, [Prediction(logits, torch.full((1, 12, 4), 0.5))])
    assert model.predict(images(1), [sample()])[0].pred_instances.labels.tolist() == [1]


@pytest.mark.parametrize("variant", [VARIANTS["plain"], VARIANTS["two stage"]], ids=["plain", "two stage"])
def test_it_learns_two_images_by_heart(learn_by_heart, variant):
    model = build(**variant, backbone=config()["backbone"] | {"zero_init_residual": False})
    truth = [sample(TRUTH[:1], (0,)), sample(TRUTH[1:], (2,))]
    learn_by_heart(model, truth, iterations=80, lr=2e-3, score=0.2)      # 0.26 to 0.6, and rising


@every_variant
@pytest.mark.parametrize("policy", ["every", "sqrt", "selective"])
def test_checkpointing_changes_nothing_but_memory(policy, variant):
    gradients, sizes = [], []
    for checkpointing in (False, {"policy": policy}):
        model = shake(build(**{"dropout": 0.1, **variant, "checkpointing": checkpointing}))
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        features = [torch.randn(1, 32, 8, 12, generator=generator) for _ in range(3)]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, kept=kept: kept.append(tensor.nbytes) or tensor, lambda value: value):
            predictions = model.transform(features, images(1))
        sum(value.sum() for layer in predictions.layers for value in layer).backward()
        gradients.append([parameter.grad for parameter in (*model.encoder.parameters(), *model.decoder.parameters())])
        sizes.append(sum(kept))
    assert sizes[1] < (0.5 if policy == "every" else 0.9) * sizes[0]     # of one encoder layer, sqrt(n) is all of it
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_learns(on_two_ranks):
    """Two objects on one rank, none on the other: the loss is divided by the mean of both, so each has the gradient of the whole batch."""
    samples, batch = [sample(), sample((), ())], images(2)
    models = [shake(build(**variant)) for variant in VARIANTS.values()]
    ranks = on_two_ranks(models, batch, samples)
    for model, *gradients in zip(models, *ranks, strict=True):
        sum(model(batch, samples, mode="loss").values()).backward()
        for name, value in model.named_parameters():
            for ours in gradients:
                torch.testing.assert_close(ours[name], value.grad, rtol=1e-3, atol=1e-6)        # some are zero but for rounding


# ------------------------------------------------------------------------------------------------------------------- its recipe

@pytest.mark.parametrize("card", ["", "_refine", "_two_stage"])
def test_the_recipe_trains_backbone_offsets_and_references_at_a_tenth(card):
    recipe = load_config(CARDS / f"deformable_detr{card}_r50_coco.py")
    recipe.model.backbone.depth = 18                                            # names are the same, and it is built faster
    model = MODELS.build(recipe.model)
    wrapper = build_optim_wrapper(model, recipe.optim_wrapper)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(parameter)]: group["lr"] for group in wrapper.optimizer.param_groups for parameter in group["params"]}
    slow = {name for name, rate in rates.items() if rate == pytest.approx(2e-5)}
    assert {name for name, rate in rates.items() if rate == pytest.approx(2e-4)} == rates.keys() - slow
    learnt = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in learnt if name in slow} == {
        name for name in learnt if name.startswith(("backbone.", "reference_points.")) or ".sampling_offsets." in name}
    assert not [name for name in learnt if name.startswith(("backbone.conv1", "backbone.layer1"))]
    assert wrapper.clip_grad_kwargs == {"max_norm": 0.1}


def test_images_are_seen_at_many_scales_and_half_of_them_cropped():
    pipeline = load_config(CARDS / "deformable_detr_r50_coco.py").train_dataloader.dataset.pipeline[2:-1]
    draws = build_pipeline(pipeline)
    np.random.seed(0)
    sizes, whole = set(), 0
    for _ in range(40):
        scene = {"img": np.zeros((60, 80, 3), np.uint8), "img_shape": (60, 80), "gt_bboxes": np.float32([[0, 0, 80, 60]]),
                 "gt_bboxes_labels": np.zeros(1, np.int64), "gt_ignore_flags": np.zeros(1, bool)}
        height, width = draws(scene)["img"].shape[:2]
        assert max(height, width) <= 1333
        sizes.add(min(height, width))
        whole += abs(width / height - 4 / 3) < 0.01
    assert sizes <= set(range(480, 801, 32))
    assert len(sizes) > 6
    assert 10 <= whole <= 30


# ------------------------------------------------------------------------------------------------------------------- its parts

def test_attention_starts_by_looking_in_a_direction_a_head_one_pixel_further_a_point():
    attention = DeformableAttention(channels=32, num_heads=8, num_levels=2, num_points=3)
    offsets = attention.sampling_offsets(torch.randn(32)).view(8, 2, 3, 2)
    for head, (x, y) in enumerate([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]):
        for point in range(3):
            torch.testing.assert_close(offsets[head, :, point], torch.tensor([[x, y]] * 2) * (point + 1.0), rtol=0, atol=1e-5)
    weights = attention.attention_weights(torch.randn(32))
    assert not weights.any()                                                    # the same for all, after the softmax


def test_a_pixel_that_looks_straight_down_sees_itself_on_its_level():
    """With offsets of zero, a pixel of a padded image reads, on its own level, itself."""
    model = build(num_heads=1)
    attention = model.encoder[0].attention
    for linear in (attention.value, attention.output):
        nn.init.eye_(linear.weight)
    nn.init.zeros_(attention.sampling_offsets.bias)
    features = [torch.randn(1, 32, *size) for size in ((8, 12), (4, 6), (2, 3))]
    seen = []
    attention.register_forward_hook(lambda module, arguments, output: seen.append((arguments, output)))
    batch = ImageBatch(torch.zeros(1, 3, 64, 96), [(48, 64)])
    with torch.no_grad():
        attention.attention_weights.bias.view(3, 2)[0] = 100                    # the finest level only
        model.transform(features, batch)
    (_, _, pixels, pyramid), output = seen[0]
    inside = ~pyramid.padding[0, :96]
    assert inside.sum() == 6 * 8
    torch.testing.assert_close(output[0, :96][inside], pixels[0, :96][inside], rtol=0, atol=1e-5)


def test_it_says_what_it_cannot_build():
    with pytest.raises(ConfigError, match="set with_box_refine=True too"):
        build(two_stage=True)
    with pytest.raises(ConfigError, match="must be positive, got 0, 12 and 2"):
        build(num_classes=0)
    with pytest.raises(ConfigError, match="num_classes, num_queries and decoder_layers must be positive, got 3, 12 and 0"):
        build(decoder_layers=0)
    with pytest.raises(ConfigError, match="32 channels"):
        build(num_heads=5)
