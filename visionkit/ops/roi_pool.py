"""RoI pooling (Girshick 2015, Fast R-CNN, arXiv:1504.08083, sec. 2.1): the maximum over the whole pixels of each bin.

Bins are taken in blocks that stay in the cache, those with equally many pixels together: the first pixel of all of them, the second, and so
on, each a gather of table rows and a maximum.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from visionkit.ops.rois import as_rois, grid_size, round_half_away, sound_rois
from visionkit.ops.weighted_gather import as_table, index_dtype
from visionkit.registry import OPS

# B images, C channels, R RoIs, P x Q bins, n = R * P * Q, m bins of a block

_BLOCK_BYTES = 1 << 20      # of what a block of bins has in hand at once, times three: stays in the cache
_STEPS = 16                 # pixels of each bin whose indices are computed at once


def roi_pool(input: Tensor, boxes: Tensor | list[Tensor], output_size: int | tuple[int, int], spatial_scale: float = 1.0) -> Tensor:
    """Maximum in each bin of a grid over each region of interest.

    Args:
        input: [B, C, H, W].
        boxes: [R, 5] as (image index, x1, y1, x2, y2) or one [R_i, 4] an image; input pixels divided by `spatial_scale`. Their scaled
            corners are rounded, and the lower right pixel is inside.
        output_size: (P, Q) rows and columns of bins.
        spatial_scale: feature pixels an image pixel, 1 / stride.

    Returns:
        [R, C, P, Q] in the dtype of `input` and channels-last memory, as of `roi_align`; 0 for bins that cover no pixel, NaN for boxes that
        are not finite. Bins may overlap by a pixel. The gradient goes to the first of several equal maxima, row by row.

    Raises:
        ValueError: wrong shapes, devices, output size or image indices.
    """
    rois = as_rois("roi_pool", input, boxes)
    return torch.ops.visionkit.roi_pool(input, rois, *grid_size(output_size), spatial_scale)


@OPS.register_module()
class RoIPool(nn.Module):
    """`roi_pool` with its settings kept."""

    def __init__(self, output_size: int | tuple[int, int], spatial_scale: float = 1.0) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale

    def forward(self, input: Tensor, boxes: Tensor | list[Tensor]) -> Tensor:
        return roi_pool(input, boxes, self.output_size, self.spatial_scale)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"


@torch.library.custom_op("visionkit::roi_pool", mutates_args=())
def _roi_pool(input: Tensor, rois: Tensor, rows: int, columns: int, spatial_scale: float) -> Tensor:
    table = as_table(input)
    rois = sound_rois(rois.to(table.dtype), len(input))
    bins = Bins.of(rois, input.shape, rows, columns, spatial_scale)
    output = table.new_empty(len(bins.order), table.shape[1])
    output.index_fill_(0, bins.order[:bins.empty], 0)
    for block in bins.blocks(table[:1].nbytes):
        pixels = bins.pixels(block)
        maxima = table.index_select(0, next(pixels))
        for pixel in pixels:
            torch.maximum(maxima, table.index_select(0, pixel), out=maxima)
        output.index_copy_(0, bins.order[bins.empty:][block], maxima)
    output = output.view(len(rois), rows, columns, table.shape[1])
    output.index_fill_(0, rois[:, 1].isnan().nonzero()[:, 0], torch.nan)
    return output.to(input.dtype).permute(0, 3, 1, 2)


@_roi_pool.register_fake
def _(input, rois, rows, columns, spatial_scale):
    return input.new_empty(rois.shape[0], rows, columns, input.shape[1]).permute(0, 3, 1, 2)


@torch.library.custom_op("visionkit::roi_pool_backward", mutates_args=())
def _roi_pool_backward(grad: Tensor, input: Tensor, rois: Tensor, spatial_scale: float) -> Tensor:
    batch, channels, height, width = input.shape
    table, cells = as_table(input), as_table(grad)                          # [B * H * W, C], [n, C]
    bins = Bins.of(sound_rois(rois.to(table.dtype), batch), input.shape, *grad.shape[2:], spatial_scale)
    total = torch.zeros_like(table)
    exact = torch.float32 if len(table) < 1 << 24 else torch.float64        # holds every row number
    for block in bins.blocks(table[:1].nbytes):
        pixels = bins.pixels(block)
        first = next(pixels)
        maxima = table.index_select(0, first)
        row = first.to(exact)[:, None].repeat(1, channels)                  # [m, C] of the first pixel that has the maximum
        better = torch.empty_like(row)
        for pixel in pixels:
            values = table.index_select(0, pixel)
            torch.gt(values, maxima, out=better)
            row.lerp_(pixel.to(exact)[:, None], better)                     # chooses in a tenth of the time of `torch.where`
            torch.maximum(maxima, values, out=maxima)
        total.scatter_add_(0, row.long(), cells.index_select(0, bins.order[bins.empty:][block]))
    return total.to(grad.dtype).view(batch, height, width, channels).permute(0, 3, 1, 2)


@_roi_pool_backward.register_fake
def _(grad, input, rois, spatial_scale):
    batch, channels, height, width = input.shape
    return grad.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)


def _save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    input, rois, _, _, ctx.spatial_scale = inputs
    ctx.save_for_backward(input, rois)


def _backward(ctx, grad: Tensor) -> tuple:
    return torch.ops.visionkit.roi_pool_backward(grad, *ctx.saved_tensors, ctx.spatial_scale), *[None] * 4


_roi_pool.register_autograd(_backward, setup_context=_save_for_backward)


class Bins(NamedTuple):
    """The pixels that bins cover, as rows of the table. Bins with equally many come together."""

    order: Tensor       # [n] where bins stand in the order [R, P, Q], by ascending number of pixels
    empty: int          # so many have none; of each of the others:
    first: Tensor       # its first pixel
    count: Tensor       # its pixels
    wide: Tensor        # pixels in a row of it
    width: int          # of the map

    @classmethod
    def of(cls, rois: Tensor, shape: torch.Size, rows: int, columns: int, spatial_scale: float) -> Bins:
        batch, _, height, width = shape
        index = index_dtype(batch * height * width)
        top, tall = (value.to(index)[:, :, None] for value in _edges(rois[:, 2] * spatial_scale, rois[:, 4] * spatial_scale, rows, height))
        left, wide = (value.to(index)[:, None] for value in _edges(rois[:, 1] * spatial_scale, rois[:, 3] * spatial_scale, columns, width))
        first = (rois[:, 0].to(index)[:, None, None] * height + top) * width + left             # [R, P, Q]
        count, order = (tall * wide).flatten().sort(stable=True)
        empty = int((count == 0).sum())
        first, wide = (value.flatten().index_select(0, order[empty:]) for value in (first, wide.expand(-1, rows, -1)))
        return cls(order, empty, first, count[empty:], wide, width)

    def blocks(self, row_bytes: int) -> Iterator[slice]:
        """Blocks of the bins that are not empty."""
        size = max(_BLOCK_BYTES // max(row_bytes, 1), 1)
        return (slice(start, start + size) for start in range(0, len(self.first), size))

    def pixels(self, block: slice) -> Iterator[Tensor]:
        """[m] the first pixel of each bin of the block, the second, and so on; a bin that has no more repeats its last."""
        first, count, wide = self.first[block], self.count[block], self.wide[block]
        most = int(count[-1])
        for start in range(0, most, _STEPS):
            step = torch.arange(start, min(start + _STEPS, most), dtype=count.dtype, device=count.device)[:, None].minimum(count - 1)
            yield from (first + step + step // wide * (self.width - wide)).unbind(0)


def _edges(low: Tensor, high: Tensor, bins: int, size: int) -> tuple[Tensor, Tensor]:
    """First pixel of each bin along an axis, and pixels in it, [R, bins], from the corners [R] of the RoIs, feature pixels."""
    low, high = round_half_away(low), round_half_away(high)
    bin_length = ((high - low + 1).clamp(min=1) / bins)[:, None]            # the lower right pixel is inside
    step = torch.arange(bins, dtype=low.dtype, device=low.device)
    first, last = (step * bin_length).floor() + low[:, None], ((step + 1) * bin_length).ceil() + low[:, None]
    first, last = (edge.clamp(0, size).nan_to_num(0) for edge in (first, last))
    return first, last - first
