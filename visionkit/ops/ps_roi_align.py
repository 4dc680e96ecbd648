"""Position-sensitive RoIAlign: the bins of R-FCN (Dai et al. 2016, arXiv:1605.06409), sampled as RoIAlign does (arXiv:1703.06870)."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from visionkit.ops.roi_align import even_samples
from visionkit.ops.rois import as_rois, grid_size, sound_rois
from visionkit.ops.score_maps import ScoreMapTable, cells_by_bin, check_score_maps, pooled
from visionkit.ops.tiers import kernels
from visionkit.ops.weighted_gather import gather, gather_transposed, index_dtype
from visionkit.registry import OPS

# B images, R RoIs, P x Q bins, C classes, S samples a bin along one axis


def ps_roi_align(input: Tensor, boxes: Tensor | list[Tensor], output_size: int | tuple[int, int], spatial_scale: float = 1.0,
                 sampling_ratio: int = -1, *, bin_major: bool = False) -> Tensor:
    """Mean of bilinear samples in each bin, of the score maps of that bin.

    Args:
        input: [B, C * P * Q, H, W] score maps; class c of bin (i, j) is channel (c * P + i) * Q + j.
        boxes: [R, 5] as (image index, x1, y1, x2, y2) or one [R_i, 4] an image; input pixels divided by `spatial_scale`.
        output_size: (P, Q) rows and columns of bins.
        spatial_scale: feature pixels an image pixel, 1 / stride.
        sampling_ratio: samples a bin along each axis; -1 takes as many as the bin has feature pixels, rounded up.
        bin_major: class c of bin (i, j) is channel (i * Q + j) * C + c instead; such maps in channels-last memory are read without a copy.

    Returns:
        [R, C, P, Q] in the dtype of `input`. Pixel centres are at half-integers; samples over one pixel outside the map count as 0.

    Raises:
        ValueError: wrong shapes, devices or sampling ratio, or channels that are no multiple of P * Q.
    """
    rois = as_rois("ps_roi_align", input, boxes)
    rows, columns = grid_size(output_size)
    check_score_maps("ps_roi_align", input, rows, columns)
    if sampling_ratio == 0 or sampling_ratio < -1:
        raise ValueError(f"sampling_ratio must be positive, or -1 to follow the size of the RoI; got {sampling_ratio}")
    return torch.ops.visionkit.ps_roi_align(input, rois, rows, columns, spatial_scale, sampling_ratio, bin_major)


@OPS.register_module()
class PSRoIAlign(nn.Module):
    """`ps_roi_align` with its settings kept."""

    def __init__(self, output_size: int | tuple[int, int], spatial_scale: float = 1.0, sampling_ratio: int = -1,
                 bin_major: bool = False) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.bin_major = bin_major

    def forward(self, input: Tensor, boxes: Tensor | list[Tensor]) -> Tensor:
        return ps_roi_align(input, boxes, self.output_size, self.spatial_scale, self.sampling_ratio, bin_major=self.bin_major)

    def extra_repr(self) -> str:
        return (f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, sampling_ratio={self.sampling_ratio}, "
                f"bin_major={self.bin_major}")


@torch.library.custom_op("visionkit::ps_roi_align", mutates_args=())
def _ps_roi_align(input: Tensor, rois: Tensor, rows: int, columns: int, spatial_scale: float, sampling_ratio: int,
                  bin_major: bool) -> Tensor:
    if triton := kernels("ps_roi_align", input):
        return triton.forward(input, rois, rows, columns, spatial_scale, sampling_ratio, bin_major)
    layout = ScoreMapTable.of(input, rows * columns, bin_major=bin_major)
    table = layout.fill(input)
    output = input.new_empty(len(rois), layout.classes, rows, columns)
    for chosen, reads, weights in _reads(layout, rois, rows, columns, spatial_scale, sampling_ratio, table.dtype):
        output[chosen] = pooled(gather(table, reads, weights), len(reads) // (rows * columns), rows, columns, input.dtype)
    return output


@_ps_roi_align.register_fake
def _(input, rois, rows, columns, spatial_scale, sampling_ratio, bin_major):
    return input.new_empty(rois.shape[0], input.shape[1] // (rows * columns), rows, columns)


@torch.library.custom_op("visionkit::ps_roi_align_backward", mutates_args=())
def _ps_roi_align_backward(grad: Tensor, rois: Tensor, batch: int, height: int, width: int, spatial_scale: float, sampling_ratio: int,
                           bin_major: bool, channels_last: bool) -> Tensor:
    if triton := kernels("ps_roi_align", grad):
        return triton.backward(grad, rois, batch, height, width, spatial_scale, sampling_ratio, bin_major, channels_last)
    _, classes, rows, columns = grad.shape
    shape = torch.Size((batch, classes * rows * columns, height, width))
    layout = ScoreMapTable(shape, rows * columns, channels_last=channels_last, bin_major=bin_major)
    working = torch.promote_types(grad.dtype, torch.float32)
    total = None
    for chosen, reads, weights in _reads(layout, rois, rows, columns, spatial_scale, sampling_ratio, working):
        part = gather_transposed(cells_by_bin(grad[chosen]), reads, weights, layout.rows)
        total = part if total is None else total.add_(part)
    if total is None:
        total = grad.new_zeros(layout.rows, classes, dtype=working)
    return layout.unfill(total, grad.dtype)


@_ps_roi_align_backward.register_fake
def _(grad, rois, batch, height, width, spatial_scale, sampling_ratio, bin_major, channels_last):
    _, classes, rows, columns = grad.shape
    return torch.empty((batch, classes * rows * columns, height, width), dtype=grad.dtype, device=grad.device,
                       memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    input, rois, _, _, ctx.spatial_scale, ctx.sampling_ratio, ctx.bin_major = inputs
    ctx.save_for_backward(rois)
    ctx.batch, _, ctx.height, ctx.width = input.shape
    ctx.channels_last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()


def _backward(ctx, grad: Tensor) -> tuple:
    grad_input = torch.ops.visionkit.ps_roi_align_backward(grad, *ctx.saved_tensors, ctx.batch, ctx.height, ctx.width, ctx.spatial_scale,
                                                           ctx.sampling_ratio, ctx.bin_major, ctx.channels_last)
    return grad_input, *[None] * 6


_ps_roi_align.register_autograd(_backward, setup_context=_save_for_backward)


def _reads(layout: ScoreMapTable, rois: Tensor, rows: int, columns: int, spatial_scale: float, sampling_ratio: int,
           working: torch.dtype) -> Iterator[tuple[Tensor | slice, Tensor, Tensor]]:
    """What the bins read, for groups of RoIs that take equally many samples a bin.

    Yields:
        chosen: indices of the RoIs of the group, or a slice of all.
        reads: [P * Q * n, K] rows of the table, the four corners of each sample; bin by bin, so that near reads come one after the other.
        weights: [P * Q * n, K] bilinear weights over the number of samples.
    """
    rois = sound_rois(rois.to(working), layout.batch)
    index = index_dtype(layout.rows)
    left, top, right, bottom = (rois[:, 1:] * spatial_scale - 0.5).unbind(1)
    box_height, box_width = bottom - top, right - left
    if sampling_ratio > 0:
        groups = [(slice(None), sampling_ratio, sampling_ratio)] if len(rois) else []
    else:
        grids = torch.stack([box_height / rows, box_width / columns], 1).ceil().nan_to_num(0).long()
        grids, member = torch.unique(grids, dim=0, return_inverse=True)
        groups = [((member == number).nonzero()[:, 0], *grid) for number, grid in enumerate(grids.tolist())]
    for chosen, samples_y, samples_x in groups:
        empty = samples_y < 1 or samples_x < 1                              # a RoI without samples: its bins are 0
        samples_y, samples_x = max(samples_y, 1), max(samples_x, 1)
        size = torch.tensor([layout.height, layout.width], dtype=index, device=rois.device).expand(len(left[chosen]), 2)
        y, weight_y = even_samples(top[chosen], box_height[chosen], rows, samples_y, size[:, 0])               # [n, P, 2S]
        x, weight_x = even_samples(left[chosen], box_width[chosen], columns, samples_x, size[:, 1])            # [n, Q, 2S]
        y, x = y * (layout.width * layout.pixel_step), x * layout.pixel_step
        first = layout.first_rows(rois[chosen, 0].to(index)).view(rows, columns, -1, 1)                      # [P, Q, n, 1]
        if empty:
            weight_y.zero_()
        reads = _spread(y, x.shape[2])[:, None] + (_repeat(x, y.shape[2])[None] + first)
        weights = _spread(weight_y, x.shape[2])[:, None] * _repeat(weight_x, y.shape[2])[None]
        yield chosen, reads.flatten(0, 2), weights.flatten(0, 2)


def _spread(values: Tensor, times: int) -> Tensor:
    """[P, n, A * times]: each value of [n, P, A] `times` times in a row."""
    return values.transpose(0, 1).repeat_interleave(times, 2)


def _repeat(values: Tensor, times: int) -> Tensor:
    """[Q, n, times * D]: all values of [n, Q, D] one after the other, `times` times."""
    return values.transpose(0, 1).repeat(1, 1, times)
