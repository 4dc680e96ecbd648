"""Position-sensitive RoI pooling (Dai et al. 2016, R-FCN, arXiv:1605.06409, eq. 1): each bin averages its own score maps."""
from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.ops.rois import as_rois, grid_size, round_half_away, sound_rois
from visionkit.ops.score_maps import ScoreMapTable, cells_by_bin, check_score_maps, pooled
from visionkit.ops.tiers import kernels
from visionkit.ops.weighted_gather import index_dtype
from visionkit.registry import OPS

# B images, R RoIs, P x Q bins, C classes, n = P * Q * R windows, T table rows

_ROI_BLOCK = 512            # a window has as many reads as pixels: a block of RoIs bounds the memory they take


def ps_roi_pool(input: Tensor, boxes: Tensor | list[Tensor], output_size: int | tuple[int, int], spatial_scale: float = 1.0, *,
                rule: str = "torchvision", bin_major: bool = False) -> Tensor:
    """Mean over the whole pixels of each bin, of the score maps of that bin.

    Args:
        input: [B, C * P * Q, H, W] score maps; class c of bin (i, j) is channel (c * P + i) * Q + j.
        boxes: [R, 5] as (image index, x1, y1, x2, y2) or one [R_i, 4] an image; input pixels divided by `spatial_scale`.
        output_size: (P, Q) rows and columns of bins.
        spatial_scale: feature pixels an image pixel, 1 / stride.
        rule: which pixels a RoI covers. 'torchvision' rounds its scaled corners and never reads the last row and column of the map;
            'r_fcn', the authors' rule, rounds corners to image pixels, takes the lower right pixel as inside, and reads all of the map.
        bin_major: class c of bin (i, j) is channel (i * Q + j) * C + c instead; such maps in channels-last memory are read without a copy.

    Returns:
        [R, C, P, Q] in the dtype of `input`; 0 for bins that cover no pixel. Bins may overlap by a pixel.

    Raises:
        ValueError: wrong shapes, devices or rule, or channels that are no multiple of P * Q.
    """
    rois = as_rois("ps_roi_pool", input, boxes)
    rows, columns = grid_size(output_size)
    check_score_maps("ps_roi_pool", input, rows, columns)
    if rule not in ("torchvision", "r_fcn"):
        raise ValueError(f"rule must be 'torchvision' or 'r_fcn', got {rule!r}")
    return torch.ops.visionkit.ps_roi_pool(input, rois, rows, columns, spatial_scale, rule, bin_major)


@OPS.register_module()
class PSRoIPool(nn.Module):
    """`ps_roi_pool` with its settings kept."""

    def __init__(self, output_size: int | tuple[int, int], spatial_scale: float = 1.0, rule: str = "torchvision",
                 bin_major: bool = False) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.rule = rule
        self.bin_major = bin_major

    def forward(self, input: Tensor, boxes: Tensor | list[Tensor]) -> Tensor:
        return ps_roi_pool(input, boxes, self.output_size, self.spatial_scale, rule=self.rule, bin_major=self.bin_major)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, rule={self.rule!r}, bin_major={self.bin_major}"


@torch.library.custom_op("visionkit::ps_roi_pool", mutates_args=())
def _ps_roi_pool(input: Tensor, rois: Tensor, rows: int, columns: int, spatial_scale: float, rule: str, bin_major: bool) -> Tensor:
    if triton := kernels("ps_roi_pool", input):
        return triton.forward(input, rois, rows, columns, spatial_scale, rule, bin_major)
    layout = ScoreMapTable.of(input, rows * columns, bin_major=bin_major)
    table = layout.fill(input)
    output = input.new_empty(len(rois), layout.classes, rows, columns)
    for block, reads, starts, _, _ in _windows(layout, rois, rows, columns, spatial_scale, rule, table.dtype):
        bags = F.embedding_bag(reads, table, starts, mode="mean")
        output[block] = pooled(bags, len(output[block]), rows, columns, input.dtype)
    return output


