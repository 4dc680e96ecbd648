import math

import pytest
import torch
from torch import nn

from visionkit.models.heads.roi_head import Examples, RoIHead
from visionkit.registry import HEADS, MODELS, NECKS, ConfigError
from visionkit.structures import ImageBatch, InstanceData, Sample
from visionkit.testing import check_model

NO_BOXES = torch.zeros(0, 4)


def config(**changes):
    return {
        "type": "FasterRCNN",
        "backbone": {"type": "ResNet", "depth": 18, "norm": "GN"},
        "neck": {"type": "FPN", "out_channels": 32, "num_levels": 5},
        "rpn": {"type": "RPN", "anchor_scales": (4,), "pre_nms": (200, 100), "post_nms": (100, 50)},
        "roi": {"type": "RoIBoxHead", "num_classes": 3, "hidden_channels": (64,),
                "sampler": {"type": "BalancedSampler", "num": 64, "positive_fraction": 0.25}},
    } | changes


def sample(boxes=((8.0, 8, 40, 40), (60, 20, 90, 60)), labels=(0, 2), size=(64, 96)) -> Sample:
    sample = Sample(metainfo={"img_id": 1, "img_shape": size, "ori_shape": (2 * size[0], 2 * size[1]), "scale_factor": (0.5, 0.5)})
    sample.gt_instances = InstanceData(bboxes=torch.tensor(boxes).view(-1, 4), labels=torch.tensor(labels, dtype=torch.int64))
    sample.ignored_instances = InstanceData(bboxes=NO_BOXES, labels=torch.zeros(0, dtype=torch.int64))
    return sample


def images(count: int, size=(64, 96)) -> ImageBatch:
    return ImageBatch(torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1)), [size] * count)


def test_faster_rcnn_keeps_the_model_contract():
    torch.manual_seed(0)
    check_model(MODELS.build(config()), num_classes=3)


def test_the_loss_starts_where_an_undecided_detector_is():
    model = MODELS.build(config())
    nn.init.zeros_(model.rpn.classify.weight)
    nn.init.zeros_(model.roi.classify.weight)
    losses = model(images(2), [sample(), sample()], mode="loss")
    assert set(losses) == {"loss_rpn_class", "loss_rpn_box", "loss_class", "loss_box"}
    assert losses["loss_rpn_class"].item() == pytest.approx(math.log(2), abs=1e-5)           # object or not
    assert losses["loss_class"].item() == pytest.approx(math.log(4), abs=1e-5)               # three classes and background


def test_every_parameter_learns_from_images_with_and_without_objects():
    model = MODELS.build(config())
    sum(model(images(2), [sample(), sample((), ())], mode="loss").values()).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.isfinite().all()]


def test_a_batch_without_any_object_has_a_finite_loss_and_no_box_loss():
    losses = MODELS.build(config())(images(2), [sample((), ()), sample((), ())], mode="loss")
    assert losses["loss_box"].item() == losses["loss_rpn_box"].item() == 0
    assert all(loss.isfinite() for loss in losses.values())


def test_predictions_are_in_original_pixels_within_the_image_and_sorted():
    torch.manual_seed(0)
    model = MODELS.build(config(roi=config()["roi"] | {"score_threshold": 0.0})).eval()
    with torch.inference_mode():
        (result,) = model(images(1), [sample()], mode="predict")
    predicted = result.pred_instances
    assert 0 < len(predicted) <= 100
    assert predicted.bboxes[:, 2:].max() > 96                    # beyond the input's 64 x 96: in pixels of the original, twice as large
    assert predicted.bboxes.min() >= 0
    assert predicted.bboxes[:, 2].max() <= 192
    assert predicted.bboxes[:, 3].max() <= 128
    assert torch.equal(predicted.scores, predicted.scores.sort(descending=True).values)


def test_it_learns_two_images_by_heart(learn_by_heart):
    torch.manual_seed(0)
    model = MODELS.build(config(
        backbone={"type": "ResNet", "depth": 18, "norm": "GN", "out_stages": (2, 3, 4), "zero_init_residual": False},
        neck={"type": "FPN", "out_channels": 32}, roi=config()["roi"] | {"hidden_channels": (128,)}))
    learn_by_heart(model, [sample(((8.0, 8, 40, 40),), (0,)), sample(((60.0, 20, 90, 60),), (2,))], iterations=100, lr=1e-3)


def test_a_part_that_cannot_be_built_is_named_by_its_place():
    with pytest.raises(ConfigError, match=r"^neck.type: no neck named 'FPM'. Did you mean 'FPN'\?"):
        MODELS.build(config(neck={"type": "FPM"}))
    with pytest.raises(ConfigError, match=r"^roi.sampler.nums: BalancedSampler has no argument 'nums'. Did you mean 'num'\?"):
        MODELS.build(config(roi={"type": "RoIBoxHead", "num_classes": 3, "sampler": {"type": "BalancedSampler", "nums": 1}}))
    with pytest.raises(ConfigError, match="^roi: RoIBoxHead needs the argument 'num_classes'"):
        MODELS.build(config(roi={"type": "RoIBoxHead"}))


