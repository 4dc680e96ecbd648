"""Axis-aligned boxes: area, overlap, clipping.

Boxes are [N, 4] as (x1, y1, x2, y2), pixels; x2 and y2 lie outside the box. A box that is turned inside out (x2 < x1 or y2 < y1) is empty
to all measures of overlap. bfloat16 and float16 are measured in float32.
"""
from __future__ import annotations

import torch
from torch import Tensor

_EMPTY = 1e-20              # square units; dividing any side by it is finite in float32


def box_area(boxes: Tensor) -> Tensor:
    """[N] areas of [N, 4] boxes, square pixels, in float32 at least; negative where a box is turned inside out along one axis."""
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Pairwise intersection over union of two box sets.

    Args:
        boxes: [N, 4].
        others: [M, 4], same units.

    Returns:
        [N, M] in [0, 1]; 0 where both boxes are empty, and so is the gradient there.

    Raises:
        ValueError: a box set is not [N, 4] of floating-point numbers, or they are on different devices.
    """
    _check(boxes, others)
    return _iou(*_all_pairs(boxes, others)).to(_common_type(boxes, others))


def elementwise_box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of each box of [N, 4] with the one of [N, 4] `others` in its place: [N]. Otherwise as `box_iou`."""
    _check(boxes, others, elementwise=True)
    return _iou(*_pairs(boxes, others)).to(_common_type(boxes, others))


def generalized_box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Pairwise generalized IoU (Rezatofighi et al. 2019, arXiv:1902.09630): IoU less the share of the hull that neither box covers.

    Args:
        boxes: [N, 4].
        others: [M, 4], same units.

    Returns:
        [N, M] in [-1, 1]; of two empty boxes 0 where their hull is empty too, else -1.

    Raises:
        ValueError: as `box_iou`.
    """
    _check(boxes, others)
    return _generalized_iou(*_all_pairs(boxes, others)).to(_common_type(boxes, others))


def elementwise_generalized_box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalized IoU of each box of [N, 4] with the one of [N, 4] `others` in its place: [N]. Otherwise as `generalized_box_iou`."""
    _check(boxes, others, elementwise=True)
    return _generalized_iou(*_pairs(boxes, others)).to(_common_type(boxes, others))


def clip_boxes(boxes: Tensor, height: float, width: float) -> Tensor:
    """Boxes [..., 4] cut at the borders of an image of `height` x `width` pixels."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)], dim=-1)


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(centre x, centre y, width, height) to (x1, y1, x2, y2), [..., 4] in any unit."""
    center, size = boxes.split(2, -1)
    return torch.cat([center - size / 2, center + size / 2], -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(x1, y1, x2, y2) to (centre x, centre y, width, height), [..., 4] in any unit."""
    top_left, bottom_right = boxes.split(2, -1)
    return torch.cat([(top_left + bottom_right) / 2, bottom_right - top_left], -1)


def _check(boxes: Tensor, others: Tensor, elementwise: bool = False) -> None:
    for name, value in (("boxes", boxes), ("others", others)):
        if value.ndim != 2 or value.shape[1] != 4:
            raise ValueError(f"{name} must be [N, 4], got {list(value.shape)}")
        if not value.is_floating_point():
            raise ValueError(f"{name} must be floating-point numbers, got {value.dtype}; convert them with .float()")
    if boxes.device != others.device:
        raise ValueError(f"boxes are on {boxes.device}, others on {others.device}; move one")
    if elementwise and boxes.shape != others.shape:
        raise ValueError(f"each box needs one other, got {len(boxes)} boxes and {len(others)} others; for all pairs there is the function "
                         f"without 'elementwise'")


def _common_type(boxes: Tensor, others: Tensor) -> torch.dtype:
    return torch.promote_types(boxes.dtype, others.dtype)


Sides = tuple[Tensor, Tensor, Tensor, Tensor]           # x1, y1, x2, y2 with x2 >= x1 and y2 >= y1


def _pairs(boxes: Tensor, others: Tensor) -> tuple[Sides, Sides]:
    """Sides [N] and [N], in the type to measure in."""
    dtype = torch.promote_types(_common_type(boxes, others), torch.float32)
    return _sides(boxes.to(dtype)), _sides(others.to(dtype))


def _all_pairs(boxes: Tensor, others: Tensor) -> tuple[Sides, Sides]:
    """Sides [N, 1] and [M], the latter contiguous: they are read N times."""
    return _pairs(boxes[:, None], others.t().contiguous().t())


def _sides(boxes: Tensor) -> Sides:
    x1, y1, x2, y2 = boxes.unbind(-1)
    return x1, y1, torch.maximum(x1, x2), torch.maximum(y1, y2)


# One side at a time, and in place: [N, M, 2] temporaries take three times as long.


def _iou(boxes: Sides, others: Sides) -> Tensor:
    intersection, union = _intersection_and_union(boxes, others)
    return intersection.div_(_divisor(union))


def _generalized_iou(boxes: Sides, others: Sides) -> Tensor:
    intersection, union = _intersection_and_union(boxes, others)
    hull = torch.maximum(boxes[2], others[2]).sub_(torch.minimum(boxes[0], others[0]))
    hull = hull.mul_(torch.maximum(boxes[3], others[3]).sub_(torch.minimum(boxes[1], others[1])))
    uncovered = torch.sub(hull, union).div_(_divisor(hull))
    return intersection.div_(_divisor(union)).sub_(uncovered)


def _intersection_and_union(boxes: Sides, others: Sides) -> tuple[Tensor, Tensor]:
    width = torch.minimum(boxes[2], others[2]).sub_(torch.maximum(boxes[0], others[0])).clamp_(min=0)
    height = torch.minimum(boxes[3], others[3]).sub_(torch.maximum(boxes[1], others[1])).clamp_(min=0)
    intersection = width.mul_(height)
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (boxes, others)]
    return intersection, torch.add(*areas).sub_(intersection)


def _divisor(area: Tensor) -> Tensor:
    """`area`, safe to divide by where it is 0."""
    if not area.requires_grad:
        return area.clamp_(min=_EMPTY)                  # comparing takes as long as all the rest
    return torch.where(area > _EMPTY, area, 1.0)
