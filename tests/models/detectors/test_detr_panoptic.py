import pytest
import torch
import torch.nn.functional as F
from torch import nn

from visionkit.evaluation.panoptic_quality import compare
from visionkit.models.detectors.detr_panoptic import MaskAttention, MaskHead, dice_loss, merge
from visionkit.models.targets import set_targets
from visionkit.registry import MODELS, ConfigError
from visionkit.structures import ImageBatch, InstanceData, PanopticMap, Sample
from visionkit.testing import check_model


def config(**changes):
    return {"type": "DetrPanoptic", "backbone": {"type": "ResNet", "depth": 18, "norm": "GN", "zero_init_residual": False},
            "num_classes": 3, "num_things": 2, "num_queries": 10, "channels": 32, "num_heads": 4, "hidden_channels": 32,
            "encoder_layers": 1, "decoder_layers": 2, "dropout": 0.0} | changes


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return MODELS.build(config(**changes))


def sample(boxes=((8, 8, 40, 40), (60, 20, 90, 60)), labels=(0, 2), size=(64, 96)) -> Sample:
    """An image of `size` that was twice as large, with objects that fill their boxes."""
    one = Sample(metainfo={"img_id": 1, "img_shape": size, "ori_shape": (2 * size[0], 2 * size[1]), "scale_factor": (0.5, 0.5)})
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    one.gt_instances = InstanceData(bboxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
                                    labels=torch.tensor(labels, dtype=torch.int64), masks=masks)
    one.ignored_instances = one.gt_instances[:0]
    return one


def images(*sizes) -> ImageBatch:
    generator = torch.Generator().manual_seed(1)
    return ImageBatch.stack([torch.randn(3, *size, generator=generator) for size in sizes])


# --------------------------------------------------------------------------------------------------------------- the mask head

def test_attention_is_one_distribution_over_heads_and_pixels_together():
    """And none of it lies on padding."""
    torch.manual_seed(0)
    attention = MaskAttention(16, 4)
    valid = torch.zeros(3, 5, dtype=torch.bool)
    valid[:2, :4] = True
    maps = attention(torch.randn(6, 16), torch.randn(15, 16), valid)
    assert maps.shape == (6, 4, 3, 5)
    torch.testing.assert_close(maps.sum((1, 2, 3)), torch.ones(6))
    assert not torch.allclose(maps.sum((2, 3)), torch.full((6, 4), 0.25), atol=0.02)        # heads compete
    assert maps[..., ~valid].eq(0).all()


def test_the_head_is_that_of_the_paper_on_features_repeated_for_every_query():
    torch.manual_seed(0)
    head = MaskHead(32, 4, (10, 8, 6)).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.2)
    maps, features = torch.rand(3, 4, 2, 3).double(), torch.randn(32, 2, 3).double()
    finer = [torch.randn(*shape).double() for shape in ((10, 4, 5), (8, 7, 9), (6, 13, 18))]        # odd sizes too
    x = torch.cat([features.expand(3, -1, -1, -1), maps], 1)
    stages = [None, None, *finer]
    adapters = [None, None, *head.adapters]
    for conv, norm, stage, adapter in zip(head.convs, head.norms, stages, adapters, strict=True):
        if stage is not None:
            stage = adapter(stage.expand(3, -1, -1, -1))
            x = stage + F.interpolate(x, stage.shape[2:], mode="nearest")
        x = F.relu(norm(conv(x)))
    torch.testing.assert_close(head(maps, features, *finer), head.output(x)[:, 0])
    assert [conv.weight.shape[0] for conv in MaskHead(256, 8, (1024, 512, 256)).convs] == [264, 128, 64, 32, 16]


def test_a_mask_depends_on_its_own_query_only_whatever_the_chunks():
    model = build().eval()
    with torch.no_grad():
        scene = model(images((64, 96), (48, 80)))
        whole = model.masks(scene, 1, torch.arange(10))
        model.query_chunk = 3
        torch.testing.assert_close(model.masks(scene, 1, torch.arange(10)), whole, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.masks(scene, 1, torch.tensor([7, 2])), whole[[7, 2]], rtol=0, atol=1e-5)
    assert whole.shape == (10, 16, 24)
    assert model.masks(scene, 1, torch.arange(0)).shape == (0, 16, 24)


# ---------------------------------------------------------------------------------------------------------------------- losses

def test_dice_worked_out_by_hand():
    logits = torch.tensor([[[0.0, 0.0]], [[100.0, -100.0]]])
    truth = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    assert dice_loss(logits, truth).tolist() == pytest.approx([1 - (2 * 0.5 + 1) / (1 + 1 + 1), 0], abs=1e-6)


