"""Regions of interest: the forms they come in, what every RoI op asks of them, and how the older ones round them."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def as_rois(op: str, input: Tensor, boxes: Tensor | list[Tensor]) -> Tensor:
    """The regions that `op` is to pool from `input`, in one form.

    Args:
        op: name of the op, for messages.
        input: [B, C, H, W].
        boxes: [R, 5] as (image index, x1, y1, x2, y2) or one [R_i, 4] an image.

    Returns:
        [R, 5].

    Raises:
        ValueError: wrong shapes, or boxes on another device.
    """
    if input.ndim != 4:
        raise ValueError(f"{op} needs an input [B, C, H, W], got {list(input.shape)}")
    rois = boxes if isinstance(boxes, Tensor) else boxes_to_rois(boxes)
    if rois.ndim != 2 or rois.shape[1] != 5:
        raise ValueError(f"{op} needs boxes [R, 5] as (image index, x1, y1, x2, y2) or a list of [R_i, 4], got {list(rois.shape)}")
    if rois.device != input.device:
        raise ValueError(f"input is on {input.device}, boxes on {rois.device}; move one")
    return rois


def boxes_to_rois(boxes: list[Tensor]) -> Tensor:
    """[R, 5] RoIs (image index, x1, y1, x2, y2) of the boxes [R_i, 4] of each image."""
    for index, value in enumerate(boxes):
        if value.ndim != 2 or value.shape[1] != 4:
            raise ValueError(f"the boxes of image {index} must be [R, 4], got {list(value.shape)}")
    return torch.cat([F.pad(value, (1, 0), value=index) for index, value in enumerate(boxes)])


def grid_size(output_size: int | tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the grid over each region."""
    rows, columns = (output_size, output_size) if isinstance(output_size, int) else output_size
    if rows < 1 or columns < 1:
        raise ValueError(f"output_size must be positive, got {(rows, columns)}")
    return rows, columns


def sound_rois(rois: Tensor, batch: int) -> Tensor:
    """The RoIs with NaN in place of boxes that are not finite. Called inside of operators, where values may be looked at.

    Raises:
        ValueError: an image index outside of the batch; on a GPU, where looking would make it wait, such a box becomes NaN too.
    """
    image = rois[:, 0]
    if rois.device.type == "cpu" and len(rois) and not (image.min() >= 0 and image.max() < batch):
        raise ValueError(f"boxes name images {image.min().item():g} to {image.max().item():g} of a batch of {batch}")
    sound = rois.isfinite().all(1) & (image >= 0) & (image < batch)
    return torch.cat([image.where(sound, 0)[:, None], rois[:, 1:].where(sound[:, None], torch.nan)], 1)


def round_half_away(values: Tensor) -> Tensor:
    """The nearest whole numbers; halves away from 0 as C's `round`, where `torch.round` takes the even neighbour."""
    whole = values.trunc()
    return whole + ((values - whole) * 2).trunc()