def test_parts_may_come_built():
    neck = NECKS.build({"type": "FPN", "in_channels": (64, 128, 256, 512), "strides": (4, 8, 16, 32), "out_channels": 32})
    assert MODELS.build(config(neck=neck)).neck is neck


def test_fpn_adds_the_coarser_level_to_the_finer():
    fpn = NECKS.build({"type": "FPN", "in_channels": (4, 4), "strides": (4, 8), "out_channels": 4, "num_levels": 3})
    for conv in (*fpn.lateral, *fpn.output):
        nn.init.dirac_(conv.weight)
    fine, coarse = torch.randn(1, 4, 5, 7), torch.randn(1, 4, 3, 4)
    first, second, third = fpn((fine, coarse))
    torch.testing.assert_close(first, fine + coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :5, :7], rtol=0, atol=1e-6)
    torch.testing.assert_close(second, coarse)
    assert torch.equal(third, second[:, :, ::2, ::2])
    assert fpn.strides == (4, 8, 16)


def test_boxes_go_to_the_level_of_their_size():
    pooling = HEADS.build({"type": "PyramidRoIAlign", "in_channels": (8,) * 5, "strides": (4, 8, 16, 32, 64)})
    sides = torch.tensor([10.0, 111, 112, 223, 224, 448, 5000])
    boxes = torch.stack([torch.zeros(7), torch.zeros(7), sides, sides], 1)
    assert pooling.level_of(boxes).tolist() == [0, 0, 1, 1, 2, 3, 3]


def test_proposals_are_the_best_boxes_of_their_own_image():
    torch.manual_seed(0)
    model = MODELS.build(config()).eval()
    batch = images(3)
    with torch.inference_mode():
        together = model(batch).proposals
        for index in range(3):
            alone = model(ImageBatch(batch.tensor[index:index + 1], batch.sizes[:1])).proposals[0]
            torch.testing.assert_close(together[index], alone, rtol=0, atol=1e-3)
    assert all(len(boxes) <= 50 for boxes in together)


