"""RoIAlign (He et al. 2017, Mask R-CNN, arXiv:1703.06870, sec. 3), as one fused weighted gather.

Every output cell is a weighted gather over the feature maps (`weighted_gather.py`). A pyramid is one table too: all its levels are pooled in
one call.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.ops.weighted_gather import as_table, gather, gather_transposed
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
        [R, C, P, Q] in the dtype of `input`; samples over one pixel outside the map count as 0.

    Raises:
        ValueError: wrong shapes, devices, sampling ratio or output size.
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
    for input in inputs:
        if input.ndim != 4:
            raise ValueError(f"roi_align needs an input [B, C, H, W], got {list(input.shape)}")
        if (input.shape[:2], input.dtype, input.device) != (inputs[0].shape[:2], inputs[0].dtype, inputs[0].device):
            raise ValueError(f"pyramid levels must agree in batch, channels, dtype and device; got {list(inputs[0].shape)} of "
                             f"{inputs[0].dtype} on {inputs[0].device} and {list(input.shape)} of {input.dtype} on {input.device}")
    if len(inputs) != len(spatial_scales) or not inputs:
        raise ValueError(f"pyramid_roi_align needs one spatial scale a level, got {len(spatial_scales)} for {len(inputs)} levels")
    rois = boxes if isinstance(boxes, Tensor) else boxes_to_rois(boxes)
    if rois.ndim != 2 or rois.shape[1] != 5:
        raise ValueError(f"roi_align needs boxes [R, 5] as (image index, x1, y1, x2, y2) or a list of [R_i, 4], got {list(rois.shape)}")
    if rois.device != inputs[0].device:
        raise ValueError(f"input is on {inputs[0].device}, boxes on {rois.device}; move one")
    if levels is None:
        levels = torch.zeros(len(rois), dtype=torch.int64, device=rois.device)
    if levels.shape != rois.shape[:1]:
        raise ValueError(f"pyramid_roi_align needs one level a box, got levels {list(levels.shape)} for boxes {list(rois.shape)}")
    rows, columns = (output_size, output_size) if isinstance(output_size, int) else output_size
    if rows < 1 or columns < 1:
        raise ValueError(f"output_size must be positive, got {(rows, columns)}")
    if sampling_ratio == 0 or sampling_ratio < -1:
        raise ValueError(f"sampling_ratio must be positive, or -1 to follow the size of the RoI; got {sampling_ratio}")
    return torch.ops.visionkit.roi_align(list(inputs), rois, levels, rows, columns, list(spatial_scales), sampling_ratio, aligned)


def boxes_to_rois(boxes: list[Tensor]) -> Tensor:
    """[R, 5] RoIs (image index, x1, y1, x2, y2) of the boxes [R_i, 4] of each image."""
    for index, value in enumerate(boxes):
        if value.ndim != 2 or value.shape[1] != 4:
            raise ValueError(f"the boxes of image {index} must be [R, 4], got {list(value.shape)}")
    return torch.cat([F.pad(value, (1, 0), value=index) for index, value in enumerate(boxes)])


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
    batch, channels, dtype = *inputs[0].shape[:2], inputs[0].dtype
    if rois.device.type == "cpu" and len(rois) and not (rois[:, 0].min() >= 0 and rois[:, 0].max() < batch):     # on CUDA it would wait
        raise ValueError(f"boxes name images {int(rois[:, 0].min())} to {int(rois[:, 0].max())} of a batch of {batch}")
    tables = [as_table(input) for input in inputs]
    table = tables[0] if len(tables) == 1 else torch.cat(tables)
    sizes = [(input.shape[2], input.shape[3]) for input in inputs]
    output = table.new_empty(len(rois), rows * columns, channels)
    for chosen, reads, weights in _reads(rois.to(table.dtype), levels, len(inputs[0]), sizes, rows, columns, spatial_scales, sampling_ratio,
                                         aligned):
        output[chosen] = gather(table, reads, weights).view(-1, rows * columns, channels)
    return output.to(dtype).view(len(rois), rows, columns, channels).permute(0, 3, 1, 2)     # channels-last, as the next layer likes it


@_roi_align.register_fake
def _(inputs, rois, levels, rows, columns, spatial_scales, sampling_ratio, aligned):
    return inputs[0].new_empty(rois.shape[0], rows, columns, inputs[0].shape[1]).permute(0, 3, 1, 2)


@torch.library.custom_op("visionkit::roi_align_backward", mutates_args=())
def _roi_align_backward(grad: Tensor, rois: Tensor, levels: Tensor, batch: int, sizes: Sequence[int], spatial_scales: Sequence[float],
                        sampling_ratio: int, aligned: bool) -> list[Tensor]:
    _, channels, rows, columns = grad.shape
    sizes = list(zip(sizes[::2], sizes[1::2], strict=True))
    pixels = [batch * height * width for height, width in sizes]
    working = torch.promote_types(grad.dtype, torch.float32)
    cells = grad.permute(0, 2, 3, 1).reshape(len(rois), rows * columns, channels).to(working)
    total = None
    for chosen, reads, weights in _reads(rois.to(working), levels, batch, sizes, rows, columns, spatial_scales, sampling_ratio, aligned):
        part = gather_transposed(cells[chosen].reshape(-1, channels), reads, weights, sum(pixels))
        total = part if total is None else total.add_(part)
    if total is None:
        total = cells.new_zeros(sum(pixels), channels)
    parts = total.to(grad.dtype).split(pixels)
    # each a tensor of its own: an operator may not return two views of one
    return [part.clone().view(batch, *size, channels).permute(0, 3, 1, 2) for part, size in zip(parts, sizes, strict=True)]


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


def _reads(rois: Tensor, levels: Tensor, batch: int, sizes: Sequence[tuple[int, int]], rows: int, columns: int,
           spatial_scales: Sequence[float], sampling_ratio: int, aligned: bool) -> Iterator[tuple[Tensor | slice, Tensor, Tensor]]:
    """What the output cells read, for groups of RoIs that take equally many samples a cell.

    Yields:
        chosen: indices of the RoIs of the group, [n], or a slice of all.
        reads: [n * P * Q, K] rows of the table, the four corners of each sample.
        weights: [n * P * Q, K] bilinear weights over the number of samples; 0 for what lies outside the map.
    """
    height, width = torch.tensor(sizes, device=rois.device)[levels].unbind(1)
    scale = torch.tensor(spatial_scales, device=rois.device, dtype=rois.dtype)[levels]
    level_starts = torch.tensor([0] + [batch * h * w for h, w in sizes], device=rois.device).cumsum(0)
    map_start = level_starts[levels] + rois[:, 0].long() * height * width                             # of each RoI's image, in the table
    index_type = torch.int32 if level_starts[-1] < 2**31 else torch.int64                             # half the bytes to compute and sort
    height, width, map_start = (value.to(index_type) for value in (height, width, map_start))
    left, top, right, bottom = (rois[:, 1:] * scale[:, None] - (0.5 if aligned else 0.0)).unbind(1)
    box_width, box_height = right - left, bottom - top
    if not aligned:                                                         # the first RoIAlign forces RoIs to at least one pixel
        box_width, box_height = box_width.clamp(min=1), box_height.clamp(min=1)
    if sampling_ratio > 0:
        groups = [(slice(None), sampling_ratio, sampling_ratio)] if len(rois) else []
    else:
        grids = torch.stack([(box_height / rows).ceil(), (box_width / columns).ceil()], 1).long()
        grids, member = torch.unique(grids, dim=0, return_inverse=True)
        groups = [((member == index).nonzero()[:, 0], *grid) for index, grid in enumerate(grids.tolist())]
    for chosen, samples_y, samples_x in groups:
        empty = samples_y < 1 or samples_x < 1                              # a RoI without samples: its cells are 0
        samples_y, samples_x = max(samples_y, 1), max(samples_x, 1)
        y, weight_y = _axis_reads(top[chosen], box_height[chosen], rows, samples_y, height[chosen])   # [n, P, 2S]
        x, weight_x = _axis_reads(left[chosen], box_width[chosen], columns, samples_x, width[chosen])
        y = y * width[chosen, None, None] + map_start[chosen, None, None]
        weight_y = weight_y * (0.0 if empty else 1 / (samples_y * samples_x))
        cells = len(y) * rows * columns
        reads = y[:, :, None, :, None] + x[:, None, :, None, :]             # [n, P, Q, 2S, 2S]
        weights = weight_y[:, :, None, :, None] * weight_x[:, None, :, None, :]
        yield chosen, reads.view(cells, -1), weights.view(cells, -1)


def _axis_reads(start: Tensor, length: Tensor, cells: int, samples: int, size: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels that linear interpolation reads along one axis, and their weights.

    Args:
        start, length: [n] of each RoI, feature pixels.
        cells: output cells along the axis.
        samples: samples a cell.
        size: [n] pixels along the axis of each RoI's map.

    Returns:
        [n, cells, 2 * samples] pixel indices within the map, and weights, 0 where the sample lies over one pixel outside.
    """
    steps = (torch.arange(cells * samples, device=start.device, dtype=start.dtype) + 0.5) / (cells * samples)
    where = start[:, None] + length[:, None] * steps                        # [n, cells * samples]
    inside = (where >= -1) & (where <= size[:, None])
    where = where.clamp(min=0).minimum(size[:, None] - 1)                   # the outermost pixel reaches one pixel further out
    low = where.floor()
    high_weight = where - low
    low = low.to(size.dtype)
    pixels = torch.stack([low, (low + 1).minimum(size[:, None] - 1)], -1)
    weights = torch.stack([1 - high_weight, high_weight], -1) * inside[..., None]
    return pixels.view(len(start), cells, -1), weights.view(len(start), cells, -1)