@_ps_roi_pool.register_fake
def _(input, rois, rows, columns, spatial_scale, rule, bin_major):
    return input.new_empty(rois.shape[0], input.shape[1] // (rows * columns), rows, columns)


@torch.library.custom_op("visionkit::ps_roi_pool_backward", mutates_args=())
def _ps_roi_pool_backward(grad: Tensor, rois: Tensor, batch: int, height: int, width: int, spatial_scale: float, rule: str, bin_major: bool,
                          channels_last: bool) -> Tensor:
    if triton := kernels("ps_roi_pool", grad):
        return triton.backward(grad, rois, batch, height, width, spatial_scale, rule, bin_major, channels_last)
    _, classes, rows, columns = grad.shape
    shape = torch.Size((batch, classes * rows * columns, height, width))
    layout = ScoreMapTable(shape, rows * columns, channels_last=channels_last, bin_major=bin_major)
    total = None
    working = torch.promote_types(grad.dtype, torch.float32)
    for block, reads, _, counts, window in _windows(layout, rois, rows, columns, spatial_scale, rule, working):
        shares = cells_by_bin(grad[block]) / counts[:, None]                # what each pixel of a window gets
        by_row = reads.argsort(stable=True)
        row_starts = F.pad(torch.bincount(reads, minlength=layout.rows).cumsum(0, dtype=reads.dtype), (1, 0))[:-1]
        part = F.embedding_bag(window.index_select(0, by_row), shares, row_starts, mode="sum")
        total = part if total is None else total.add_(part)
    if total is None:
        total = grad.new_zeros(layout.rows, classes, dtype=working)
    return layout.unfill(total, grad.dtype)


@_ps_roi_pool_backward.register_fake
def _(grad, rois, batch, height, width, spatial_scale, rule, bin_major, channels_last):
    _, classes, rows, columns = grad.shape
    return torch.empty((batch, classes * rows * columns, height, width), dtype=grad.dtype, device=grad.device,
                       memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    input, rois, _, _, ctx.spatial_scale, ctx.rule, ctx.bin_major = inputs
    ctx.save_for_backward(rois)
    ctx.batch, _, ctx.height, ctx.width = input.shape
    ctx.channels_last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()


def _backward(ctx, grad: Tensor) -> tuple:
    grad_input = torch.ops.visionkit.ps_roi_pool_backward(grad, *ctx.saved_tensors, ctx.batch, ctx.height, ctx.width, ctx.spatial_scale,
                                                          ctx.rule, ctx.bin_major, ctx.channels_last)
    return grad_input, *[None] * 6


_ps_roi_pool.register_autograd(_backward, setup_context=_save_for_backward)


def _windows(layout: ScoreMapTable, rois: Tensor, rows: int, columns: int, spatial_scale: float, rule: str,
             working: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """What the bins read, for blocks of RoIs.

    Yields:
        block: the slice of RoIs.
        reads: table rows, window by window; windows are in the order [P, Q, R].
        starts: [n] where the reads of each window start.
        counts: [n] how many they are.
        window: of each read, the window it belongs to.
    """
    rois = sound_rois(rois.to(working), layout.batch)
    index = index_dtype(layout.rows)
    for start in range(0, len(rois), _ROI_BLOCK):
        block = rois[start:start + _ROI_BLOCK]
        top, bottom = _edges(block[:, 2], block[:, 4], rows, layout.height, spatial_scale, rule)             # [P, R]
        left, right = _edges(block[:, 1], block[:, 3], columns, layout.width, spatial_scale, rule)           # [Q, R]
        wide = (right - left).to(index)
        counts = ((bottom - top).to(index)[:, None] * wide).flatten()                                       # [P * Q * R]
        ends = counts.cumsum(0, dtype=index)
        starts = ends - counts
        total = int(ends[-1])
        window = torch.repeat_interleave(torch.arange(len(counts), dtype=index, device=rois.device), counts, output_size=total)
        corner = (top.to(index) * layout.width)[:, None] + left.to(index)                                   # [P, Q, R]
        within = torch.arange(total, dtype=index, device=rois.device) - starts.index_select(0, window)
        across = wide.expand(rows, -1, -1).flatten().index_select(0, window)
        down = within.div(across, rounding_mode="floor")
        pixel = corner.flatten().index_select(0, window) + down * layout.width + (within - down * across)
        first = layout.first_rows(block[:, 0].to(index)).flatten().index_select(0, window)
        yield slice(start, start + len(block)), pixel.mul_(layout.pixel_step).add_(first), starts, counts, window


def _edges(low: Tensor, high: Tensor, bins: int, size: int, scale: float, rule: str) -> tuple[Tensor, Tensor]:
    """First pixel and the one after the last of each bin along an axis, [bins, R], from the corners [R] of the RoIs, image pixels."""
    if rule == "torchvision":
        low, high = round_half_away(low * scale), round_half_away(high * scale)
        length, limit = (high - low).clamp(min=1), size - 1
    else:
        low, high = round_half_away(low) * scale, (round_half_away(high) + 1) * scale
        length, limit = (high - low).clamp(min=0.1), size
    bin_length = length / bins
    step = torch.arange(bins, dtype=low.dtype, device=low.device)[:, None]
    if rule == "torchvision":
        first, last = (step * bin_length).floor() + low, ((step + 1) * bin_length).ceil() + low
    else:
        first, last = (step * bin_length + low).floor(), ((step + 1) * bin_length + low).ceil()
    first, last = (edge.clamp(0, limit).nan_to_num(0).long() for edge in (first, last))
    return first, last
