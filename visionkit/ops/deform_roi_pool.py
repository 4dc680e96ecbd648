"""Deformable RoI pooling (Dai et al. 2017, Deformable ConvNets, arXiv:1703.06211, sec. 2.2), plain and position-sensitive.

Each bin of a region is the mean of a grid of bilinear samples, and moves as a whole by an offset that is learned, in units of the region's
size. Samples of a bin lie closer than pixels more often than not, so each bin is a weighted gather over its window (`windows.py`), and the
gradient of its offset needs one dot product for each pixel of the window, not for each corner of each sample.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from visionkit.ops.rois import as_rois, grid_size, round_half_away, sound_rois
from visionkit.ops.score_maps import ScoreMapTable, check_score_maps
from visionkit.ops.tiers import kernels
from visionkit.ops.weighted_gather import as_table, gather, gather_transposed, gather_weights_gradient, index_dtype
from visionkit.ops.windows import AxisWindows, Crossing, axis_windows, cross
from visionkit.registry import OPS

# B images, R RoIs, P x Q bins, S x S samples a bin, D output channels in N classes that move each with offsets of its own

_BLOCK_UNITS = 1 << 17      # a unit, a class in a bin, takes about a kilobyte while its reads are worked out


def deform_roi_pool(input: Tensor, boxes: Tensor | list[Tensor], offset: Tensor | None, output_size: int | tuple[int, int],
                    spatial_scale: float = 1.0, sampling_ratio: int = 4, gamma: float = 0.1) -> Tensor:
    """Mean of bilinear samples in each bin of a grid over each region of interest, bins displaced by `offset`.

    Args:
        input: [B, C, H, W].
        boxes: [R, 5] as (image index, x1, y1, x2, y2) or one [R_i, 4] an image; input pixels divided by `spatial_scale`. They are rounded,
            and the lower right pixel is inside, as in the authors' code.
        offset: [R, 2, P, Q], (dx, dy) of each bin times 1 / `gamma` of its region's size; x first, where `deform_conv2d` has y first.
            None moves nothing.
        output_size: (P, Q) rows and columns of bins.
        spatial_scale: feature pixels an image pixel, 1 / stride.
        sampling_ratio: samples a bin along each axis; the first lies on the bin's edge, as in the authors' code.
        gamma: displacement of an offset of 1, as a part of the region's size.

    Returns:
        [R, C, P, Q] in the dtype of `input` and channels-last memory, as of `roi_align`. Samples over half a pixel outside the outermost
        pixel centres are left out of the mean; bins without samples are 0, and boxes that are not finite give NaN.

    Raises:
        ValueError: wrong shapes, devices, output size, sampling ratio or image indices.
    """
    rois, rows, columns = _check("deform_roi_pool", input, boxes, offset, output_size, sampling_ratio)
    if offset is not None and offset.shape[1] != 2:
        raise ValueError(f"deform_roi_pool needs offset [R, 2, P, Q], got {list(offset.shape)}; offsets for each class are for "
                         f"deform_ps_roi_pool")
    return torch.ops.visionkit.deform_roi_pool(input, rois, offset, rows, columns, spatial_scale, sampling_ratio, gamma, False)


def deform_ps_roi_pool(input: Tensor, boxes: Tensor | list[Tensor], offset: Tensor | None, output_size: int | tuple[int, int],
                       spatial_scale: float = 1.0, sampling_ratio: int = 4, gamma: float = 0.1) -> Tensor:
    """`deform_roi_pool` of position-sensitive score maps: each bin has maps of its own, and classes may move differently.

    Args:
        input: [B, D * P * Q, H, W] score maps; output channel c of bin (i, j) is channel (c * P + i) * Q + j, as in `ps_roi_pool`.
        boxes, output_size, spatial_scale, sampling_ratio, gamma: as in `deform_roi_pool`.
        offset: [R, 2 * N, P, Q], (dx, dy) of each of N classes, the n-th of which moves the n-th of N blocks of output channels; or None.

    Returns:
        [R, D, P, Q], otherwise as `deform_roi_pool`.

    Raises:
        ValueError: as `deform_roi_pool`, and channels that are no multiple of P * Q or of N.
    """
    rois, rows, columns = _check("deform_ps_roi_pool", input, boxes, offset, output_size, sampling_ratio)
    check_score_maps("deform_ps_roi_pool", input, rows, columns)
    channels = input.shape[1] // (rows * columns)
    if offset is not None and (offset.shape[1] % 2 or not offset.shape[1] or channels % (offset.shape[1] // 2)):
        raise ValueError(f"offset must have 2 * N channels with an N that divides the {channels} output channels, got {offset.shape[1]}")
    return torch.ops.visionkit.deform_roi_pool(input, rois, offset, rows, columns, spatial_scale, sampling_ratio, gamma, True)


def _check(op: str, input: Tensor, boxes: Tensor | list[Tensor], offset: Tensor | None, output_size: int | tuple[int, int],
           sampling_ratio: int) -> tuple[Tensor, int, int]:
    rois = as_rois(op, input, boxes)
    rows, columns = grid_size(output_size)
    if sampling_ratio < 1:
        raise ValueError(f"sampling_ratio must be positive, got {sampling_ratio}")
    if offset is not None:
        if offset.ndim != 4 or (offset.shape[0], *offset.shape[2:]) != (len(rois), rows, columns):
            raise ValueError(f"{op} needs offset [{len(rois)}, 2 * N, {rows}, {columns}] for these boxes and output_size, got "
                             f"{list(offset.shape)}")
        if offset.device != input.device:
            raise ValueError(f"input is on {input.device}, offset on {offset.device}; move one")
    return rois, rows, columns


@OPS.register_module()
class DeformRoIPool(nn.Module):
    """`deform_roi_pool` with its settings kept."""

    def __init__(self, output_size: int | tuple[int, int], spatial_scale: float = 1.0, sampling_ratio: int = 4, gamma: float = 0.1) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.gamma = gamma

    def forward(self, input: Tensor, boxes: Tensor | list[Tensor], offset: Tensor | None = None) -> Tensor:
        return deform_roi_pool(input, boxes, offset, self.output_size, self.spatial_scale, self.sampling_ratio, self.gamma)

    def extra_repr(self) -> str:
        return (f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, sampling_ratio={self.sampling_ratio}, "
                f"gamma={self.gamma}")


@OPS.register_module()
class DeformPSRoIPool(DeformRoIPool):
    """`deform_ps_roi_pool` with its settings kept."""

    def forward(self, input: Tensor, boxes: Tensor | list[Tensor], offset: Tensor | None = None) -> Tensor:
        return deform_ps_roi_pool(input, boxes, offset, self.output_size, self.spatial_scale, self.sampling_ratio, self.gamma)


@torch.library.custom_op("visionkit::deform_roi_pool", mutates_args=())
def _deform_roi_pool(input: Tensor, rois: Tensor, offset: Tensor | None, rows: int, columns: int, spatial_scale: float, sampling_ratio: int,
                     gamma: float, position_sensitive: bool) -> Tensor:
    if triton := kernels("deform_roi_pool", input):
        return triton.forward(input, rois, offset, rows, columns, spatial_scale, sampling_ratio, gamma, position_sensitive)
    sampler = Sampler(input, rois, offset, rows, columns, spatial_scale, sampling_ratio, gamma, position_sensitive)
    blocks = [gather(sampler.table, reads.rows, torch.mul(*reads.weights()), reads.pairs.starts) for _, reads in sampler.blocks()]
    cells = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return cells.to(input.dtype).view(len(rois), rows, columns, sampler.layout.classes).permute(0, 3, 1, 2)


@_deform_roi_pool.register_fake
def _(input, rois, offset, rows, columns, spatial_scale, sampling_ratio, gamma, position_sensitive):
    channels = input.shape[1] // (rows * columns) if position_sensitive else input.shape[1]
    return input.new_empty(rois.shape[0], rows, columns, channels).permute(0, 3, 1, 2)


@torch.library.custom_op("visionkit::deform_roi_pool_backward", mutates_args=())
def _deform_roi_pool_backward(grad: Tensor, input: Tensor, rois: Tensor, offset: Tensor | None, rows: int, columns: int,
                              spatial_scale: float, sampling_ratio: int, gamma: float, position_sensitive: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the offset; that of no offset is empty."""
    if triton := kernels("deform_roi_pool", grad):
        return triton.backward(grad, input, rois, offset, rows, columns, spatial_scale, sampling_ratio, gamma, position_sensitive)
    sampler = Sampler(input, rois, offset, rows, columns, spatial_scale, sampling_ratio, gamma, position_sensitive)
    table = sampler.table
    cells = as_table(grad).view(-1, table.shape[1])                         # [R * P * Q * N, D / N]
    total = torch.zeros_like(table)
    slopes = cells.new_zeros(2, len(cells))                                 # how the loss changes as a unit moves along x and y, a pixel
    for units, reads in sampler.blocks():
        weight_y, weight_x = reads.weights()
        total += gather_transposed(cells[units], reads.rows, weight_y * weight_x, len(table), reads.pairs.bag)
        if offset is not None:
            pixels = gather_weights_gradient(cells[units], table, reads.rows, reads.pairs.bag)
            slope_y, slope_x = reads.slopes()
            slopes[0, units].index_add_(0, reads.pairs.bag, slope_x.mul_(weight_y).mul_(pixels))
            slopes[1, units].index_add_(0, reads.pairs.bag, slope_y.mul_(weight_x).mul_(pixels))
    grad_input = sampler.layout.unfill(total.view(-1, sampler.layout.classes), input.dtype)
    return grad_input, grad.new_empty(0) if offset is None else sampler.offset_gradient(slopes).to(offset.dtype)


