"""RoIAlign (He et al. 2017, Mask R-CNN, arXiv:1703.06870, sec. 3), as one fused weighted gather.

Every output cell is a weighted gather over the feature maps (`weighted_gather.py`). A pyramid is one table too: all its levels are pooled
in one call.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from visionkit.ops.rois import as_rois, grid_size, sound_rois
from visionkit.ops.tiers import kernels
from visionkit.ops.weighted_gather import as_table, gather, gather_transposed, index_dtype
from visionkit.ops.windows import AxisWindows, axis_windows, cross, runs
from visionkit.registry import OPS

# R RoIs, P x Q output cells, S samples a cell along one axis, C channels


def roi_align(input: Tensor, boxes: Tensor | list[Tensor], output_size: int | tuple[int, int], spatial_scale: float = 1.0,
              sampling_ratio: int = -1, aligned: bool = False) -> Tensor:
    """Mean of bilinear samples in each cell of a grid over each region of interest.

    Args:
        input: [B, C, H, W]; channels-last memory is read as it is, anything else is copied once.
        boxes: [R, 5] as (image index, x1, y1, x2, y2) or one [R_i, 4] an image; input pixels divided by `spatial_scale`.
        output_size: (P, Q) rows and columns of the grid.
        spatial_scale: feature pixels an image pixel, 1 / stride.
        sampling_ratio: samples a cell along each axis; -1 takes as many as the cell has feature pixels, rounded up.
        aligned: pixel centres at half-integers (shifts by -0.5, and boxes may be smaller than one feature pixel).

    Returns:
        [R, C, P, Q] in the dtype of `input` and channels-last memory, which convolutions read as it is: flatten it with `.flatten(1)`,
        `.view` cannot. Samples over one pixel outside the map count as 0; boxes that are not finite give NaN.

    Raises:
        ValueError: wrong shapes, devices, sampling ratio, output size or image indices.
    """
    return pyramid_roi_align([input], boxes, None, output_size, [spatial_scale], sampling_ratio, aligned)


def pyramid_roi_align(inputs: Sequence[Tensor], boxes: Tensor | list[Tensor], levels: Tensor | None, output_size: int | tuple[int, int],
                      spatial_scales: Sequence[float], sampling_ratio: int = -1, aligned: bool = True) -> Tensor:
    """`roi_align` of each region on the pyramid level that it is assigned to (Lin et al. 2017, FPN, arXiv:1612.03144, eq. 1).

    Args:
        inputs: the levels, each [B, C, H_l, W_l], all of one B, C, dtype and device.
        boxes: [R, 5] or a list of [R_i, 4], as in `roi_align`.
        levels: [R] int64, the level that each box is pooled from; None takes the first for all.
        output_size: (P, Q) rows and columns of the grid.
        spatial_scales: of each level, feature pixels an image pixel.
        sampling_ratio: samples a cell along each axis, or -1, as in `roi_align`.
        aligned: as in `roi_align`.

    Returns:
        [R, C, P, Q] in the order of the boxes.

    Raises:
        ValueError: as `roi_align`, and levels that do not fit together.
    """
    if len(inputs) != len(spatial_scales) or not inputs:
        raise ValueError(f"pyramid_roi_align needs one spatial scale a level, got {len(spatial_scales)} for {len(inputs)} levels")
    rois = as_rois("roi_align", inputs[0], boxes)
    for input in inputs:
        if input.ndim != 4 or (input.shape[:2], input.dtype, input.device) != (inputs[0].shape[:2], inputs[0].dtype, inputs[0].device):
            raise ValueError(f"pyramid levels must agree in batch, channels, dtype and device; got {list(inputs[0].shape)} of "
                             f"{inputs[0].dtype} on {inputs[0].device} and {list(input.shape)} of {input.dtype} on {input.device}")
    if levels is None:
        levels = torch.zeros(len(rois), dtype=torch.int64, device=rois.device)
    if levels.shape != rois.shape[:1] or levels.is_floating_point():
        raise ValueError(f"pyramid_roi_align needs levels {list(rois.shape[:1])} of integers, one a box, got {list(levels.shape)} of "
                         f"{levels.dtype}")
    if levels.device != rois.device:
        raise ValueError(f"boxes are on {rois.device}, levels on {levels.device}; move one")
    rows, columns = grid_size(output_size)
    if sampling_ratio == 0 or sampling_ratio < -1:
        raise ValueError(f"sampling_ratio must be positive, or -1 to follow the size of the RoI; got {sampling_ratio}")
    return torch.ops.visionkit.roi_align(list(inputs), rois, levels, rows, columns, list(spatial_scales), sampling_ratio, aligned)


@OPS.register_module()
class RoIAlign(nn.Module):
    """`roi_align` with its settings kept."""

    def __init__(self, output_size: int | tuple[int, int], spatial_scale: float = 1.0, sampling_ratio: int = -1,
                 aligned: bool = False) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: Tensor, boxes: Tensor | list[Tensor]) -> Tensor:
        return roi_align(input, boxes, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def extra_repr(self) -> str:
        return (f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, sampling_ratio={self.sampling_ratio}, "
                f"aligned={self.aligned}")


@torch.library.custom_op("visionkit::roi_align", mutates_args=())
def _roi_align(inputs: Sequence[Tensor], rois: Tensor, levels: Tensor, rows: int, columns: int, spatial_scales: Sequence[float],
               sampling_ratio: int, aligned: bool) -> Tensor:
    if triton := kernels("roi_align", inputs[0]):
        return triton.forward(inputs, rois, levels, rows, columns, spatial_scales, sampling_ratio, aligned)
    batch, channels = inputs[0].shape[:2]
    if levels.device.type == "cpu" and len(levels) and not (levels.min() >= 0 and levels.max() < len(inputs)):   # on a GPU it would wait
        raise ValueError(f"levels name {int(levels.min())} to {int(levels.max())} of a pyramid of {len(inputs)}")
    sizes = [(input.shape[2], input.shape[3]) for input in inputs]
    table = as_table(inputs[0]) if len(inputs) == 1 else _table_of_levels(inputs)
    rois = sound_rois(rois.to(table.dtype), batch)
    reads = _reads(rois, levels, batch, sizes, rows, columns, spatial_scales, sampling_ratio, aligned)
    cells = gather(table, reads.rows, reads.weights, reads.starts)
    return cells.to(inputs[0].dtype).view(len(rois), rows, columns, channels).permute(0, 3, 1, 2)


@_roi_align.register_fake
def _(inputs, rois, levels, rows, columns, spatial_scales, sampling_ratio, aligned):
    return inputs[0].new_empty(rois.shape[0], rows, columns, inputs[0].shape[1]).permute(0, 3, 1, 2)


@torch.library.custom_op("visionkit::roi_align_backward", mutates_args=())
def _roi_align_backward(grad: Tensor, rois: Tensor, levels: Tensor, batch: int, sizes: Sequence[int], spatial_scales: Sequence[float],
                        sampling_ratio: int, aligned: bool) -> list[Tensor]:
    if triton := kernels("roi_align", grad):
        return triton.backward(grad, rois, levels, batch, sizes, spatial_scales, sampling_ratio, aligned)
    channels, rows, columns = grad.shape[1:]
    sizes = list(zip(sizes[::2], sizes[1::2], strict=True))
    pixels = [batch * height * width for height, width in sizes]
    cells = as_table(grad)                                                  # [R * P * Q, C]
    rois = sound_rois(rois.to(cells.dtype), batch)
    reads = _reads(rois, levels, batch, sizes, rows, columns, spatial_scales, sampling_ratio, aligned)
    total = gather_transposed(cells, reads.rows, reads.weights, sum(pixels), reads.cells)
    parts = total.to(grad.dtype).split(pixels)
    # each a tensor of its own: an operator may not return two views of one
    parts = parts if len(parts) == 1 else [part.clone() for part in parts]
    return [part.view(batch, *size, channels).permute(0, 3, 1, 2) for part, size in zip(parts, sizes, strict=True)]


@_roi_align_backward.register_fake
def _(grad, rois, levels, batch, sizes, spatial_scales, sampling_ratio, aligned):
    return [grad.new_empty(batch, height, width, grad.shape[1]).permute(0, 3, 1, 2)
            for height, width in zip(sizes[::2], sizes[1::2], strict=True)]


def _save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    features, rois, levels, _, _, *ctx.settings = inputs
    ctx.save_for_backward(rois, levels)
    ctx.batch = features[0].shape[0]
    ctx.sizes = [size for feature in features for size in feature.shape[2:]]


def _backward(ctx, grad: Tensor) -> tuple:
    grads = torch.ops.visionkit.roi_align_backward(grad, *ctx.saved_tensors, ctx.batch, ctx.sizes, *ctx.settings)
    return grads, *[None] * 7


_roi_align.register_autograd(_backward, setup_context=_save_for_backward)


def _table_of_levels(inputs: Sequence[Tensor]) -> Tensor:
    """[sum of B * H_l * W_l, C] pixels of all levels, float32 at least."""
    batch, channels = inputs[0].shape[:2]
    pixels = [batch * input.shape[2] * input.shape[3] for input in inputs]
    table = inputs[0].new_empty(sum(pixels), channels, dtype=torch.promote_types(inputs[0].dtype, torch.float32))
    for part, input in zip(table.split(pixels), inputs, strict=True):
        part.view(batch, *input.shape[2:], channels).copy_(input.permute(0, 2, 3, 1))
    return table


class Reads(NamedTuple):
    """What the output cells read, for `gather` and `gather_transposed`."""

    rows: Tensor                    # of the table, [R * P * Q, K] or, where cells read unequally many, [M]
    weights: Tensor                 # likewise; 0 for what lies outside the map
    starts: Tensor | None = None    # [R * P * Q]
    cells: Tensor | None = None     # [M]


def _reads(rois: Tensor, levels: Tensor, batch: int, sizes: Sequence[tuple[int, int]], rows: int, columns: int,
           spatial_scales: Sequence[float], sampling_ratio: int, aligned: bool) -> Reads:
    starts = [0, *itertools.accumulate(batch * height * width for height, width in sizes)]       # of each level in the table
    geometry = torch.tensor([(*size, start) for size, start in zip(sizes, starts, strict=False)], device=rois.device)
    height, width, start = geometry.to(index_dtype(starts[-1])).index_select(0, levels).unbind(1)
    scale = torch.tensor(spatial_scales, device=rois.device, dtype=rois.dtype).index_select(0, levels)
    start = start + rois[:, 0].to(start.dtype) * height * width             # of each RoI's map
    left, top, right, bottom = (rois[:, 1:] * scale[:, None] - (0.5 if aligned else 0.0)).unbind(1)
    box_width, box_height = right - left, bottom - top
    if not aligned:                                                         # the first RoIAlign forces RoIs to at least one pixel
        box_width, box_height = box_width.clamp(min=1), box_height.clamp(min=1)
    if sampling_ratio > 0:
        y, weight_y = even_samples(top, box_height, rows, sampling_ratio, height)               # [R, P, 2S]
        x, weight_x = even_samples(left, box_width, columns, sampling_ratio, width)             # [R, Q, 2S]
        y = y * width[:, None, None] + start[:, None, None]
        return Reads(_outer(torch.add, y, x), _outer(torch.mul, weight_y, weight_x))
    y, weight_y = _adaptive_samples(top, box_height, rows, height)
    x, weight_x = _adaptive_samples(left, box_width, columns, width)
    reads = cross(*(value.view(-1, rows, 1).expand(-1, -1, columns).flatten() for value in (y.start, y.count)),
                  *(value.view(-1, 1, columns).expand(-1, rows, -1).flatten() for value in (x.start, x.count)))
    roi = y.bin // rows
    row = y.pixel * width.index_select(0, roi) + start.index_select(0, roi)
    return Reads(row.index_select(0, reads.y).add_(x.pixel.index_select(0, reads.x)),
                 weight_y.index_select(0, reads.y).mul_(weight_x.index_select(0, reads.x)), reads.starts, reads.bag)


def even_samples(start: Tensor, length: Tensor, cells: int, samples: int, size: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels that linear interpolation reads along one axis, and their weights in the mean, for equally many samples in each cell.

    Args:
        start, length: [R] of each RoI, feature pixels.
        cells: output cells along the axis.
        samples: samples a cell.
        size: [R] pixels along the axis of each RoI's map.

    Returns:
        [R, cells, 2 * samples] pixel indices within the map, and weights.
    """
    steps = (torch.arange(cells * samples, device=start.device, dtype=start.dtype) + 0.5) / (cells * samples)
    low, high, low_weight, high_weight = _neighbours(start[:, None] + length[:, None] * steps, size[:, None])
    pixels, weights = torch.stack([low, high], -1), torch.stack([low_weight, high_weight], -1).div_(samples)
    return pixels.view(-1, cells, 2 * samples), weights.view(-1, cells, 2 * samples)


