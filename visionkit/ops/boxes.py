"""Axis-aligned boxes: area, overlap, clipping.

Boxes are [N, 4] as (x1, y1, x2, y2), pixels; x2 and y2 lie outside the box.
"""
from __future__ import annotations

import torch
from torch import Tensor


def box_area(boxes: Tensor) -> Tensor:
    """[N] areas of [N, 4] boxes, square pixels; negative where a box is turned inside out along one axis."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Pairwise intersection over union of two box sets.

    Args:
        boxes: [N, 4].
        others: [M, 4], same units.

    Returns:
        [N, M] in [0, 1]; 0 where both boxes are empty.

    Raises:
        ValueError: a box set is not [N, 4].
    """
    for name, value in (("boxes", boxes), ("others", others)):
        if value.ndim != 2 or value.shape[1] != 4:
            raise ValueError(f"{name} must be [N, 4], got {list(value.shape)}")
    intersection = _intersection(boxes, others)
    union = box_area(boxes)[:, None] + box_area(others) - intersection
    return torch.where(union > 0, intersection / union, 0.0)


def _intersection(boxes: Tensor, others: Tensor) -> Tensor:
    """[N, M] intersection areas, square pixels. One side at a time: [N, M, 2] temporaries are twice as slow."""
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
    u1, v1, u2, v2 = others.unbind(1)
    width = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp_(min=0)
    height = (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp_(min=0)
    return width.mul_(height)


def clip_boxes(boxes: Tensor, height: float, width: float) -> Tensor:
    """Boxes [..., 4] cut at the borders of an image of `height` x `width` pixels."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)], dim=-1)