def test_mask_losses_are_over_the_padded_image_and_the_number_of_objects():
    """All masks at logit 0, so p = 1/2 everywhere: three objects in two images of different sizes."""
    model = build(freeze_detr=True)
    nn.init.zeros_(model.mask_head.output.weight)
    batch = images((64, 96), (32, 48))
    samples = [sample(), sample(((4, 4, 20, 20),), (1,), (32, 48))]
    losses = model(batch, samples, mode="loss")
    areas, pixels = torch.tensor([32 * 32, 30 * 40, 16 * 16.0]), 64 * 96
    focal = 0.25 * torch.tensor(2.0).log() * (0.25 * areas + 0.75 * (pixels - areas)) / pixels             # (1 - p)^2 = 1/4
    dice = 1 - (areas + 1) / (pixels / 2 + areas + 1)
    assert losses["loss_mask"].item() == pytest.approx(focal.sum().item() / 3, rel=1e-5)
    assert losses["loss_dice"].item() == pytest.approx(dice.sum().item() / 3, rel=1e-5)
    heavy = build(freeze_detr=True, mask_weight=2.0, dice_weight=3.0)
    nn.init.zeros_(heavy.mask_head.output.weight)
    assert heavy(batch, samples, mode="loss")["loss_mask"].item() == pytest.approx(2 * losses["loss_mask"].item())
    assert heavy(batch, samples, mode="loss")["loss_dice"].item() == pytest.approx(3 * losses["loss_dice"].item())