def test_the_sampled_anchors_get_what_the_dense_pass_says_and_its_gradient():
    torch.manual_seed(0)
    rpn = HEADS.build({"type": "RPN", "in_channels": (6, 6), "strides": (4, 8), "anchor_ratios": (0.5, 1.0)}).double()
    features = [torch.randn(2, 6, 4, 5, dtype=torch.float64, requires_grad=True), torch.randn(2, 6, 2, 3, dtype=torch.float64,
                                                                                               requires_grad=True)]
    chosen = torch.tensor([0, 9, 17, 39, 40, 51, 52, 60, 92, 103])              # corners and insides of both images and levels
    dense = rpn.forward.__wrapped__(rpn, features)                              # the dense pass with its gradient
    for sparse, whole in zip(rpn._at(features, chosen), (torch.cat(dense.logits, 1), torch.cat(dense.deltas, 1)), strict=True):
        expected = whole.flatten(0, 1)[chosen]
        torch.testing.assert_close(sparse, expected)
        weights = torch.randn_like(expected)
        inputs = [*features, *rpn.parameters()]
        for ours, theirs in zip(*(torch.autograd.grad((values * weights).sum(), inputs, allow_unused=True, retain_graph=True)
                                  for values in (sparse, expected)),
                                strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_padding_of_a_smaller_image_is_not_background():
    torch.manual_seed(0)
    model = MODELS.build(config())
    seen = []
    model.rpn.sampler.register_forward_hook(lambda _, arguments, drawn: seen.append(drawn[1]))
    batch = ImageBatch(torch.zeros(2, 3, 64, 96), [(64, 96), (32, 48)])
    model(batch, [sample((), ()), sample((), (), size=(32, 48))], mode="loss")
    anchors = torch.cat(model(batch).objectness.anchors)
    x, y = ((anchors[:, :2] + anchors[:, 2:]) / 2)[seen[1]].unbind(1)
    assert len(x) > 100
    assert x.max() < 48
    assert y.max() < 32
    assert ((anchors[:, :2] + anchors[:, 2:]) / 2)[seen[0], 0].max() >= 48                  # the larger image is used as a whole


def box_head_loss(proposals: list[torch.Tensor], label: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The loss of a box head on one object of the class `label`, and the gradient of its last layer's bias, [classes, 4]."""
    torch.manual_seed(0)
    head = HEADS.build({"type": "RoIBoxHead", "num_classes": 3, "in_channels": (8,), "strides": (4,), "hidden_channels": (16,)})
    losses = head.loss([torch.randn(1, 8, 16, 24)], proposals, [sample(((8.0, 8, 40, 40),), (label,))])
    losses["loss_box"].backward()
    return losses, head.regress.bias.grad.view(3, 4)


def test_the_objects_themselves_are_examples_even_without_a_proposal():
    losses, gradient = box_head_loss([NO_BOXES], 1)
    assert losses["loss_class"].item() > 0
    assert gradient.any()


@pytest.mark.parametrize("label", [0, 1, 2])
def test_only_the_box_of_the_true_class_learns(label):
    _, gradient = box_head_loss([torch.tensor([[10.0, 8, 40, 40]])], label)
    assert gradient.any(1).tolist() == [index == label for index in range(3)]


def test_heads_refuse_levels_of_different_width():
    with pytest.raises(ValueError, match="same channels on each, got"):
        HEADS.build({"type": "RPN", "in_channels": (8, 16), "strides": (4, 8)})


DEFORMABLE = {
    "type": "FasterRCNN",
    "backbone": {"type": "ResNet", "depth": 18, "norm": "GN", "out_stages": (4, 5), "strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2),
                 "dcn": {"type": "DeformConv2dPack", "offset_groups": 4}, "stage_with_dcn": (False, False, False, True)},
    "neck": None,
    "rpn": {"type": "RPN", "anchor_scales": (2, 4), "hidden_channels": 32, "pre_nms": (100, 50), "post_nms": (50, 30)},
    "roi": {"type": "RoIBoxHead", "num_classes": 3, "pooling": {"type": "DeformableRoIPooling", "reduced_channels": 16, "pool_size": 3},
            "hidden_channels": (32,), "sampler": {"type": "BalancedSampler", "num": 64, "positive_fraction": 0.25}},
}


def test_deformable_faster_rcnn_keeps_the_model_contract():
    torch.manual_seed(0)
    check_model(MODELS.build(DEFORMABLE), num_classes=3)


def test_without_a_neck_the_stages_work_on_the_first_and_on_the_last_map():
    model = MODELS.build(DEFORMABLE)
    seen = {}
    for name in ("rpn", "roi"):
        getattr(model, name).register_forward_pre_hook(lambda _, arguments, name=name: seen.update({name: arguments[0]}))
    model.train()(images(2), [sample(), sample()], mode="loss")
    assert [feature.shape[1:] for feature in seen["rpn"]] == [(256, 4, 6)]
    assert [feature.shape[1:] for feature in seen["roi"]] == [(512, 4, 6)]


def test_maps_that_no_stage_would_work_on_are_refused():
    with pytest.raises(ConfigError, match="without a neck .* the backbone gives 4; set its out_stages, or give a neck"):
        MODELS.build(config(neck=None))


def test_the_deformable_detector_starts_as_the_one_whose_convolutions_and_bins_stay():
    """Spec 03, item 5. Difference 0.0, of deformable convolution and deformable pooling together."""
    torch.manual_seed(0)
    plain_backbone = {key: value for key, value in DEFORMABLE["backbone"].items() if "dcn" not in key}
    plain, deformable = MODELS.build(DEFORMABLE | {"backbone": plain_backbone}).eval(), MODELS.build(DEFORMABLE).eval()
    deformable.load_state_dict(plain.state_dict())
    in_place = plain.roi.pooling._pool
    plain.roi.pooling._pool = lambda reduced, rois, offset: in_place(reduced, rois, None)
    results = []
    for model in (plain, deformable):
        model.roi.score_threshold = 0.0
        with torch.inference_mode():
            results.append(model(images(2), [sample(), sample()], mode="predict"))
    for ours, theirs in zip(*results, strict=True):
        assert len(ours.pred_instances)
        assert torch.equal(ours.pred_instances.scores, theirs.pred_instances.scores)
        assert torch.equal(ours.pred_instances.bboxes, theirs.pred_instances.bboxes)


@pytest.mark.parametrize("beta, expected", [(0.0, 2.0), (1.0, 1.5), (8.0, 0.25)])
def test_the_box_loss_is_smooth_below_beta(beta, expected):
    """Of a delta that is off by 2: L1 2, smooth L1 2 - 0.5, and 2^2 / 16."""
    head = RoIHead(2, smooth_l1_beta=beta)
    examples = Examples([torch.zeros(2, 4)], torch.tensor([1, 2]), torch.tensor([[2.0, 0, 0, 0], [0, 0, 0, 0]]))
    _, box_losses = head.losses_of_each(torch.zeros(2, 3), torch.zeros(2, 1, 4), examples)
    assert box_losses.tolist() == pytest.approx([expected, 0.0])


def test_the_rpn_takes_smooth_l1_too():
    losses = []
    for beta in (0.0, 1.0):
        torch.manual_seed(0)
        model = MODELS.build(config(rpn=config()["rpn"] | {"smooth_l1_beta": beta}))
        losses.append(model(images(1), [sample()], mode="loss")["loss_rpn_box"].item())
    assert losses[1] < losses[0]
    with pytest.raises(ConfigError, match="rpn: RPN: smooth_l1_beta must be 0"):
        MODELS.build(config(rpn={"type": "RPN", "smooth_l1_beta": -1.0}))
