import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visionkit.ops import (
    box_area,
    box_iou,
    clip_boxes,
    cxcywh_to_xyxy,
    elementwise_box_iou,
    elementwise_generalized_box_iou,
    generalized_box_iou,
    xyxy_to_cxcywh,
)

PAIRWISE = [box_iou, generalized_box_iou]
ELEMENTWISE = [elementwise_box_iou, elementwise_generalized_box_iou]
EMPTY_BOXES = [[1, 1, 1, 1], [1, 1, 1, 5], [2, 3, 6, 3], [1, 1, 1, 1], [5, 4, 2, 3], [8, 1, 3, 6]]      # points, lines, inside out


def random_boxes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    top_left = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 30
    return torch.cat([top_left, top_left + 1 + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 20], 1)


def iou_by_hand(box: list[float], other: list[float]) -> tuple[float, float]:
    """IoU and generalized IoU of two boxes that are not empty."""
    def length(start: float, end: float) -> float:
        return max(end - start, 0.0)

    intersection = length(max(box[0], other[0]), min(box[2], other[2])) * length(max(box[1], other[1]), min(box[3], other[3]))
    union = sum(length(x1, x2) * length(y1, y2) for x1, y1, x2, y2 in (box, other)) - intersection
    hull = length(min(box[0], other[0]), max(box[2], other[2])) * length(min(box[1], other[1]), max(box[3], other[3]))
    return intersection / union, intersection / union - (hull - union) / hull


@pytest.mark.parametrize("other, iou, generalized", [
    ((0, 0, 4, 4), 1, 1), ((2, 0, 6, 4), 1 / 3, 1 / 3), ((4, 0, 8, 4), 0, 0), ((1, 1, 3, 3), 1 / 4, 1 / 4), ((4, 4, 8, 8), 0, -1 / 2),
    ((8, 0, 12, 4), 0, -1 / 3), ((2, 2, 2, 2), 0, 0), ((8, 0, 8, 4), 0, -1 / 2),
], ids=["same", "half over", "touching", "inside", "corners touch", "apart", "a point inside", "a line apart"])
def test_known_overlaps_of_a_square(other, iou, generalized):
    boxes, others = torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([other]).float()
    for function in (box_iou, elementwise_box_iou):
        assert function(boxes, others).item() == pytest.approx(iou)
    for function in (generalized_box_iou, elementwise_generalized_box_iou):
        assert function(boxes, others).item() == pytest.approx(generalized)


def test_all_pairs_agree_with_the_definition():
    boxes, others = random_boxes(20), random_boxes(30, seed=1)
    expected = torch.tensor([[iou_by_hand(box, other) for other in others.tolist()] for box in boxes.tolist()], dtype=torch.float64)
    torch.testing.assert_close(box_iou(boxes, others), expected[..., 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(generalized_box_iou(boxes, others), expected[..., 1], rtol=0, atol=1e-12)


def test_elementwise_is_the_diagonal_of_all_pairs():
    boxes, others = random_boxes(20), random_boxes(20, seed=1)
    for pairwise, elementwise in zip(PAIRWISE, ELEMENTWISE, strict=True):
        assert torch.equal(elementwise(boxes, others), pairwise(boxes, others).diagonal())


@pytest.mark.parametrize("function", PAIRWISE + ELEMENTWISE)
def test_empty_boxes_give_no_nan_and_no_infinite_gradient(function):
    boxes = torch.tensor(EMPTY_BOXES + [[0.0, 0, 10, 10]], requires_grad=True)
    others = boxes.detach().clone().requires_grad_()
    overlap = function(boxes, others)
    overlap.sum().backward()
    assert torch.equal(overlap.detach(), function(boxes.detach(), others.detach()))
    assert (overlap.abs() <= 1).all()
    assert max(boxes.grad.abs().max(), others.grad.abs().max()) < 100


def test_two_empty_boxes_overlap_by_nothing():
    empty = torch.tensor(EMPTY_BOXES).float()
    assert not box_iou(empty, empty).any()
    generalized = generalized_box_iou(empty, empty)
    assert generalized[0, 3] == 0                                            # the same point
    assert generalized[0, 2] == -1                                           # a hull of which they cover nothing


def test_a_flat_box_in_a_large_one_is_pulled_open():
    flat = torch.tensor([[4.0, 2, 4, 6]], requires_grad=True)
    elementwise_generalized_box_iou(flat, torch.tensor([[0.0, 0, 10, 10]])).sum().backward()
    assert flat.grad[0, 0] < 0 < flat.grad[0, 2]


@pytest.mark.parametrize("function", PAIRWISE)
def test_no_boxes_make_an_empty_matrix(function):
    boxes = torch.zeros(0, 4, requires_grad=True)
    overlap = function(boxes, torch.zeros(3, 4))
    assert overlap.shape == (0, 3)
    overlap.sum().backward()
    assert boxes.grad.shape == (0, 4)
    assert function(torch.zeros(3, 4), torch.zeros(0, 4)).shape == (3, 0)


@pytest.mark.parametrize("function", ELEMENTWISE)
def test_no_boxes_have_no_overlaps(function):
    assert function(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


@pytest.mark.parametrize("function", PAIRWISE + ELEMENTWISE)
def test_gradients_are_true(function):
    boxes, others = random_boxes(4).requires_grad_(), random_boxes(4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(function, (boxes, others))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", PAIRWISE + ELEMENTWISE)
def test_half_precision_is_measured_in_float32(function, dtype):
    boxes, others = (random_boxes(5, seed).mul(40).to(dtype) for seed in (0, 1))                 # areas of more than 65504
    assert torch.equal(function(boxes, others), function(boxes.float(), others.float()).to(dtype))


def test_mixed_types_take_the_wider_one():
    boxes = random_boxes(3)
    assert box_iou(boxes.half(), boxes.float()).dtype == torch.float32
    assert elementwise_generalized_box_iou(boxes, boxes.bfloat16()).dtype == torch.float64


@pytest.mark.parametrize("function", PAIRWISE + ELEMENTWISE)
def test_overlaps_do_not_depend_on_the_unit(function):
    boxes, others = random_boxes(5).float(), random_boxes(5, seed=1).float()
    expected = function(boxes, others)
    torch.testing.assert_close(function(boxes * 2**-14, others * 2**-14), expected)
    torch.testing.assert_close(function((boxes * 2**-14).requires_grad_(), others * 2**-14), expected)


def test_areas_of_half_precision_boxes_do_not_overflow():
    assert box_area(torch.tensor([[0, 0, 1000, 1000]], dtype=torch.float16)).tolist() == [1e6]


@pytest.mark.parametrize("function", PAIRWISE + ELEMENTWISE)
def test_strided_boxes_give_the_same_numbers_and_stay_as_they_are(function):
    boxes, others = random_boxes(6), random_boxes(6, seed=1)
    strided, kept = boxes.t().contiguous().t(), others.clone()
    assert torch.equal(function(strided, others.repeat_interleave(2, 1)[:, ::2]), function(boxes, others))
    assert torch.equal(others, kept)
    assert torch.equal(strided, boxes)


@pytest.mark.parametrize("arguments, message", [
    ((torch.zeros(1, 4), torch.zeros(4)), r"others must be \[N, 4\], got \[4\]"),
    ((torch.zeros(1, 5), torch.zeros(1, 4)), r"boxes must be \[N, 4\], got \[1, 5\]"),
    ((torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.int64)), "others must be floating-point numbers, got torch.int64"),
    ((torch.zeros(1, 4), torch.zeros(1, 4, device="meta")), "boxes are on cpu, others on meta"),
], ids=["one box", "five numbers", "integers", "device"])
@pytest.mark.parametrize("function", PAIRWISE + ELEMENTWISE)
def test_overlaps_tell_what_is_wrong(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.parametrize("function", ELEMENTWISE)
def test_elementwise_overlaps_want_as_many_others(function):
    with pytest.raises(ValueError, match="each box needs one other, got 2 boxes and 3 others"):
        function(torch.zeros(2, 4), torch.zeros(3, 4))


@given(st.lists(st.tuples(*[st.floats(0, 100, width=32)] * 4), min_size=1, max_size=6))
def test_overlaps_are_symmetric_and_within_bounds(corners):
    boxes = torch.tensor(corners)
    boxes = torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])], 1)
    iou, generalized = box_iou(boxes, boxes), generalized_box_iou(boxes, boxes)
    assert torch.equal(iou, iou.t())
    assert ((iou >= 0) & (iou <= 1)).all()
    assert (generalized <= iou + 1e-6).all()
    assert (generalized >= -1).all()


