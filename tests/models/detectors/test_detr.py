from pathlib import Path

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import nn

from visionkit.engine import load_config
from visionkit.models.detectors.detr import valid_positions
from visionkit.registry import MODELS, SCOPE, ConfigError
from visionkit.structures import ImageBatch, InstanceData, Sample
from visionkit.testing import check_model

ROOT = Path(__file__).parents[3]
UNUSED = ("transformer.decoder.layers.0.self_attention*",)          # its input is zeros: all queries say the same to each other


def config(**changes):
    return {
        "type": "DETR", "backbone": {"type": "ResNet", "depth": 18, "norm": "GN", "out_stages": (4,), "zero_init_residual": False},
        "num_classes": 3, "num_queries": 8, "channels": 32, "num_heads": 4, "hidden_channels": 32, "encoder_layers": 1,
        "decoder_layers": 2, "dropout": 0.0,
    } | changes


def build(**changes) -> nn.Module:
    torch.manual_seed(0)
    return MODELS.build(config(**changes))


def sample(boxes=((8.0, 8, 40, 40), (60, 20, 90, 60)), labels=(0, 2), size=(64, 96)) -> Sample:
    sample = Sample(metainfo={"img_id": 1, "img_shape": size, "ori_shape": (2 * size[0], 2 * size[1]), "scale_factor": (0.5, 0.5)})
    sample.gt_instances = InstanceData(bboxes=torch.tensor(boxes).view(-1, 4), labels=torch.tensor(labels, dtype=torch.int64))
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    return sample


def images(count: int, size=(64, 96)) -> ImageBatch:
    return ImageBatch(torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1)), [size] * count)


@pytest.mark.parametrize("changes", [{}, {"pre_norm": True, "position": "learned", "checkpointing": True, "auxiliary_losses": False}],
                         ids=["as in the paper", "other choices"])
def test_detr_keeps_the_model_contract(changes):
    check_model(build(**changes), num_classes=3, unused=UNUSED)


def test_every_decoder_layer_learns_from_a_matching_of_its_own():
    model = build(decoder_layers=3)
    seen = []
    model.matcher.register_forward_hook(lambda _, inputs, pairs: seen.append(inputs[0]))
    losses = model.loss(images(2), [sample(), sample((), ())])
    assert set(losses) == {f"loss_{term}{layer}" for term in ("class", "box", "giou") for layer in ("", "_0", "_1")}
    predicted = [prediction.logits for prediction in model(images(2))]
    assert len(seen) == 3
    for logits in predicted:
        assert sum(torch.equal(logits, matched) for matched in seen) == 1
    model.auxiliary_losses = False
    assert set(model.loss(images(2), [sample()] * 2)) == {"loss_class", "loss_box", "loss_giou"}


def test_a_batch_without_any_object_teaches_the_class_alone():
    losses = build()(images(2), [sample((), ()), sample((), ())], mode="loss")
    assert all(loss.isfinite() for loss in losses.values())
    assert all((loss.item() == 0) == ("class" not in name) for name, loss in losses.items())


def test_the_order_of_queries_and_of_objects_does_not_matter():
    """Spec 11, item 6. Measured: 2e-07 of outputs, 0 of the loss."""
    model = build().eval()
    before = model(images(2))[-1]
    losses = model.loss(images(2), [sample(), sample()])
    turned = sample(((60.0, 20, 90, 60), (8, 8, 40, 40)), (2, 0))
    for name, loss in model.loss(images(2), [turned, sample()]).items():
        torch.testing.assert_close(loss, losses[name], rtol=1e-6, atol=1e-6)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    model.queries.weight.data = model.queries.weight.data[order]
    after = model(images(2))[-1]
    torch.testing.assert_close(after.logits, before.logits[:, order], rtol=0, atol=1e-5)
    torch.testing.assert_close(after.boxes, before.boxes[:, order], rtol=0, atol=1e-6)


def test_the_decoder_starts_from_zeros_and_the_queries_are_positions():
    model = build()
    seen = []
    model.transformer.register_forward_hook(lambda _, inputs, output: seen.append(inputs))
    model(images(2))
    source, target, _, queries = seen[0]
    assert not target.any()
    assert queries.shape == target.shape == (2, 8, 32)
    assert torch.equal(queries[1], model.queries.weight)


def test_boxes_are_fractions_of_the_image_without_its_padding():
    model = build().eval()
    batch = ImageBatch(torch.randn(1, 3, 64, 96), [(32, 48)])
    truth = sample(((0.0, 0, 48, 32),), (1,), size=(32, 48))                # all of the image, a quarter of the batch
    prediction = model(batch)[-1]
    prediction = prediction._replace(boxes=torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(1, 8, 4))
    model.forward = lambda images: [prediction]
    losses = model.loss(batch, [truth])
    assert losses["loss_box"].item() == 0
    (result,) = model.predict(batch, [truth])
    assert result.pred_instances.bboxes.tolist() == [[0, 0, 96, 64]] * 8    # the original is twice as large