@_deform_roi_pool_backward.register_fake
def _(grad, input, rois, offset, rows, columns, spatial_scale, sampling_ratio, gamma, position_sensitive):
    channels_last = not position_sensitive or ScoreMapTable.of(input, rows * columns, bin_major=False).channels_last
    grad_input = torch.empty_like(input, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return grad_input, grad.new_empty(0) if offset is None else torch.empty_like(offset, memory_format=torch.contiguous_format)


def _save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    input, rois, offset, *ctx.settings = inputs
    ctx.save_for_backward(input, rois, offset)


def _backward(ctx, grad: Tensor) -> tuple:
    input, rois, offset = ctx.saved_tensors
    grad_input, grad_offset = torch.ops.visionkit.deform_roi_pool_backward(grad, input, rois, offset, *ctx.settings)
    return grad_input, None, None if offset is None else grad_offset, *[None] * 6


_deform_roi_pool.register_autograd(_backward, setup_context=_save_for_backward)


class AxisSamples(NamedTuple):
    """The samples of n units along one axis."""

    windows: AxisWindows
    low_weight: Tensor      # [n * S] of the pixel at or before each sample, 0 where the sample does not count
    high_weight: Tensor     # [n * S] of the pixel after it
    moves: Tensor           # [n * S] 1 where the sample moves with its unit, 0 where it does not count or is held at the border
    count: Tensor           # [n] samples that count

    def weight(self) -> Tensor:
        """Of each entry of the windows, in the sum of the samples."""
        return self.windows.spread(self.low_weight, self.high_weight)

    def slope(self) -> Tensor:
        """How that changes as the unit moves, per pixel."""
        return self.windows.spread(-self.moves, self.moves)


class Reads(NamedTuple):
    """What the units of a block read: each pixel of their windows along y with each of those along x. M reads in all."""

    rows: Tensor            # [M] of the table
    pairs: Crossing         # of the windows
    y: AxisSamples
    x: AxisSamples

    def weights(self) -> tuple[Tensor, Tensor]:
        """[M] and [M], whose product is the weight of each read in the mean."""
        return self._of_y(self.y.weight()), self.x.weight().index_select(0, self.pairs.x)

    def slopes(self) -> tuple[Tensor, Tensor]:
        """How the first changes as the unit moves along y, per pixel, and the second as it moves along x."""
        return self._of_y(self.y.slope()), self.x.slope().index_select(0, self.pairs.x)

    def _of_y(self, sums: Tensor) -> Tensor:
        share = 1 / (self.y.count * self.x.count).clamp(min=1)              # [n] of each sample in the mean
        return (sums * share.index_select(0, self.y.windows.bin)).index_select(0, self.pairs.y)


class Sampler:
    """The portable tier's samples of units: each is a class in a bin, and moves as one. They are in the order [R, P, Q, N]."""

    def __init__(self, input: Tensor, rois: Tensor, offset: Tensor | None, rows: int, columns: int, spatial_scale: float,
                 sampling_ratio: int, gamma: float, position_sensitive: bool) -> None:
        self.layout = ScoreMapTable.of(input, rows * columns if position_sensitive else 1, bin_major=not position_sensitive)
        self.classes = 1 if offset is None else offset.shape[1] // 2
        table = self.layout.fill(input)
        self.table = table.view(-1, table.shape[1] // self.classes)
        rois = sound_rois(rois.to(table.dtype), len(input))
        start = round_half_away(rois[:, 1:3]) * spatial_scale - 0.5
        length = ((round_half_away(rois[:, 3:]) + 1) * spatial_scale - 0.5 - start).clamp(min=0.1)
        self.image, self.start, self.length = rois[:, 0], start, length     # [R], [R, 2], [R, 2] along x and y, feature pixels
        self.offset = None if offset is None else offset.to(table.dtype)
        self.rows, self.columns, self.sampling_ratio, self.gamma = rows, columns, sampling_ratio, gamma

    def blocks(self) -> Iterator[tuple[slice, Reads]]:
        """Slices of the units, and what those read."""
        units = self.rows * self.columns * self.classes                     # of a region
        step = max(_BLOCK_UNITS // units, 1)
        for start in range(0, max(len(self.image), 1), step):
            block = slice(start, min(start + step, len(self.image)))
            yield slice(block.start * units, block.stop * units), self._reads(block)

    def _reads(self, block: slice) -> Reads:
        y, x = self._samples(block, 1, self.layout.height), self._samples(block, 0, self.layout.width)
        pairs = cross(y.windows.start, y.windows.count, x.windows.start, x.windows.count)
        index = y.windows.pixel.dtype
        first = self.layout.first_rows(self.image[block].to(index)).t().expand(-1, self.rows * self.columns)                # [R, P * Q]
        first = (first[:, :, None] * self.classes + torch.arange(self.classes, dtype=index, device=first.device)).flatten()
        step = self.layout.pixel_step * self.classes
        rows = y.windows.pixel * (self.layout.width * step) + first.index_select(0, y.windows.bin)
        rows = rows.index_select(0, pairs.y).add_((x.windows.pixel * step).index_select(0, pairs.x))
        return Reads(rows, pairs, y, x)

    def _samples(self, block: slice, axis: int, size: int) -> AxisSamples:
        """Of a block of regions along x or y, axis 0 or 1, on which the map has `size` pixels."""
        bins = (self.columns, self.rows)[axis]
        start, length = self.start[block, axis], self.length[block, axis, None]
        start = start[:, None] + torch.arange(bins, dtype=start.dtype, device=start.device) * (length / bins)              # [R, bins]
        start = start[:, None, :, None] if axis == 0 else start[:, :, None, None]
        start = start.expand(-1, self.rows, self.columns, self.classes)
        if self.offset is not None:
            start = start + self.offset[block, axis::2].permute(0, 2, 3, 1) * self.gamma * length[..., None, None]
        steps = torch.arange(self.sampling_ratio, dtype=start.dtype, device=start.device) / self.sampling_ratio
        where = (start[..., None] + (length / bins)[..., None, None, None] * steps).flatten(0, -2)   # [n, S]
        outside = (where < -0.5) | (where > size - 0.5)                     # what is not a number counts, to be seen in the mean
        moves = (where >= 0) & (where < size - 1) & ~outside
        where = where.clamp(0, size - 1)
        low = where.floor()
        high_weight = where - low
        low = low.nan_to_num(0).to(index_dtype(len(self.table)))
        windows = axis_windows(low.flatten(), (low + 1).clamp(max=size - 1).flatten(), torch.full_like(low[:, 0], self.sampling_ratio))
        return AxisSamples(windows.without_gaps(), (1 - high_weight).masked_fill_(outside, 0).flatten(),
                           high_weight.masked_fill(outside, 0).flatten(), moves.to(where.dtype).flatten(),
                           self.sampling_ratio - outside.sum(1, dtype=where.dtype))

    def offset_gradient(self, slopes: Tensor) -> Tensor:
        """[R, 2 * N, P, Q] from how the loss changes as units move along x and y, [2, n]."""
        slopes = slopes.view(2, -1, self.rows, self.columns, self.classes).permute(1, 4, 0, 2, 3)                # [R, N, 2, P, Q]
        return (slopes * (self.gamma * self.length[:, None, :, None, None])).flatten(1, 2).contiguous()
