import pytest
import torch

from visionkit.ops import batched_nms, box_iou, nms


def random_boxes(count: int, seed: int = 0, size: float = 100.0, side: float = 40.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    top_left = torch.rand(count, 2, generator=generator) * size
    boxes = torch.cat([top_left, top_left + 1 + torch.rand(count, 2, generator=generator) * side], 1)
    return boxes, torch.rand(count, generator=generator)


def nms_by_hand(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> list[int]:
    """Take the best box left, drop all that overlap it too much, repeat."""
    overlaps = (box_iou(boxes, boxes) > iou_threshold).tolist()
    left = sorted(range(len(boxes)), key=lambda i: (-scores[i].item(), i))
    kept = []
    while left:
        best, *left = left
        kept.append(best)
        left = [i for i in left if not overlaps[best][i]]
    return kept


def test_the_better_of_two_overlapping_boxes_stays():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10]])
    assert nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist() == [1, 2]


def test_a_suppressed_box_suppresses_nothing():
    boxes = torch.tensor([[0.0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]])     # a chain: each overlaps its neighbour by 3/7
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.4).tolist() == [0, 2]


@pytest.mark.parametrize("iou_threshold", [0.0, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("count, size", [(120, 100.0), (600, 2000.0), (700, 60.0)], ids=["dense", "spread", "crowded"])
def test_nms_agrees_with_the_definition(count, size, iou_threshold):
    boxes, scores = random_boxes(count, size=size)
    assert nms(boxes, scores, iou_threshold).tolist() == nms_by_hand(boxes, scores, iou_threshold)


def test_equal_scores_are_settled_by_the_lower_index():
    boxes, _ = random_boxes(300)
    scores = torch.full((300,), 0.5)
    assert nms(boxes, scores, 0.3).tolist() == nms_by_hand(boxes, scores, 0.3)


def test_ten_thousand_copies_of_one_box_leave_one():
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(10_000, 1)
    assert nms(boxes, torch.arange(10_000).float(), 0.5).tolist() == [9999]
    assert batched_nms(boxes, torch.arange(10_000).float(), torch.arange(10_000) % 2, 0.5).tolist() == [9999, 9998]


def test_groups_do_not_suppress_each_other():
    boxes, scores = random_boxes(400)
    groups = torch.arange(400) % 3 - 1                                          # negative group numbers too
    kept = batched_nms(boxes, scores, groups, 0.5)
    expected = [i for group in (-1, 0, 1) for i in (groups == group).nonzero()[:, 0][nms(boxes[groups == group], scores[groups == group],
                                                                                         0.5)].tolist()]
    assert kept.tolist() == sorted(expected, key=lambda i: -scores[i].item())


def test_boxes_without_finite_corners_are_still_settled():
    boxes = torch.tensor([[0.0, 0, float("inf"), 10], [0, 0, 10, 10], [1, 0, 11, 10]])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 1]


def test_no_boxes_leave_no_indices():
    kept = nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert kept.shape == (0,)
    assert kept.dtype == torch.int64


@pytest.mark.parametrize("arguments, message", [
    ((torch.zeros(3, 5), torch.zeros(3), 0.5), r"boxes must be \[N, 4\], got \[3, 5\]"),
    ((torch.zeros(3, 4), torch.zeros(2), 0.5), r"one score a box, got scores \[2\] for boxes \[3, 4\]"),
    ((torch.zeros(3, 4), torch.zeros(3), 1.5), r"iou_threshold must lie in \[0, 1\], got 1.5"),
    ((torch.zeros(2, 4), torch.tensor([0.1, float("nan")]), 0.5), "1 scores that are not numbers"),
], ids=["shape", "scores", "threshold", "nan"])
def test_nms_tells_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        nms(*arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_nms_takes_every_float_type(dtype):
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10]], dtype=dtype)
    assert nms(boxes, torch.tensor([0.5, 0.9, 0.1], dtype=dtype), 0.5).tolist() == [1, 2]


def test_nms_is_one_operator_to_the_compiler():
    boxes, scores = random_boxes(50)
    torch.library.opcheck(torch.ops.visionkit.nms.default, (boxes, scores, None, 0.5))


@pytest.mark.parametrize("iou_threshold", [0.3, 0.5, 0.7])
def test_nms_gives_torchvisions_indices(iou_threshold):
    peer = pytest.importorskip("torchvision", reason="the peer to compare with is not installed", exc_type=ImportError).ops
    boxes, scores = random_boxes(3000, size=600)
    assert torch.equal(nms(boxes, scores, iou_threshold), peer.nms(boxes, scores, iou_threshold))