def test_padding_is_no_part_of_what_the_queries_read():
    batch = ImageBatch(torch.zeros(2, 3, 64, 96), [(64, 96), (40, 33)])
    valid = valid_positions(batch, (4, 6))
    assert valid[0].all()
    assert valid[1].nonzero().tolist() == [[y, x] for y in range(3) for x in range(3)]      # pixels 0, 16, 32 of 40 rows, 33 columns
    model = build()
    seen = []
    model.transformer.register_forward_hook(lambda _, inputs, keywords, output: seen.append(keywords["source_valid"]), with_kwargs=True)
    model(batch)
    model(images(2))
    assert torch.equal(seen[0], valid.flatten(1))
    assert seen[1] is None                                                  # nothing is padded: no mask


def test_every_query_answers_and_nothing_is_suppressed():
    """Spec 11, item 7."""
    model = build(num_queries=5).eval()
    logits = torch.tensor([[[9.0, 0, 0, 0], [0, 0, 5, 0], [0, 0, 1, 9], [0, 0, 5, 0], [0, 3, 0, 0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.25, 0.5, 0.5, 1.0], [0.9, 0.9, 0.4, 0.4], [0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 1, 1]]])
    model.forward = lambda images: [(logits, boxes)]
    (result,) = model.predict(images(1), [sample()])
    found = result.pred_instances
    assert found.labels.tolist() == [0, 2, 2, 1, 2]                         # the last one is sure of no object, but must name a class
    assert found.scores.tolist() == pytest.approx(logits[0].softmax(-1)[[0, 1, 3, 4, 2], [0, 2, 2, 1, 2]].tolist())
    assert found.bboxes[1].tolist() == found.bboxes[2].tolist() == [0, 0, 96, 128]          # of an original of 128 x 192
    torch.testing.assert_close(found.bboxes[4], torch.tensor([0.7 * 192, 0.7 * 128, 192, 128]))     # cut at the border
    model.score_threshold = 0.5
    assert model.predict(images(1), [sample()])[0].pred_instances.labels.tolist() == [0, 2, 2, 1]


def test_it_learns_two_images_by_heart(learn_by_heart):
    model = build(num_queries=5, backbone=config()["backbone"] | {"out_stages": (3,)})
    learn_by_heart(model, [sample(((8.0, 8, 40, 40),), (0,)), sample(((60.0, 20, 90, 60),), (2,))], iterations=120, lr=1e-3)


@pytest.mark.parametrize("name, last_map", [("detr_r50_coco", 2), ("detr_r50_dc5_coco", 4)])
def test_the_recipe_is_the_papers(name, last_map):
    """Spec 11, item 8, and the stride of DC5."""
    cfg = load_config(ROOT / "configs" / "detr" / f"{name}.py")
    cfg.model.backbone.pretrained = None
    with DefaultScope.overwrite_default_scope(SCOPE):
        model = MODELS.make(cfg.model, at="model")
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names.get(id(parameter)): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {rates[name] for name in learning if name.startswith("backbone.")} == {1e-5}
    assert {rates[name] for name in learning if not name.startswith("backbone.")} == {1e-4}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}
    assert optimizer.clip_grad_kwargs == {"max_norm": 0.1}
    assert {name.split(".")[1] for name in learning if name.startswith("backbone.")} == {"layer2", "layer3", "layer4"}
    assert not any(".bn" in name for name in learning)
    assert model.backbone.eval()(torch.zeros(1, 3, 64, 64))[-1].shape[2:] == (last_map, last_map)


@pytest.mark.slow
def test_two_ranks_learn_the_same_with_all_objects_on_one_of_them(on_two_ranks):
    """Two objects here, none there: the box terms are divided by the mean, 1, so the mean of both gradients is that of two by two."""
    model, batch, samples = build(), images(2), [sample(), sample((), ())]
    ranks = on_two_ranks([model], batch, samples)
    box, rest = 0.0, 0.0
    for index in range(2):
        for name, loss in model.loss(ImageBatch(batch.tensor[index:index + 1], batch.sizes[:1]), samples[index:index + 1]).items():
            if "class" in name:
                rest = rest + loss / 2                                      # a mean by weight on each rank, as in the authors' code
            else:
                box = box + loss * max(len(samples[index].gt_instances), 1) / 2
    (box + rest).backward()
    for (gradients,) in ranks:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5,
                                       msg=lambda text, name=name: f"{name}: {text}")


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="position must be 'sine' or 'learned', got 'cosine'"):
        build(position="cosine")
    with pytest.raises(ConfigError, match="must be positive, got 0, 8 and 2"):
        build(num_classes=0)
    with pytest.raises(ConfigError, match="num_classes, num_queries and decoder_layers must be positive, got 3, 8 and 0"):
        build(decoder_layers=0)
    with pytest.raises(ConfigError, match=r"^matcher.type: no target named 'HungarianMatch'. Did you mean 'HungarianMatcher'\?"):
        build(matcher={"type": "HungarianMatch"})