@pytest.mark.parametrize("function", PAIRWISE + ELEMENTWISE)
def test_overlaps_compile_and_export_as_one_graph(function):
    def loss(boxes, others):
        return (1 - function(boxes, others)).sum()

    boxes, others = random_boxes(5).requires_grad_(), random_boxes(5, seed=1)
    expected = loss(boxes, others)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(boxes, others)
    assert torch.equal(compiled, expected)
    for gradient, wanted in zip(torch.autograd.grad(compiled, boxes), torch.autograd.grad(expected, boxes), strict=True):
        torch.testing.assert_close(gradient, wanted)

    class Overlap(torch.nn.Module):
        def forward(self, boxes, others):
            return function(boxes, others)

    count = torch.export.Dim("count", min=2)
    program = torch.export.export(Overlap(), (boxes.detach(), others), dynamic_shapes=({0: count}, {0: count}))
    more, others = random_boxes(9, seed=2), random_boxes(9, seed=3)
    torch.testing.assert_close(program.module()(more, others), function(more, others))


@pytest.mark.parametrize("function", PAIRWISE)
def test_overlaps_are_torchvisions(function):
    peer = getattr(pytest.importorskip("torchvision", reason="the peer to compare with is not installed", exc_type=ImportError).ops,
                   function.__name__)
    boxes, others = random_boxes(40).requires_grad_(), random_boxes(50, seed=1).requires_grad_()
    ours, theirs = function(boxes, others), peer(boxes, others)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    weights = torch.randn(40, 50, dtype=torch.float64)
    for gradient, wanted in zip(torch.autograd.grad((ours * weights).sum(), (boxes, others)),
                                torch.autograd.grad((theirs * weights).sum(), (boxes, others)), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-10)


def test_box_area_and_clipping_known_values():
    boxes = torch.tensor([[-5.0, 2.0, 30.0, 12.0]])
    clipped = clip_boxes(boxes, height=10, width=20)
    assert clipped.tolist() == [[0, 2, 20, 10]]
    assert box_area(clipped).tolist() == [160]


def test_centre_form_and_corner_form_are_the_same_box():
    corners = torch.tensor([[[10.0, 20, 50, 40], [0, 0, 0, 6]]])
    assert xyxy_to_cxcywh(corners).tolist() == [[[30, 30, 40, 20], [0, 3, 0, 6]]]
    assert torch.equal(cxcywh_to_xyxy(xyxy_to_cxcywh(corners)), corners)
