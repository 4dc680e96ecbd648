import pytest
import torch

from visionkit.ops import NMS, BoxVoting, SoftNMS, box_iou, detections_from_scores
from visionkit.registry import OPS, ConfigError

# A and B overlap by IoU 0.6 (A covers 10 x 10, B its left 6 x 10); C lies elsewhere.
A, B, C = [0.0, 0, 10, 10], [0.0, 0, 6, 10], [50.0, 50, 60, 60]
KINDS = [NMS(), SoftNMS(), SoftNMS(iou=0.3), BoxVoting()]


def thin(nms, boxes, scores, labels=None):
    boxes, scores, labels = nms(torch.tensor(boxes).view(-1, 4), torch.tensor(scores), torch.tensor(labels or [0] * len(boxes)).long())
    return boxes.tolist(), [round(score, 6) for score in scores.tolist()], labels.tolist()


def test_nms_drops_what_a_better_one_of_its_class_overlaps_by_more_than_iou():
    assert thin(NMS(0.5), [B, A, C], [0.7, 0.8, 0.9]) == ([C, A], [0.9, 0.8], [0, 0])
    assert thin(NMS(0.65), [B, A, C], [0.7, 0.8, 0.9]) == ([C, A, B], [0.9, 0.8, 0.7], [0, 0, 0])


@pytest.mark.parametrize("kind", [NMS, SoftNMS, BoxVoting])
def test_another_class_matters_only_to_class_agnostic_suppression(kind):
    _, apart, labels = thin(kind(), [B, A], [0.75, 0.8125], [1, 0])
    assert (apart, labels) == ([0.8125, 0.75], [0, 1])
    _, together, labels = thin(kind(class_agnostic=True), [B, A], [0.75, 0.8125], [1, 0])
    assert labels[0] == 0
    assert len(together) == 1 or together[1] < 0.75


def test_soft_nms_lowers_a_score_by_the_gaussian_of_the_overlap_or_in_proportion_to_it():
    gaussian = 0.7 * torch.tensor(-0.36 / 0.5).exp().item()
    assert thin(SoftNMS(), [B, A], [0.7, 0.8]) == ([A, B], pytest.approx([0.8, gaussian], abs=1e-6), [0, 0])
    assert thin(SoftNMS(iou=0.3), [B, A], [0.7, 0.8])[1] == pytest.approx([0.8, 0.7 * 0.4])
    assert thin(SoftNMS(iou=0.7), [B, A], [0.7, 0.8])[1] == pytest.approx([0.8, 0.7])            # 0.6 does not reach 0.7
    assert thin(SoftNMS(iou=0.3, min_score=0.3), [B, A], [0.7, 0.8])[1] == pytest.approx([0.8])


def test_the_box_that_stays_is_the_mean_of_its_voters_by_score():
    """A (0.75) and B (0.25) vote: x2 = 10 * 0.75 + 6 * 0.25 = 9. C has another place and A's double another class."""
    boxes, scores, labels = thin(BoxVoting(), [B, A, C, A], [0.25, 0.75, 0.5, 0.125], [0, 0, 0, 1])
    assert boxes == [[0, 0, 9, 10], C, A]
    assert scores == [0.75, 0.5, 0.125]
    assert labels == [0, 0, 1]
    assert thin(BoxVoting(vote_iou=0.7), [B, A], [0.25, 0.75])[0] == [A]


def test_a_box_without_extent_stays_where_it_is():
    point = [5.0, 5, 5, 5]
    assert thin(BoxVoting(vote_iou=0.0), [point], [0.0])[0] == [point]
    assert thin(BoxVoting(), [point, A], [0.5, 0.75])[0] == [A, point]


def test_many_boxes_vote_as_in_a_loop_over_them():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(700, 2, generator=generator) * 200                                         # more stay than are voted on at a time
    boxes = torch.cat([corner, corner + 5 + 15 * torch.rand(700, 2, generator=generator)], 1)
    scores, labels = torch.rand(700, generator=generator), torch.randint(0, 3, (700,), generator=generator)
    voted, kept_scores, kept_labels = BoxVoting(0.3, 0.4)(boxes, scores, labels)
    kept, _, _ = NMS(0.3)(boxes, scores, labels)
    assert len(kept) > 256
    for box, where, label in zip(kept, voted, kept_labels, strict=True):
        around = (box_iou(box[None], boxes)[0] >= 0.4) & (labels == label)
        expected = sum(score * other for score, other in zip(scores[around], boxes[around], strict=True)) / scores[around].sum()
        torch.testing.assert_close(where, expected, rtol=0, atol=1e-4)
    assert torch.equal(kept_scores, kept_scores.sort(descending=True)[0])


@pytest.mark.parametrize("nms", KINDS, ids=lambda kind: type(kind).__name__)
def test_no_candidates_are_no_detections(nms):
    boxes, scores, labels = detections_from_scores(torch.zeros(0, 3), torch.zeros(0, 3, 4), 0.0, nms, 100)
    assert (boxes.shape, scores.shape, labels.shape, labels.dtype) == ((0, 4), (0,), (0,), torch.int64)


@pytest.mark.parametrize("class_boxes", [False, True])
def test_every_class_of_a_region_above_the_threshold_is_a_candidate(class_boxes):
    scores = torch.tensor([[0.9, 0.3, 0.05], [0.05, 0.2, 0.8]])
    boxes = torch.tensor([A, C]).view(2, 1, 4).repeat(1, 3 if class_boxes else 1, 1)
    if class_boxes:
        boxes += torch.tensor([0.0, 100, 200]).view(3, 1)
    found, score, label = detections_from_scores(scores, boxes, 0.05, NMS(), 3)
    assert score.tolist() == pytest.approx([0.9, 0.8, 0.3])                                       # of four above 0.05 the best three
    assert label.tolist() == [0, 2, 1]
    moved = torch.tensor([0.0, 200, 100]).view(3, 1) if class_boxes else 0
    assert torch.equal(found, torch.tensor([A, C, A]) + moved)


@pytest.mark.parametrize("config, said", [
    (dict(type="nms", iou=1.5), "iou must lie in"), (dict(type="soft_nms", iou=0.3, sigma=0.5), "give one of them"),
    (dict(type="soft_nms", sigma=-1.0), "sigma must be positive"), (dict(type="box_voting", vote_iou=-0.1), "vote_iou must lie in"),
    (dict(type="softnms"), "Did you mean 'soft_nms'"), (dict(type="nms", iou_threshold=0.5), "no argument 'iou_threshold'")])
def test_what_cannot_be_is_refused(config, said):
    with pytest.raises(ConfigError, match=said):
        OPS.make(config, at="nms")
