import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visionkit.ops import batched_nms, box_iou, nms

nms_module = importlib.import_module("visionkit.ops.nms")                        # `visionkit.ops.nms` is the function


def random_boxes(count: int, seed: int = 0, size: float = 100.0, side: float = 40.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    top_left = torch.rand(count, 2, generator=generator) * size
    boxes = torch.cat([top_left, top_left + 1 + torch.rand(count, 2, generator=generator) * side], 1)
    return boxes, torch.rand(count, generator=generator)


def crowd(count: int, objects: int, seed: int = 0, size: float = 600.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes around each of some objects."""
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(objects, 2, generator=generator) * size
    sides = 20 + torch.rand(objects, 2, generator=generator) * 80
    which = torch.randint(objects, (count,), generator=generator)
    center = center[which] + torch.randn(count, 2, generator=generator) * sides[which] * 0.1
    sides = sides[which] * (torch.randn(count, 2, generator=generator) * 0.15).exp()
    return torch.cat([center - sides / 2, center + sides / 2], 1), torch.rand(count, generator=generator)


def in_a_row(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes that all start at the same height."""
    boxes, scores = random_boxes(count, size=1000)
    return boxes - boxes[:, [1]] * torch.tensor([0, 1, 0, 1]), scores


def nms_by_hand(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, groups: list[int] | None = None) -> list[int]:
    """Take the best box left, drop all of its group that overlap it too much, repeat."""
    groups = [0] * len(boxes) if groups is None else groups
    overlaps = (box_iou(boxes, boxes).double() > iou_threshold).tolist()
    left = sorted(range(len(boxes)), key=lambda i: (-scores[i].item(), i))
    kept = []
    while left:
        best, *left = left
        kept.append(best)
        left = [i for i in left if groups[i] != groups[best] or not overlaps[best][i]]
    return kept


@pytest.fixture
def small_steps(monkeypatch):
    """Makes few boxes go the ways of many."""
    for name, value in {"_FIRST_BLOCK": 4, "_BLOCK": 8, "_PAIRS": 100, "_FEW_EDGES": 10}.items():
        monkeypatch.setattr(nms_module, name, value)


def test_the_better_of_two_overlapping_boxes_stays():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10]])
    assert nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist() == [1, 2]


def test_a_suppressed_box_suppresses_nothing():
    boxes = torch.tensor([[0.0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]])     # a chain: each overlaps its neighbour by 3/7
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.4).tolist() == [0, 2]


