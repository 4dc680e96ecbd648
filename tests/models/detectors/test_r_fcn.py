import math
import time

import pytest
import torch
from torch import nn

from visionkit.models.detectors.r_fcn import PositionSensitiveHead
from visionkit.ops import box_iou, boxes_to_rois, deform_ps_roi_pool
from visionkit.registry import MODELS, ConfigError
from visionkit.structures import ImageBatch, InstanceData, Sample
from visionkit.testing import check_model

DCN = {"dcn": {"type": "DeformConv2dPack", "offset_groups": 4}, "stage_with_dcn": (False, False, False, True)}
TRUTH = ((8.0, 8, 40, 40), (60.0, 20, 90, 60))


def config(backbone=None, **roi):
    dilated = {"type": "ResNet", "depth": 18, "norm": "GN", "out_stages": (4, 5), "strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2)}
    return {
        "type": "RFCN",
        "backbone": dilated | (backbone or {}),
        "rpn": {"type": "RPN", "anchor_scales": (1, 2, 4), "hidden_channels": 32, "pre_nms": (200, 100), "post_nms": (100, 50)},
        "roi": {"type": "PositionSensitiveHead", "num_classes": 3, "bins": 3, "hidden_channels": 32} | roi,
    }


def sample(boxes=TRUTH, labels=(0, 2), size=(64, 96), crowds=()) -> Sample:
    sample = Sample(metainfo={"img_id": 1, "img_shape": size, "ori_shape": (2 * size[0], 2 * size[1]), "scale_factor": (0.5, 0.5)})
    sample.gt_instances = InstanceData(bboxes=torch.tensor(boxes).view(-1, 4), labels=torch.tensor(labels, dtype=torch.int64))
    sample.ignored_instances = InstanceData(bboxes=torch.tensor(crowds).view(-1, 4), labels=torch.zeros(len(crowds), dtype=torch.int64))
    return sample


def images(count: int, size=(64, 96)) -> ImageBatch:
    return ImageBatch(torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1)), [size] * count)


def head(**changes) -> PositionSensitiveHead:
    torch.manual_seed(0)
    return PositionSensitiveHead(**{"num_classes": 3, "in_channels": (8,), "strides": (4,), "bins": 3, "hidden_channels": 16} | changes)


def some_boxes(count: int, size=(64, 96), seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([size[1], size[0]]) * 0.6
    return torch.cat([corner, corner + 8 + torch.rand(count, 2, generator=generator) * 24], 1)


# ------------------------------------------------------------------------------------------------------------- the whole model

@pytest.mark.parametrize("card", [config(), config(DCN, deformable=True)], ids=["R-FCN", "Deformable R-FCN"])
def test_r_fcn_keeps_the_model_contract(card):
    torch.manual_seed(0)
    check_model(MODELS.build(card), num_classes=3)


def test_the_loss_starts_where_an_undecided_detector_is():
    model = MODELS.build(config())
    nn.init.zeros_(model.rpn.classify.weight)
    nn.init.zeros_(model.roi.classify.maps.weight)
    losses = model(images(2), [sample(), sample()], mode="loss")
    assert set(losses) == {"loss_rpn_class", "loss_rpn_box", "loss_class", "loss_box"}
    assert losses["loss_rpn_class"].item() == pytest.approx(math.log(2), abs=1e-5)           # object or not
    assert losses["loss_class"].item() == pytest.approx(math.log(4), abs=1e-5)               # three classes and background


@pytest.mark.parametrize("mined", [128, None])
def test_a_batch_of_mixed_sizes_and_of_images_without_objects_trains(mined):
    model = MODELS.build(config(hard_per_image=mined))
    batch = ImageBatch(images(2).tensor, [(64, 96), (48, 64)])
    losses = model(batch, [sample(), sample((), (), size=(48, 64))], mode="loss")
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.isfinite().all()]
    nothing = model(batch, [sample((), ()), sample((), (), size=(48, 64))], mode="loss")
    assert nothing["loss_box"].item() == nothing["loss_rpn_box"].item() == 0
    assert nothing["loss_class"].item() > 0


