import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visionkit.ops import box_area, box_iou, clip_boxes


@pytest.mark.parametrize("other, iou", [((0, 0, 4, 4), 1.0), ((2, 0, 6, 4), 1 / 3), ((4, 0, 8, 4), 0.0), ((1, 1, 3, 3), 1 / 4)],
                         ids=["same", "half over", "touching", "inside"])
def test_box_iou_known_values(other, iou):
    box = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    assert box_iou(box, torch.tensor([other]).float()).item() == pytest.approx(iou)


def test_two_empty_boxes_overlap_by_nothing():
    empty = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    assert box_iou(empty, empty).item() == 0.0


def test_box_iou_of_no_boxes_is_an_empty_matrix():
    assert box_iou(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0, 3)


def test_box_iou_tells_what_shape_it_wants():
    with pytest.raises(ValueError, match=r"others must be \[N, 4\], got \[4\]"):
        box_iou(torch.zeros(1, 4), torch.zeros(4))


@given(st.lists(st.tuples(*[st.floats(0, 100, width=32)] * 4), min_size=1, max_size=6))
def test_box_iou_is_symmetric_and_within_0_and_1(corners):
    boxes = torch.tensor(corners)
    boxes = torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])], 1)
    iou = box_iou(boxes, boxes)
    assert torch.equal(iou, iou.t())
    assert ((iou >= 0) & (iou <= 1)).all()


def test_box_area_and_clipping_known_values():
    boxes = torch.tensor([[-5.0, 2.0, 30.0, 12.0]])
    clipped = clip_boxes(boxes, height=10, width=20)
    assert clipped.tolist() == [[0, 2, 20, 10]]
    assert box_area(clipped).tolist() == [160]
