"""Bilinear samples of maps that are zero outside, as bags of four table rows.

The table has a border of one pixel of zeros, so a sample needs no case for the borders: it fades out over the pixel around the map, and
what lies further out is drawn back to where it is 0. The gradient of the table needs one sort of the samples, by the cell they lie in,
instead of one of all their corners: each corner of a cell collects its share in that order.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# B images, C channels, H x W pixels, n samples


def padded_table(input: Tensor) -> Tensor:
    """Maps [B, C, H, W] as [B, H + 2, W + 2, C] with zeros around, float32 at least."""
    batch, channels, height, width = input.shape
    table = input.new_zeros(batch, height + 2, width + 2, channels, dtype=torch.promote_types(input.dtype, torch.float32))
    table[:, 1:-1, 1:-1] = input.permute(0, 2, 3, 1)
    return table


def axis_cells(where: Tensor, size: int | Tensor) -> tuple[Tensor, Tensor]:
    """The cell that each position lies in along one axis, and how far into it.

    Args:
        where: positions in pixels, 0 being the centre of the first one.
        size: pixels along the axis, H or W; of each position if the maps differ.

    Returns:
        Index of the cell's lower pixel in the padded map, int32 in [0, size], and the weight in [0, 1] of the upper one. Positions that are
        not numbers lie in cell 0 with a weight that is not a number.
    """
    size = torch.as_tensor(size, dtype=where.dtype, device=where.device)
    where = where.clamp(min=-1).minimum(size)
    low = where.floor().minimum(size - 1)
    return low.nan_to_num_(-1).to(torch.int32) + 1, where - low


def corner_weights(upper_y: Tensor, upper_x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of the top left, top right, bottom left and bottom right pixel of each sample's cell, times `scale`."""
    bottom = upper_y if scale is None else upper_y * scale
    top = 1 - upper_y if scale is None else scale - bottom
    bottom_right, top_right = bottom * upper_x, top * upper_x
    return top - top_right, top_right, bottom - bottom_right, bottom_right


def moves(low: Tensor, upper: Tensor) -> Tensor:
    """Whether a sample changes as it moves along the axis, given its cell and weight: not where it was drawn back from further out."""
    return (upper < 1) & ((low > 0) | (upper > 0))


def sample_and_slopes(corners: Tensor, upper_y: Tensor, upper_x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Samples and their derivatives along y and x, from the values [..., 4] at the corners of their cells."""
    top_left, top_right, bottom_left, bottom_right = corners.unbind(-1)
    top, bottom = torch.lerp(top_left, top_right, upper_x), torch.lerp(bottom_left, bottom_right, upper_x)
    slope_x = torch.lerp(top_right - top_left, bottom_right - bottom_left, upper_y)
    return torch.lerp(top, bottom, upper_y), bottom - top, slope_x


def scatter_corners(cells: Tensor, weights: Sequence[Tensor], steps: Sequence[int], grads: Tensor, total: Tensor) -> None:
    """Add to `total` [T, C], the gradient of a table, what the samples give back to the corners of their cells.

    Args:
        cells: [n] int32, the table row of each sample's first corner.
        weights: of each corner, [n].
        steps: rows from the first corner to each.
        grads: [n, C] gradients of the samples, or one of m * K samples where `weights` come K to a row: [m, C].
        total: is added to.
    """
    if not len(cells):
        return
    first, last = (int(value) for value in cells.aminmax())
    order = (cells - first).argsort(stable=True)
    starts = F.pad(torch.bincount(cells - first, minlength=last - first + 1).cumsum(0, dtype=cells.dtype), (1, 0))[:-1]
    row = order.to(cells.dtype)
    if len(grads) < len(cells):
        row = row.div_(len(cells) // len(grads), rounding_mode="floor")
    for weight, step in zip(weights, steps, strict=True):
        share = F.embedding_bag(row, grads, starts, mode="sum", per_sample_weights=weight.flatten().index_select(0, order))
        total[first + step:last + step + 1] += share