def test_the_proposals_come_from_c4_and_the_score_maps_from_c5():
    """Spec: RPN on res4 of 1024 channels, score maps on res5 of 2048, both at stride 16."""
    model = MODELS.build(config({"depth": 50}))
    assert model.backbone.strides == (16, 16)
    assert model.rpn.conv.in_channels == 1024
    assert model.roi.conv_new.in_channels == 2048
    seen = {}
    model.rpn.register_forward_pre_hook(lambda _, arguments: seen.update(rpn=arguments[0]))
    model.roi.conv_new.register_forward_pre_hook(lambda _, arguments: seen.update(roi=arguments))
    with torch.no_grad():
        model(images(1), [sample()], mode="loss")
    assert [feature.shape for feature in seen["rpn"]] == [(1, 1024, 4, 6)]
    assert [feature.shape for feature in seen["roi"]] == [(1, 2048, 4, 6)]


def test_both_stages_work_on_one_map_where_there_is_one():
    model = MODELS.build(config({"out_stages": (4,), "strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 1)}))
    assert model.rpn.conv.in_channels == model.roi.conv_new.in_channels == 256
    assert model.backbone.strides == (8,)
    assert all(loss.isfinite() for loss in model(images(1), [sample()], mode="loss").values())


@pytest.mark.parametrize("deformable", [False, True], ids=["R-FCN", "Deformable R-FCN"])
def test_it_learns_two_images_by_heart(learn_by_heart, deformable):
    torch.manual_seed(0)
    small = {"out_stages": (2,), "strides": (1, 2, 2, 2), "dilations": (1, 1, 1, 1), "zero_init_residual": False}
    card = config(small, hidden_channels=64, hidden_std=None, deformable=deformable)
    model = MODELS.build(card | {"rpn": card["rpn"] | {"anchor_scales": (8,), "post_nms": (30, 30)}})
    learn_by_heart(model, [sample(TRUTH[:1], (0,)), sample(TRUTH[1:], (2,))], iterations=80, lr=3e-3, iou=0.7)


def test_deformable_convolutions_start_as_plain_ones():
    """Spec 03, item 5. Predictions of R-FCN with and without deformable C5 differ by 0.0."""
    torch.manual_seed(0)
    plain, deformable = MODELS.build(config(score_threshold=0.0)).eval(), MODELS.build(config(DCN, score_threshold=0.0)).eval()
    deformable.load_state_dict(plain.state_dict())
    with torch.inference_mode():
        for ours, theirs in zip(*(model(images(2), [sample(), sample()], mode="predict") for model in (plain, deformable)), strict=True):
            assert len(ours.pred_instances)
            assert torch.equal(ours.pred_instances.scores, theirs.pred_instances.scores)
            assert torch.equal(ours.pred_instances.bboxes, theirs.pred_instances.bboxes)


# --------------------------------------------------------------------------------------------------- score maps, pooling, vote

@pytest.mark.parametrize("num_classes, bins, class_channels, box_channels", [(20, 7, 1029, 392), (80, 7, 3969, 392), (3, 3, 36, 72),
                                                                            (3, 1, 4, 8)])
def test_channels_follow_from_classes_and_bins(num_classes, bins, class_channels, box_channels):
    """Spec 02, item 1. k^2 (C + 1) and 8 k^2: 1029 and 392 for VOC, 3969 and 392 for COCO."""
    roi = head(num_classes=num_classes, bins=bins)
    class_maps, box_maps = roi.score_maps([torch.zeros(1, 8, 4, 6)])
    assert class_maps.shape == (1, class_channels, 4, 6)
    assert box_maps.shape == (1, box_channels, 4, 6)


@pytest.mark.parametrize("num_classes, offset_channels", [(20, 2058), (80, 7938)])
def test_offset_channels_follow_from_classes_and_bins(num_classes, offset_channels):
    """2 k^2 (C + 1), the offsets of each class: 2058 for VOC, 7938 for COCO; 2 k^2 = 98 for the boxes."""
    roi = head(num_classes=num_classes, bins=7, deformable=True)
    assert roi.classify.offset.out_channels == offset_channels
    assert roi.regress.offset.out_channels == 98
    assert not any(value.any() for scores in (roi.classify, roi.regress) for value in scores.offset.parameters())


def test_there_is_no_parameter_after_pooling():
    """Spec 02, item 5. Those of the head: 16 * 8 + 16 of conv_new, 36 * 16 + 36 of classes, 72 * 16 + 72 of boxes; the vote reads none."""
    roi = head()
    assert sum(value.numel() for value in roi.parameters()) == (8 + 1) * 16 + (16 + 1) * 36 + (16 + 1) * 72
    maps = tuple(value.detach() for value in roi.score_maps([torch.randn(1, 8, 16, 24)]))
    assert not any(value.requires_grad for value in roi.vote(maps, [some_boxes(5)]))


def test_new_layers_start_at_a_standard_deviation_of_a_hundredth():
    roi = head(hidden_channels=256, in_channels=(64,))
    for layer in (roi.conv_new, roi.classify.maps, roi.regress.maps):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert not layer.bias.any()
    from_scratch = head(hidden_channels=256, in_channels=(64,), hidden_std=None)
    assert from_scratch.conv_new.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)


def test_the_score_is_the_mean_of_what_each_bin_reads_of_its_own_maps():
    """A box of 3 x 3 feature pixels: bin (i, j) reads pixel (i, j) of the box in the maps of bin (i, j), and nothing else."""
    roi = head(strides=(16,))
    class_maps, box_maps = torch.randn(1, 36, 6, 8), torch.randn(1, 72, 6, 8)
    logits, deltas = roi.vote((class_maps, box_maps), [torch.tensor([[32.0, 16, 80, 64]])])      # columns 2 to 4, rows 1 to 3
    for maps, numbers, first, found in ((class_maps, 4, 0, logits[0]), (box_maps, 8, 4, deltas[0, 0])):      # of 8 the foreground's 4
        bins = [maps[0, (i * 3 + j) * numbers:, 1 + i, 2 + j][:numbers] for i in range(3) for j in range(3)]
        torch.testing.assert_close(found, torch.stack(bins).mean(0)[first:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("deformable", [False, True])
def test_constant_maps_of_a_class_give_that_constant(deformable):
    """Spec 02, item 4: the vote is the mean over all bins: logit v to the last bit but one, whatever the box."""
    roi = head(deformable=deformable)
    maps = torch.randn(1, 36, 16, 24)
    maps[:, slice(9, 18) if deformable else slice(1, None, 4)] = 2.75                             # class 1 in every bin
    offsets = (torch.zeros(1, 72, 16, 24), torch.zeros(1, 18, 16, 24))
    boxes = torch.zeros(1, 72, 16, 24)
    logits, _ = roi.vote(((maps, offsets[0]), (boxes, offsets[1])) if deformable else (maps, boxes), [some_boxes(20)])
    assert logits[:, 1].tolist() == pytest.approx([2.75] * 20, abs=1e-6)
    assert logits[:, 0].std() > 0.01


def test_a_bin_that_covers_no_pixel_votes_zero():
    """Spec: an empty bin is 0, and the vote is over all bins: of the nine, the three right of the map are empty."""
    roi = head(strides=(16,))
    class_maps, box_maps = torch.full((1, 36, 6, 8), 3.0), torch.full((1, 72, 6, 8), 3.0)
    logits, deltas = roi.vote((class_maps, box_maps), [torch.tensor([[96.0, 16, 144, 64]])])     # columns 6 to 8; the map ends with 7
    assert logits.tolist() == [pytest.approx([2.0] * 4)]
    assert deltas.flatten().tolist() == pytest.approx([2.0] * 4)


def test_bins_in_another_order_say_something_else():
    roi = head()
    class_maps, box_maps = torch.randn(1, 36, 16, 24), torch.zeros(1, 72, 16, 24)
    shuffled = class_maps.view(1, 9, 4, 16, 24)[:, torch.arange(9).roll(1)].view_as(class_maps)
    one, other = (roi.vote((maps, box_maps), [some_boxes(10)])[0] for maps in (class_maps, shuffled))
    assert (one - other).abs().max() > 0.1


@pytest.mark.parametrize("moving, axis, rise", [(0, 0, 0.8), (2, 0, 0.8), (2, 1, 0.4), (3, 1, 0.4)])
def test_bins_move_for_the_class_whose_offsets_say_so(moving, axis, rise):
    """On maps that rise by 1 a pixel, an offset of 1 adds 0.1 of the box: 32 x 16 image pixels at stride 4, so 0.8 along x, 0.4 along y."""
    roi = head(deformable=True)
    ramp = torch.arange(24.0).expand(16, 24) if axis == 0 else torch.arange(16.0)[:, None].expand(16, 24)
    maps, box_maps = ramp.expand(1, 36, 16, 24), (ramp.expand(1, 72, 16, 24), torch.zeros(1, 18, 16, 24))
    box = [torch.tensor([[24.0, 20, 56, 36]])]
    still, _ = roi.vote(((maps, torch.zeros(1, 72, 16, 24)), box_maps), box)
    offsets = torch.zeros(1, 4, 2, 9, 16, 24)                                                     # classes, (dx, dy), bins
    offsets[:, moving, axis] = 1
    moved, _ = roi.vote(((maps, offsets.view(1, 72, 16, 24)), box_maps), box)
    expected = torch.zeros(1, 4)
    expected[0, moving] = rise
    torch.testing.assert_close(moved - still, expected, rtol=0, atol=1e-5)


def test_boxes_move_together_whatever_the_class():
    roi = head(deformable=True)
    ramp = torch.arange(24.0).expand(16, 24)
    class_maps = (ramp.expand(1, 36, 16, 24), torch.zeros(1, 72, 16, 24))
    box = [torch.tensor([[24.0, 20, 56, 36]])]
    _, still = roi.vote((class_maps, (ramp.expand(1, 72, 16, 24), torch.zeros(1, 18, 16, 24))), box)
    offsets = torch.zeros(1, 2, 9, 16, 24)
    offsets[:, 0] = 1
    _, moved = roi.vote((class_maps, (ramp.expand(1, 72, 16, 24), offsets.view(1, 18, 16, 24))), box)
    torch.testing.assert_close(moved - still, torch.full((1, 1, 4), 0.8), rtol=0, atol=1e-5)


def test_bins_that_may_move_start_in_place():
    """Difference 0.0 from the same pooling without offsets."""
    roi = head(deformable=True)
    features, boxes = [torch.randn(2, 8, 16, 24)], [some_boxes(10), some_boxes(10, seed=1)]
    maps = roi.score_maps(features)
    rois = boxes_to_rois(boxes) - torch.tensor([0.0, 0, 0, 1, 1])                                 # the op counts the last pixel as inside
    still = [deform_ps_roi_pool(scores, rois, None, 3, 1 / 4).mean((2, 3)) for scores, _ in maps]
    logits, deltas = roi.vote(maps, boxes)
    assert torch.equal(logits, still[0])
    assert torch.equal(deltas[:, 0], still[1][:, 4:])


def test_the_first_step_teaches_offsets():
    roi = head(deformable=True)
    losses = roi.loss([torch.randn(2, 8, 16, 24)], [some_boxes(20), some_boxes(20, seed=1)], [sample(), sample()])
    sum(losses.values()).backward()
    assert all(value.grad.any() for scores in (roi.classify, roi.regress) for value in scores.offset.parameters())


def test_a_plain_r_fcn_is_where_a_deformable_one_may_start():
    """The order of channels is the same. On maps that are constant, each with a value of its own, so are the scores: difference 1e-9."""
    plain, deformable = head(), head(deformable=True)
    missing, unexpected = deformable.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(".offset." in key for key in missing)
    features = [torch.randn(1, 8, 1, 1).expand(1, 8, 16, 24)]
    boxes = [torch.tensor([[8.0, 8, 56, 56], [16.0, 4, 80, 52]])]
    for one, other in zip(plain(features, boxes), deformable(features, boxes), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


def test_eight_times_the_regions_cost_hardly_more():
    """Spec 02, item 7. The head of VOC on a 600 x 800 image, 400 regions against 50: 1.03 times the time on two cores. (COCO's 1.02.)"""
    roi = PositionSensitiveHead(20, (512,), (16,)).eval()                                         # a quarter of res5's channels
    features = [torch.randn(1, 512, 38, 50)]
    boxes = {count: [some_boxes(count, (600, 800))] for count in (50, 400)}
    seconds = {count: [] for count in boxes}
    with torch.inference_mode():
        for _ in range(9):
            for count, some in boxes.items():
                start = time.perf_counter()
                roi(features, some)
                seconds[count].append(time.perf_counter() - start)
    assert min(seconds[400]) < 1.3 * min(seconds[50])


# ------------------------------------------------------------------------------------------------------------------- the losses

class Watched(PositionSensitiveHead):
    """A head that notes what it votes on."""

    def vote(self, maps, boxes):
        logits, deltas = super().vote(maps, boxes)
        self.votes.append((boxes, logits, deltas))
        return logits, deltas


def watched(**changes) -> Watched:
    torch.manual_seed(0)
    roi = Watched(**{"num_classes": 3, "in_channels": (8,), "strides": (4,), "bins": 3, "hidden_channels": 16} | changes)
    for layer in (roi.classify.maps, roi.regress.maps):
        nn.init.normal_(layer.weight, std=0.5)                                                    # so that losses differ
    roi.votes = []
    return roi


def test_the_128_hardest_of_all_regions_learn_and_no_other():
    """Spec 02, item 6: 128 of 302 and 128 of 202 regions have a gradient."""
    roi = watched()
    proposals = [some_boxes(300), some_boxes(200, seed=1)]
    losses = roi.loss([10 * torch.randn(2, 8, 16, 24)], proposals, [sample(), sample()])
    (everything, logits, deltas), (kept, kept_logits, kept_deltas) = roi.votes
    assert [len(boxes) for boxes in everything] == [302, 202]                                     # the two objects are among them
    assert all((boxes[:, None] == torch.tensor(TRUTH)).all(-1).any(0).all() for boxes in everything)
    assert [len(boxes) for boxes in kept] == [128, 128]
    assert not logits.requires_grad
    assert not deltas.requires_grad

    examples = roi.examples(proposals, [sample(), sample()])
    error = sum(roi.losses_of_each(logits, deltas, examples))
    chosen = [(boxes[:, None] == some).all(-1).any(1) for boxes, some in zip(everything, kept, strict=True)]
    for mine, error_of_image in zip(chosen, error.split([302, 202]), strict=True):
        assert mine.sum() == 128
        assert error_of_image[mine].min() >= error_of_image[~mine].max()
    chosen = torch.cat(chosen)
    class_losses, box_losses = roi.losses_of_each(logits[chosen], deltas[chosen], type(examples)(
        kept, examples.labels[chosen], examples.deltas[chosen]))
    assert losses["loss_class"].item() == pytest.approx(class_losses.sum().item() / 256, rel=1e-5)
    assert losses["loss_box"].item() == pytest.approx(box_losses.sum().item() / 256, rel=1e-5)

    gradients = torch.autograd.grad(sum(losses.values()), [kept_logits, kept_deltas])
    assert gradients[0].abs().sum(1).gt(0).sum() == 256


def test_ranking_adds_nothing_to_the_gradient():
    """The same as learning from the kept regions alone, to the bit."""
    roi = watched(hard_per_image=16)
    features = [10 * torch.randn(1, 8, 16, 24)]
    sum(roi.loss(features, [some_boxes(100)], [sample()]).values()).backward()
    mined = [value.grad.clone() for value in roi.parameters()]
    kept = roi.votes[1][0]
    roi.zero_grad()
    everything = roi.examples([some_boxes(100)], [sample()])
    chosen = torch.stack([(everything.boxes[0] == box).all(-1).nonzero()[0, 0] for box in kept[0]])
    examples = type(everything)(kept, everything.labels[chosen], everything.deltas[chosen])
    class_losses, box_losses = roi.losses_of_each(*roi.vote(roi.score_maps(features), kept), examples)
    (class_losses.sum() / 16 + box_losses.sum() / 16).backward()
    assert all(torch.equal(ours, value.grad) for ours, value in zip(mined, roi.parameters(), strict=True))


def test_fewer_regions_than_that_all_learn_and_the_boxes_still_count_over_128():
    roi = watched()
    losses = roi.loss([torch.randn(1, 8, 16, 24)], [some_boxes(20)], [sample()])
    assert [len(boxes) for boxes in roi.votes[1][0]] == [22]
    examples = roi.examples([some_boxes(20)], [sample()])
    class_losses, box_losses = roi.losses_of_each(*roi.votes[0][1:], examples)
    assert losses["loss_class"].item() == pytest.approx(class_losses.sum().item() / 22)
    assert losses["loss_box"].item() == pytest.approx(box_losses.sum().item() / 128)


def test_without_mining_the_sampler_decides():
    """Spec of the plain recipe: 128 regions, a quarter positive at most, background from IoU 0.1 to 0.5."""
    roi = watched(hard_per_image=None, sampler={"type": "BalancedSampler", "num": 32, "positive_fraction": 0.25},
                  matcher={"type": "IoUMatcher", "positive": 0.5, "negative": 0.5, "background_from": 0.1})
    losses = roi.loss([torch.randn(1, 8, 16, 24)], [some_boxes(300)], [sample()])
    ((boxes, logits, _),) = roi.votes
    assert logits.requires_grad
    best = box_iou(boxes[0], torch.tensor(TRUTH)).max(1)[0]
    assert len(best) == 32
    assert (best >= 0.5).sum() <= 8
    assert best.min() >= 0.1
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("deformable", [False, True])
def test_an_image_without_any_region_has_no_loss_and_no_prediction(deformable):
    roi, features, none = head(deformable=deformable), [torch.randn(1, 8, 16, 24)], torch.zeros(0, 4)
    losses = roi.loss(features, [none], [sample((), ())])
    assert losses["loss_class"].item() == losses["loss_box"].item() == 0
    sum(losses.values()).backward()
    assert not [name for name, value in roi.named_parameters() if value.grad is None]             # or other ranks would wait for it
    assert len(roi.predict(features, [none], [sample()])[0].pred_instances) == 0


def test_background_inside_a_crowd_is_neither_ranked_nor_learned_from():
    roi = watched()
    inside = torch.tensor([[50.0, 5, 60, 15], [52, 6, 66, 18]])
    roi.loss([torch.randn(1, 8, 16, 24)], [inside], [sample(TRUTH[:1], (0,), crowds=((48.0, 0, 70, 20),))])
    assert [len(boxes) for boxes, _, _ in (vote for vote in roi.votes) for boxes in boxes] == [1, 1]      # the object alone


def test_only_the_foreground_box_is_learned_and_used():
    """Spec 02, item 8. 8 k^2 maps are two boxes for each bin; the first belongs to the background and never has a gradient."""
    roi = head()
    roi.loss([torch.randn(1, 8, 16, 24)], [some_boxes(40)], [sample()])["loss_box"].backward()
    gradient = roi.regress.maps.bias.grad.view(9, 2, 4)
    assert not gradient[:, 0].any()
    assert gradient[:, 1].any(0).all()

    nn.init.zeros_(roi.regress.maps.weight)
    roi.regress.maps.bias.data.view(9, 2, 4)[:, 0] = 3.0                                          # a background box that is far off
    roi.score_threshold = 0.0
    proposals = torch.tensor([[8.0, 8, 40, 40]])
    (result,) = roi.predict([torch.randn(1, 8, 16, 24)], [proposals], [sample()])
    assert sorted(result.pred_instances.labels.tolist()) == [0, 1, 2]                             # NMS of each class, of one box
    torch.testing.assert_close(result.pred_instances.bboxes, (proposals * 2).expand(3, 4))


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="roi: PositionSensitiveHead: bins and hard_per_image must be positive, got 0"):
        MODELS.build(config(bins=0))
    with pytest.raises(ConfigError, match="RFCN: R-FCN works on C4 and C5, or on one map, but the backbone gives 4"):
        MODELS.build(config({"out_stages": (2, 3, 4, 5)}))
    with pytest.raises(ConfigError, match="roi.hard_per_images: .* Did you mean 'hard_per_image'"):
        MODELS.build(config(hard_per_images=3))


# ------------------------------------------------------------------------------------------------------------------ two ranks

@pytest.mark.slow
def test_two_ranks_learn_what_one_process_learns(on_two_ranks):
    """One image a rank, the second without an object, against both in one process; gradients differ by 1e-7 of the largest."""
    samples, batch = [sample(), sample((), ())], ImageBatch(images(2).tensor.double(), [(64, 96)] * 2)
    card = config(deformable=True)
    card["rpn"]["sampler"] = {"type": "BalancedSampler", "num": 64, "positive_fraction": 0.5, "shuffle": False}
    torch.manual_seed(0)
    model = MODELS.build(card).double()                                                 # so that rounding does not choose other regions
    nn.init.normal_(model.rpn.classify.weight)
    nn.init.normal_(model.roi.classify.maps.weight)
    ranks = on_two_ranks([model], batch, samples)
    sum(model(batch, samples, mode="loss").values()).backward()
    for (gradients,) in ranks:
        for name, value in model.named_parameters():
            torch.testing.assert_close(gradients[name], value.grad, rtol=1e-4, atol=1e-5 * value.grad.abs().max().item())