def _adaptive_samples(start: Tensor, length: Tensor, cells: int, size: Tensor) -> tuple[AxisWindows, Tensor]:
    """The same for as many samples as a cell has pixels: windows of the R * cells cells, and the weights of their entries."""
    samples = (length / cells).ceil().nan_to_num(0).to(size.dtype)          # [R]
    share = samples.to(start.dtype).reciprocal().where(samples > 0, 0)      # a RoI turned inside out has none: its cells are 0
    samples = samples.clamp(min=1)
    roi, step = runs(torch.zeros_like(samples), samples * cells)
    where = start.index_select(0, roi) + (length / (samples * cells)).index_select(0, roi) * (step + 0.5)
    low, high, low_weight, high_weight = _neighbours(where, size.index_select(0, roi))
    windows = axis_windows(low, high, samples.repeat_interleave(cells))
    share = share.index_select(0, roi)
    return windows, windows.spread(low_weight * share, high_weight * share)


def _neighbours(where: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels before and after positions along an axis of `size` pixels, and the weights of the two; 0 over one pixel outside."""
    outside = (where < -1) | (where > size)
    where = where.clamp(min=0).minimum(size - 1)                            # the outermost pixel reaches one pixel further out
    low = where.floor()
    high_weight = where - low
    low = low.nan_to_num(0).to(size.dtype)
    return low, (low + 1).minimum(size - 1), (1 - high_weight).masked_fill_(outside, 0), high_weight.masked_fill_(outside, 0)


def _outer(combine: Callable[[Tensor, Tensor], Tensor], y: Tensor, x: Tensor) -> Tensor:
    """Every y of [R, P, A] combined with every x of [R, Q, D], cell by cell: [R * P * Q, A * D]."""
    # spread out first, since broadcasting over an axis as short as A or D costs three times as much
    y, x = y.repeat_interleave(x.shape[2], 2), x.repeat(1, 1, y.shape[2])
    return combine(y[:, :, None], x[:, None]).flatten(0, 2)