@pytest.mark.parametrize("iou_threshold", [0.0, 0.3, 0.5, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("count, size", [(120, 100.0), (600, 2000.0), (700, 60.0)], ids=["dense", "spread", "crowded"])
def test_nms_agrees_with_the_definition(count, size, iou_threshold):
    boxes, scores = random_boxes(count, size=size)
    assert nms(boxes, scores, iou_threshold).tolist() == nms_by_hand(boxes, scores, iou_threshold)


@pytest.mark.parametrize("iou_threshold", [0.0, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("make", [lambda: random_boxes(200, size=300), lambda: random_boxes(200, size=1000), lambda: crowd(200, 4),
                                  lambda: random_boxes(200, size=50, side=2), lambda: random_boxes(200, size=1, side=300)],
                         ids=["dense", "spread", "crowd", "tiny", "crossing"])
@pytest.mark.usefixtures("small_steps")
def test_blocks_sweep_and_graph_agree_with_the_definition(make, iou_threshold):
    boxes, scores = make()
    assert nms(boxes, scores, iou_threshold).tolist() == nms_by_hand(boxes, scores, iou_threshold)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
@pytest.mark.parametrize("make", [lambda: random_boxes(240, size=200), lambda: random_boxes(240, size=1000), lambda: crowd(240, 4),
                                  lambda: random_boxes(240, size=60), lambda: in_a_row(240)],
                         ids=["dense", "spread", "crowd", "crowded", "row"])
@pytest.mark.usefixtures("small_steps")
def test_batched_nms_agrees_with_the_definition(make, count):
    boxes, scores = make()
    boxes -= 1000
    groups = (torch.rand(240, generator=torch.Generator().manual_seed(1)).square() * count).long() - 1       # some large, some small
    for iou_threshold in (0.3, 0.7):
        assert batched_nms(boxes, scores, groups, iou_threshold).tolist() == nms_by_hand(boxes, scores, iou_threshold, groups.tolist())


@pytest.mark.usefixtures("small_steps")
def test_crowds_behind_a_lone_best_box_are_settled_in_groups_large_and_small():
    boxes, scores = torch.cat([crowd(size, 1, seed=size)[0] for size in (40, 30, 3, 3, 2)]), random_boxes(78)[1]
    groups = torch.arange(5).repeat_interleave(torch.tensor([40, 30, 3, 3, 2]))
    firsts = torch.tensor([0, 40, 70, 73, 76])
    boxes[firsts], scores[firsts] = torch.tensor([5000.0, 5000, 5010, 5010]), 2.0
    assert batched_nms(boxes, scores, groups, 0.3).tolist() == nms_by_hand(boxes, scores, 0.3, groups.tolist())


BOX = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(-1, 8), st.integers(-1, 8), st.integers(0, 3), st.integers(0, 2))


@given(st.lists(BOX, max_size=30), st.sampled_from([0, 0.1, 0.2, 0.3, 1 / 3, 0.4, 0.5, 0.6, 0.7, 0.8, 1]))
def test_ties_in_score_and_overlaps_at_the_threshold_are_settled_by_the_definition(rows, iou_threshold):
    x, y, width, height, score, group = torch.tensor(rows, dtype=torch.int64).view(-1, 6).t()
    boxes, scores = torch.stack([x, y, x + width, y + height], 1).float(), score / 4
    assert nms(boxes, scores, iou_threshold).tolist() == nms_by_hand(boxes, scores, iou_threshold)
    assert batched_nms(boxes, scores, group, iou_threshold).tolist() == nms_by_hand(boxes, scores, iou_threshold, group.tolist())


@pytest.mark.parametrize("dtype, iou_threshold, kept", [
    (torch.float32, 0.3, [0]), (torch.float32, 0.300000033, [0, 1]), (torch.float64, 0.3, [0, 1]),
])
def test_a_threshold_is_not_rounded_to_the_type_of_the_boxes(dtype, iou_threshold, kept):
    boxes = torch.tensor([[0, 0, 6, 1], [3, 0, 10, 1]], dtype=dtype)             # IoU 3/10: in float32 that is 0.300000012
    assert nms(boxes, torch.tensor([0.9, 0.8]), iou_threshold).tolist() == kept


def test_equal_scores_are_settled_by_the_lower_index():
    boxes, _ = random_boxes(300)
    scores = torch.full((300,), 0.5)
    assert nms(boxes, scores, 0.3).tolist() == nms_by_hand(boxes, scores, 0.3)


def test_ten_thousand_copies_of_one_box_leave_one():
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(10_000, 1)
    assert nms(boxes, torch.arange(10_000).float(), 0.5).tolist() == [9999]
    assert batched_nms(boxes, torch.arange(10_000).float(), torch.arange(10_000) % 2, 0.5).tolist() == [9999, 9998]


def test_a_long_chain_of_suppressions_leaves_every_second_box():
    left = torch.arange(3000.0) * 3                                              # each box overlaps its neighbours by 4 / 10
    boxes = torch.stack([left, torch.zeros(3000), left + 7, torch.ones(3000)], 1)
    assert torch.equal(nms(boxes, -left, 0.35), torch.arange(0, 3000, 2))


def test_groups_do_not_suppress_each_other():
    boxes, scores = random_boxes(400)
    groups = torch.arange(400) % 3 - 1                                          # negative group numbers too
    kept = batched_nms(boxes, scores, groups, 0.5)
    expected = [i for group in (-1, 0, 1) for i in (groups == group).nonzero()[:, 0][nms(boxes[groups == group], scores[groups == group],
                                                                                         0.5)].tolist()]
    assert kept.tolist() == sorted(expected, key=lambda i: -scores[i].item())


@pytest.mark.usefixtures("small_steps")
def test_boxes_that_are_empty_or_not_finite_overlap_nothing():
    inf, nan = float("inf"), float("nan")
    odd = torch.tensor([[0.0, 0, inf, 10], [-inf, 0, inf, inf], [nan, 0, 10, 10], [0, 0, 10, nan], [5, 5, 5, 50], [5, 50, 60, 50],
                        [60, 60, 0, 0], [60, 0, 0, 60], [0, 0, 1e30, 1e30], [0, 0, inf, 10]])
    boxes, scores = random_boxes(100, size=60)
    boxes[::10] = odd                                                            # a score of each is better, and one is worse
    kept = nms(boxes, scores, 0.3).tolist()
    assert kept == nms_by_hand(boxes, scores, 0.3)
    assert set(range(0, 100, 10)) <= set(kept)


@pytest.mark.parametrize("far", [1e7, 1e15, 1e18])
@pytest.mark.usefixtures("small_steps")
def test_a_box_far_away_does_not_hide_the_others(far):
    boxes, scores = random_boxes(300, size=300)
    boxes[7] = torch.tensor([far, 0.0, far * 1.001, 40])
    boxes[9] = torch.tensor([-far, 0.0, far, 40])
    for iou_threshold in (0.2, 0.4, 0.6):
        assert nms(boxes, scores, iou_threshold).tolist() == nms_by_hand(boxes, scores, iou_threshold)


def test_boxes_in_units_of_the_image_leave_the_same_indices():
    boxes, scores = random_boxes(700, size=2048.0)
    assert torch.equal(nms(boxes / 4096, scores, 0.4), nms(boxes, scores, 0.4))


@pytest.mark.parametrize("arguments", [(), (torch.zeros(0, dtype=torch.int64),)], ids=["nms", "batched_nms"])
def test_no_boxes_leave_no_indices(arguments):
    function = batched_nms if arguments else nms
    kept = function(torch.zeros(0, 4), torch.zeros(0), *arguments, 0.5)
    assert kept.shape == (0,)
    assert kept.dtype == torch.int64


@pytest.mark.parametrize("arguments, message", [
    ((torch.zeros(3, 5), torch.zeros(3), 0.5), r"boxes must be \[N, 4\], got \[3, 5\]"),
    ((torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3), 0.5), "boxes must be floating-point numbers, got torch.int64"),
    ((torch.zeros(3, 4), torch.zeros(2), 0.5), r"one score a box, got scores \[2\] for boxes \[3, 4\]"),
    ((torch.zeros(3, 4), torch.zeros(3, device="meta"), 0.5), "boxes are on cpu, scores on meta"),
    ((torch.zeros(3, 4), torch.zeros(3), 1.5), r"iou_threshold must lie in \[0, 1\], got 1.5"),
    ((torch.zeros(2, 4), torch.tensor([0.1, float("nan")]), 0.5), "1 scores that are not numbers"),
], ids=["shape", "integers", "scores", "device", "threshold", "nan"])
def test_nms_tells_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        nms(*arguments)
    with pytest.raises(ValueError, match=message):
        batched_nms(*arguments[:2], torch.zeros(len(arguments[0]), dtype=torch.int64), arguments[2])


@pytest.mark.parametrize("idxs, message", [
    (torch.zeros(3), r"idxs must be integers, one a box: \[2\], got \[3\] of torch.float32"),
    (torch.zeros(2, dtype=torch.int64, device="meta"), "boxes are on cpu, idxs on meta"),
], ids=["floats", "device"])
def test_batched_nms_tells_what_is_wrong_with_the_groups(idxs, message):
    with pytest.raises(ValueError, match=message):
        batched_nms(torch.zeros(2, 4), torch.zeros(2), idxs, 0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_nms_takes_every_float_type(dtype):
    boxes, scores = random_boxes(200, size=1000, side=600)                       # areas of more than 65504
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    expected = nms_by_hand(boxes.to(torch.promote_types(dtype, torch.float32)), scores, 0.5)
    assert nms(boxes, scores, 0.5).tolist() == expected
    assert nms(boxes, scores.double(), 0.5).tolist() == expected                 # and mixtures


def test_no_gradient_flows_and_inputs_stay_as_they_are():
    boxes, scores = random_boxes(50)
    kept = nms(boxes.requires_grad_(), scores.requires_grad_(), 0.5)
    assert not kept.requires_grad
    assert torch.equal(boxes.detach(), random_boxes(50)[0])


def test_strided_boxes_leave_the_same_indices():
    boxes, scores = random_boxes(200)
    strided = boxes.t().contiguous().t(), scores.repeat_interleave(2)[::2]
    assert torch.equal(nms(*strided, 0.5), nms(boxes, scores, 0.5))


@pytest.mark.parametrize("groups", [None, torch.arange(50) % 3])
def test_nms_is_one_operator_to_the_compiler(groups):
    boxes, scores = random_boxes(50)
    torch.library.opcheck(torch.ops.visionkit.nms.default, (boxes, scores, groups, 0.5))


def test_nms_compiles_and_exports_with_as_many_indices_as_stay():
    class Best(torch.nn.Module):
        def forward(self, boxes, scores, groups):
            return boxes[nms(boxes, scores, 0.5)] * 2, batched_nms(boxes, scores, groups, 0.5)

    compiled = torch.compile(Best(), fullgraph=True, backend="aot_eager")
    count = torch.export.Dim("count", min=2)
    groups = torch.arange(50) % 3
    exported = torch.export.export(Best(), (*random_boxes(50), groups), dynamic_shapes=({0: count},) * 3).module()
    for seed, number in ((0, 50), (1, 80)):
        boxes, scores = random_boxes(number, seed)
        groups = torch.arange(number) % 3
        expected = Best()(boxes, scores, groups)
        for function in (compiled, exported):
            assert all(torch.equal(*pair) for pair in zip(function(boxes, scores, groups), expected, strict=True))


@pytest.mark.parametrize("iou_threshold", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("make", [lambda: random_boxes(3000, size=600), lambda: crowd(4000, 20), lambda: crowd(4000, 400, size=1500)],
                         ids=["spread", "crowd", "crowds"])
def test_nms_gives_torchvisions_indices(make, iou_threshold):
    peer = pytest.importorskip("torchvision", reason="the peer to compare with is not installed", exc_type=ImportError).ops
    boxes, scores = make()
    assert torch.equal(nms(boxes, scores, iou_threshold), peer.nms(boxes, scores, iou_threshold))
    scores = scores.argsort() / len(scores)                                      # without ties, whose order torchvision leaves open here
    groups = torch.arange(len(boxes)) % 7
    assert torch.equal(batched_nms(boxes, scores, groups, iou_threshold), peer.batched_nms(boxes, scores, groups, iou_threshold))