def test_masks_are_learnt_from_the_last_layer_only_and_by_the_query_that_has_the_object():
    model = build().train()
    losses = model(images((64, 96)), [sample()], mode="loss")
    of_each_layer = ("loss_class", "loss_box", "loss_giou")
    assert set(losses) == {"loss_mask", "loss_dice", *of_each_layer, *(f"{name}_0" for name in of_each_layer)}
    batch, target = images((64, 96)), sample()
    scene = model(batch)
    (queries, objects), = model.matcher(*scene.decoded.layers[-1], set_targets([target]))
    with torch.no_grad():
        logits = F.interpolate(model.masks(scene, 0, queries)[:, None], (64, 96), mode="bilinear")[:, 0]
        expected = dice_loss(logits, target.gt_instances.masks[objects].float()).sum() / 2
    assert losses["loss_dice"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_images_without_objects_and_of_mixed_sizes_have_finite_losses():
    model = build()
    losses = model(images((64, 96), (96, 64), (40, 50)), [sample(), sample((), (), (96, 64)), sample(((1, 1, 30, 30),), (1,), (40, 50))],
                   mode="loss")
    assert all(loss.isfinite() for loss in losses.values())
    losses = model(images((64, 96)), [sample((), ())], mode="loss")
    assert losses["loss_mask"].item() == losses["loss_dice"].item() == 0


def test_samples_without_masks_are_an_error_that_says_what_to_do():
    bare = sample()
    bare.gt_instances.pop("masks")
    with pytest.raises(ConfigError, match="LoadPanopticAnnotations"):
        build()(images((64, 96)), [bare], mode="loss")


@pytest.mark.parametrize("policy", ["every", "sqrt", "selective"])
def test_recomputing_the_head_gives_the_same_gradients(policy):
    gradients = []
    for checkpointing in (False, {"policy": policy}):
        model = build(checkpointing=checkpointing, query_chunk=1)
        sum(model(images((64, 96)), [sample()], mode="loss").values()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


# ---------------------------------------------------------------------------------------------------------------------- frozen

def test_a_frozen_detr_trains_the_mask_head_alone():
    model = build(freeze_detr=True, dropout=0.5)
    check_model(model, num_classes=3, masks=True)
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"mask_attention", "mask_head"}
    model.train()
    assert model.mask_head.training
    assert not any(module.training for module in (*model.backbone.modules(), *model.transformer.modules()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    losses = model(images((64, 96)), [sample()], mode="loss")
    assert set(losses) == {"loss_mask", "loss_dice"}
    sum(losses.values()).backward()
    optimizer.step()
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"mask_attention", "mask_head"}


def test_the_weights_of_a_detr_are_those_of_its_panoptic_form():
    """So that stage two of the paper's training loads what stage one saved."""
    plain = {key: value for key, value in config(type="DETR").items() if key != "num_things"}
    panoptic = build()
    missing, unexpected = panoptic.load_state_dict(MODELS.build(plain).state_dict(), strict=False)
    assert {name.split(".")[0] for name in missing} == {"mask_attention", "mask_head"}
    assert not unexpected


# ------------------------------------------------------------------------------------------------------------------ prediction

def test_predicted_masks_lie_on_the_image_and_not_on_its_padding(monkeypatch):
    """Logits that change sign at a quarter of the padded batch, which is the middle of the second image."""
    model = build(panoptic_threshold=0.0, query_chunk=4).eval()
    left = torch.where(torch.arange(24) < 6, 1.0, -1.0).expand(10, 16, 24)
    monkeypatch.setattr(model, "masks", lambda scene, image, queries: left[queries])
    with torch.no_grad():
        first, second = model(images((64, 96), (32, 48)), [sample(), sample((), (), (32, 48))], mode="predict")
    assert first.pred_instances.masks.shape == (10, 128, 192)
    assert second.pred_instances.masks.shape == (10, 64, 96)
    assert second.pred_instances.masks[..., :48].all()
    assert not second.pred_instances.masks[..., 48:].any()
    assert second.pred_panoptic.ids.shape == (64, 96)


def test_a_high_threshold_keeps_instances_masks_and_segments_in_step():
    model = build().eval()
    nn.init.zeros_(model.classify.weight)
    model.classify.bias.data = torch.tensor([0.0, 0.0, 5.0, 0.0])                            # the stuff class has 0.98 in every query
    with torch.no_grad():
        (found,) = model(images((64, 96)), [sample()], mode="predict")
        assert [segment.label for segment in found.pred_panoptic.segments] == [2]            # ten queries of one stuff class: one segment
        model.score_threshold = 0.99
        (found,) = model(images((64, 96)), [sample()], mode="predict")
        assert found.pred_instances.masks.shape == (0, 128, 192)
        assert [segment.label for segment in found.pred_panoptic.segments] == [2]
        model.classify.bias.data[3] = 4.0                                                    # no-object is in the softmax: 0.72 is left
        (found,) = model(images((64, 96)), [sample()], mode="predict")
        assert found.pred_panoptic.segments == ()                                            # all void, if nothing else is asked for
        assert found.pred_panoptic.ids.shape == (128, 192)
        model.empty_label = 1
        (found,) = model(images((64, 96)), [sample()], mode="predict")
        assert [(segment.label, segment.area) for segment in found.pred_panoptic.segments] == [(1, 128 * 192)]


def toy(second_sky, thing):
    """Logits of 4 x 6 pixels: a thing on the left third, sky in the middle, and the same class of sky once more on the right, where the
    first sky has the logit `second_sky` and the thing `thing`."""
    masks = torch.full((3, 4, 6), -5.0)
    masks[0, :, :2], masks[1, :, 2:4], masks[2, :, 4:] = 5, 5, 5
    masks[1, :, 4:], masks[0, :, 4:] = second_sky, thing
    return masks, torch.tensor([0, 2, 2])


def areas(found: PanopticMap):
    return {(segment.label, segment.isthing): segment.area for segment in found.segments}


def test_stuff_of_one_class_becomes_one_segment_worked_out_by_hand():
    """Spec 11, item 7."""
    found = merge(*toy(second_sky=1, thing=0), num_things=2, size=(4, 6))
    assert areas(found) == {(0, True): 8, (2, False): 16}
    truth = PanopticMap.of_layers([found.ids == 1, found.ids == 2], [0, 2], (True, True, False), size=(4, 6))
    assert [counts.tolist() for counts in compare(truth, found).values()] == [[1, 1, 0, 0]] * 2
    # The second sky is dissolved and its pixels go to the highest of the other masks, as in the authors' code: not always the first sky.
    assert areas(merge(*toy(second_sky=0, thing=1), num_things=2, size=(4, 6))) == {(0, True): 16, (2, False): 8}
    # two things of one class stay two
    assert len(merge(*toy(1, 0), num_things=3, size=(4, 6)).segments) == 3


@pytest.mark.parametrize("pixels, segments", [(4, 1), (5, 2)])
def test_segments_of_four_pixels_are_dissolved(pixels, segments):
    masks = torch.stack([torch.zeros(4, 6), torch.full((4, 6), -9.0)])
    masks[1].view(-1)[:pixels] = 9
    found = merge(masks, torch.tensor([2, 0]), num_things=2, size=(4, 6))
    assert len(found.segments) == segments
    assert sum(segment.area for segment in found.segments) == 24                             # their pixels are not void


def test_what_is_dissolved_may_leave_others_too_small_in_their_turn():
    masks = torch.full((3, 1, 12), -9.0)
    masks[0] = 0
    masks[1, 0, :4], masks[2, 0, 2:4] = 1, 2                  # 2 pixels on 4 on the rest: first the 2 and the 2 that are left go
    assert [segment.area for segment in merge(masks, torch.tensor([0, 0, 1]), num_things=2, size=(1, 12)).segments] == [12]


def test_a_pixel_goes_to_the_surest_mask_even_where_none_is_above_a_half():
    masks = torch.stack([torch.full((4, 6), -3.0), torch.full((4, 6), -4.0)])
    assert areas(merge(masks, torch.tensor([1, 0]), num_things=2, size=(4, 6))) == {(1, True): 24}


def test_the_map_has_the_size_that_is_asked_for_by_the_nearest_pixel():
    found = merge(*toy(1, 0), num_things=3, size=(8, 9))
    assert found.ids.shape == (8, 9)
    assert found.ids[0].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert areas(merge(*toy(1, 0), num_things=3, size=(2, 3), min_area=0)) == {(0, True): 2, (2, True): 2}


def test_nothing_is_one_segment_of_a_chosen_class_or_void():
    none = torch.zeros(0, 4, 6), torch.zeros(0, dtype=torch.int64)
    assert areas(merge(*none, num_things=2, size=(4, 6), empty_label=1)) == {(1, True): 24}
    assert merge(*none, num_things=2, size=(4, 6)).ids.max() == 0
    small = torch.zeros(1, 2, 2), torch.tensor([0])
    assert areas(merge(*small, num_things=2, size=(2, 2), empty_label=1)) == {(1, True): 4}  # everything was too small


@pytest.mark.parametrize("change, message", [
    ({"num_things": 4}, "0 to num_classes=3; got 4"), ({"empty_label": 3}, "one of 3 labels or None, got 3"),
    ({"query_chunk": 0}, "query_chunk is at least 1 and min_area not negative, got 0 and 4"),
    ({"min_area": -1}, "got 25 and -1"), ({"channels": 12}, "a sixteenth of the transformer's channels, which are 12; give it 16 or more"),
    ({"backbone": {"type": "ResNet", "depth": 18, "out_stages": (4, 5)}}, r"backbone: .*out_stages=\(2, 3, 4, 5\)")])
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build(**change)


def test_the_gain_of_the_maps_is_of_the_first_weights_for_them_only():
    plain, gained = (build(maps_gain=gain).mask_head.convs[0].weight for gain in (1.0, 10.0))
    channels = build().project.out_channels
    assert torch.equal(gained[:, :channels], plain[:, :channels])
    assert torch.equal(gained[:, channels:], 10 * plain[:, channels:])


# -------------------------------------------------------------------------------------------------------------------- learning

@pytest.mark.slow
def test_it_learns_two_images_by_heart_first_boxes_then_masks():
    """The paper's two stages. Measured, for three initial states: masks with an IoU of 0.95 to 1.00."""
    settings = {"num_queries": 4, "num_heads": 2, "channels": 128, "panoptic_threshold": 0.3, "score_threshold": 0.3, "maps_gain": 12.0}
    model = build(**settings)
    truth = [sample(((8, 8, 40, 40), (50, 14, 90, 60)), (0, 1)), sample(((60, 4, 90, 40), (0, 24, 40, 64)), (1, 2))]
    picture = torch.zeros(2, 3, 64, 96)
    for image, target in zip(picture, truth, strict=True):
        for mask, label in zip(target.gt_instances.masks, target.gt_instances.labels, strict=True):
            image[label, mask] = 3.0
    batch = ImageBatch(picture, [(64, 96)] * 2)
    stages = model, build(**settings, freeze_detr=True)
    for stage, (iterations, lr) in zip(stages, ((80, 1e-3), (120, 1e-3)), strict=True):
        stage.load_state_dict(model.state_dict())
        optimizer = torch.optim.AdamW([parameter for parameter in stage.parameters() if parameter.requires_grad])
        for iteration in range(iterations):
            optimizer.param_groups[0]["lr"] = lr * (1 - iteration / iterations)
            loss = sum(stage(batch, truth, mode="loss").values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    stages[1].eval()
    with torch.inference_mode():
        for result in stages[1](batch, truth, mode="predict"):
            objects, found = result.gt_instances, result.pred_instances
            for label, mask in zip(objects.labels, objects.masks, strict=True):
                best = found[found.labels == label][0].masks[0, ::2, ::2]
                assert (best & mask).sum() / (best | mask).sum() > 0.9
            masks = objects.masks.repeat_interleave(2, 1).repeat_interleave(2, 2).numpy()
            true = PanopticMap.of_layers(masks, objects.labels.tolist(), (True, True, False), size=(128, 192))
            assert sum(compare(true, result.pred_panoptic).values())[1:].tolist() == [2, 0, 0]            # both found, nothing else


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_learns(on_two_ranks):
    """Two objects on one rank, none on the other: the loss is divided by the mean of both, so each has the gradient of the whole batch."""
    models, samples, batch = [build(freeze_detr=True), build()], [sample(), sample((), ())], images((64, 96), (64, 96))
    ranks = on_two_ranks(models, batch, samples)
    for model, *gradients in zip(models, *ranks, strict=True):
        sum(model(batch, samples, mode="loss").values()).backward()
        for ours in gradients:
            assert all(gradient is not None for gradient in ours.values())                  # the rank without an object takes part
            masks = {name: gradient for name, gradient in ours.items() if name.startswith("mask_")}
            assert len(masks) == 4 + 2 * (5 + 5 + 3 + 1)
            for name, gradient in masks.items():
                torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
