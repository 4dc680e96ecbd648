"""Multi-scale deformable attention (Zhu et al. 2021, Deformable DETR, arXiv:2010.04159, eq. 3).

Each query and head reads a few points on each level of a feature pyramid, bilinearly, and sums them with its attention weights: one bag of
4 L P rows.
"""
from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor, nn

from visionkit.ops import bilinear
from visionkit.ops.tiers import kernels
from visionkit.ops.weighted_gather import gather, gather_weights_gradient, index_dtype
from visionkit.registry import OPS

# N images, S = sum of H_l W_l pixels of all levels, M heads, D channels a head, Q queries, L levels, P points a level

_BLOCK_BYTES = 24 << 20     # what the reads and weights of a block of queries may take


def ms_deform_attn(value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, sampling_locations: Tensor,
                   attention_weights: Tensor) -> Tensor:
    """Attention over a few sampled points of each level.

    Args:
        value: [N, S, M, D], the levels one after the other, each row by row.
        spatial_shapes: [L, 2] int64, (H_l, W_l).
        level_start_index: [L] int64, where each level starts in S.
        sampling_locations: [N, Q, M, L, P, 2] as (x, y), 0 and 1 being the outer edges of the first and the last pixel; outside, samples
            fade to 0 over one pixel.
        attention_weights: [N, Q, M, L, P], usually a softmax over the L * P points.

    Returns:
        [N, Q, M * D] in the dtype of `value`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    _check(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    return torch.ops.visionkit.ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)


def _check(value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, sampling_locations: Tensor, attention_weights: Tensor) -> None:
    for name, tensor, letters in (("value", value, "N, S, M, D"), ("spatial_shapes", spatial_shapes, "L, 2"),
                                  ("sampling_locations", sampling_locations, "N, Q, M, L, P, 2"),
                                  ("attention_weights", attention_weights, "N, Q, M, L, P")):
        if tensor.ndim != letters.count(",") + 1:
            raise ValueError(f"{name} must be [{letters}], got {list(tensor.shape)}")
    for name, tensor in (("sampling_locations", sampling_locations), ("attention_weights", attention_weights)):
        if tensor.device != value.device:
            raise ValueError(f"value is on {value.device}, {name} on {tensor.device}; move one")
    for name, tensor in (("spatial_shapes", spatial_shapes), ("level_start_index", level_start_index)):
        if tensor.is_floating_point():
            raise ValueError(f"{name} must be integers, got {tensor.dtype}")
    images, _, heads, _ = value.shape
    levels = len(spatial_shapes)
    expected = (images, sampling_locations.shape[1], heads, levels, sampling_locations.shape[4], 2)
    if sampling_locations.shape != expected:
        raise ValueError(f"sampling_locations must be [N, Q, M, L, P, 2] = {list(expected)} for value {list(value.shape)} and {levels} "
                         f"levels, got {list(sampling_locations.shape)}")
    if attention_weights.shape != expected[:-1]:
        raise ValueError(f"attention_weights must be {list(expected[:-1])}, one for each sampling location, "
                         f"got {list(attention_weights.shape)}")
    if level_start_index.shape != (levels,):
        raise ValueError(f"level_start_index must be [{levels}], one for each level, got {list(level_start_index.shape)}")


@OPS.register_module()
class MSDeformAttn(nn.Module):
    """`ms_deform_attn` as a module without weights; projections belong to the layer that uses it."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, sampling_locations: Tensor,
                attention_weights: Tensor) -> Tensor:
        return ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)


@torch.library.custom_op("visionkit::ms_deform_attn", mutates_args=())
def _ms_deform_attn(value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, sampling_locations: Tensor,
                    attention_weights: Tensor) -> Tensor:
    if triton := kernels("ms_deform_attn", value):
        return triton.forward(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    images, queries, heads, levels, points, _ = sampling_locations.shape
    pyramid = _Pyramid(value, spatial_shapes, level_start_index, points)
    output = pyramid.table.new_zeros(images, queries, heads, value.shape[3])
    for block in _query_blocks(sampling_locations):
        low_y, low_x, upper_y, upper_x = pyramid.positions(sampling_locations[:, block])
        weights = bilinear.corner_weights(upper_y, upper_x, attention_weights[:, block].flatten(3).to(upper_x.dtype))
        reads = pyramid.reads(pyramid.cells(low_y, low_x)).view(-1, levels * points * 4)
        output[:, block] = gather(pyramid.table, reads, torch.stack(weights, -1).view(reads.shape)).view(output[:, block].shape)
    return output.flatten(2).to(value.dtype)


@_ms_deform_attn.register_fake
def _(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    return value.new_empty(value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])


@torch.library.custom_op("visionkit::ms_deform_attn_backward", mutates_args=())
def _ms_deform_attn_backward(grad: Tensor, value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, sampling_locations: Tensor,
                             attention_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if triton := kernels("ms_deform_attn", value):
        return triton.backward(grad, value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    levels, points = sampling_locations.shape[3:5]
    pyramid = _Pyramid(value, spatial_shapes, level_start_index, points)
    grad_table = torch.zeros_like(pyramid.table)
    grad_locations = torch.empty_like(sampling_locations, memory_format=torch.contiguous_format)
    grad_weights = torch.empty_like(attention_weights, memory_format=torch.contiguous_format)
    for block in _query_blocks(sampling_locations):
        low_y, low_x, upper_y, upper_x = pyramid.positions(sampling_locations[:, block])
        moves_y, moves_x = bilinear.moves(low_y, upper_y), bilinear.moves(low_x, upper_x)
        attention = attention_weights[:, block].flatten(3).to(upper_x.dtype)
        weights = bilinear.corner_weights(upper_y, upper_x, attention)
        grads = grad[:, block].reshape(-1, value.shape[3]).to(upper_x.dtype)
        cells = pyramid.cells(low_y, low_x)
        for level in range(levels):                                         # one at a time: a sort of its own narrow part of the table
            of_level = slice(level * points, (level + 1) * points)
            bilinear.scatter_corners(cells[..., of_level].flatten(), [weight[..., of_level].flatten() for weight in weights],
                                     pyramid.corners(level), grads, grad_table)
        reads = pyramid.reads(cells)
        corners = gather_weights_gradient(grads, pyramid.table, reads.view(-1, levels * points * 4)).view(reads.shape)
        sampled, grad_y, grad_x = bilinear.sample_and_slopes(corners, upper_y, upper_x)
        grad_x.mul_(attention).mul_(moves_x).mul_(pyramid.widths)           # locations are in units of the map's size
        grad_y.mul_(attention).mul_(moves_y).mul_(pyramid.heights)
        grad_weights[:, block] = sampled.view(grad_weights[:, block].shape)
        grad_locations[:, block] = torch.stack([grad_x, grad_y], -1).view(grad_locations[:, block].shape)
    return pyramid.without_border(grad_table).to(value.dtype), grad_locations, grad_weights


@_ms_deform_attn_backward.register_fake
def _(grad, value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    variables = (value, sampling_locations, attention_weights)
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in variables)


def _save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple:
    grad_value, grad_locations, grad_weights = torch.ops.visionkit.ms_deform_attn_backward(grad, *ctx.saved_tensors)
    return grad_value, None, None, grad_locations, grad_weights


_ms_deform_attn.register_autograd(_backward, setup_context=_save_for_backward)


class _Pyramid:
    """The levels of `value` as one table, [N, H_l + 2, W_l + 2, M] rows of D channels for each level, with zeros around each map."""

    def __init__(self, value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, points: int) -> None:
        self.value, self.sizes, self.starts = value, spatial_shapes.tolist(), level_start_index.tolist()
        for (height, width), start in zip(self.sizes, self.starts, strict=True):
            if start < 0 or start + height * width > value.shape[1]:
                raise ValueError(f"a level of {height}x{width} pixels that starts at {start} does not lie in the {value.shape[1]} "
                                 f"pixels of value; check spatial_shapes and level_start_index")
        images, _, self.heads, channels = value.shape
        self.rows = [images * (height + 2) * (width + 2) * self.heads for height, width in self.sizes]
        self.table = value.new_zeros(sum(self.rows), channels, dtype=torch.promote_types(value.dtype, torch.float32))
        for (height, width), start, padded in zip(self.sizes, self.starts, self._maps(self.table), strict=True):
            padded[:, 1:-1, 1:-1] = value[:, start:start + height * width].view(images, height, width, self.heads, channels)

        def of_each_point(values: list, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=value.device).repeat_interleave(points)           # [L * P]

        heights, widths = zip(*self.sizes, strict=True)
        self.heights, self.widths = of_each_point(heights, self.table.dtype), of_each_point(widths, self.table.dtype)
        index = index_dtype(len(self.table))
        self.row_steps = of_each_point([(width + 2) * self.heads for width in widths], index)
        image_rows = of_each_point([rows // max(images, 1) for rows in self.rows], index)
        level_starts = of_each_point(list(accumulate(self.rows[:-1], initial=0)), index)
        image, head = (torch.arange(count, dtype=index, device=value.device) for count in (images, self.heads))
        self.map_starts = image[:, None, None, None] * image_rows + level_starts + head[:, None]            # [N, 1, M, L * P]

    def positions(self, locations: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each sample, [N, Q, M, L * P]: row and column of its cell's first corner in its padded map, and the weights of the lower and
        right corners."""
        x, y = locations.flatten(3, 4).to(self.table.dtype).unbind(-1)
        low_y, upper_y = bilinear.axis_cells(y * self.heights - 0.5, self.heights)
        low_x, upper_x = bilinear.axis_cells(x * self.widths - 0.5, self.widths)
        return low_y, low_x, upper_y, upper_x

    def cells(self, low_y: Tensor, low_x: Tensor) -> Tensor:
        """Table row of each sample's first corner."""
        return (low_y * self.row_steps).add_(low_x, alpha=self.heads).add_(self.map_starts)

    def reads(self, cells: Tensor) -> Tensor:
        """[..., 4] table rows of all corners."""
        below = cells + self.row_steps
        return torch.stack([cells, cells + self.heads, below, below + self.heads], -1)

    def corners(self, level: int) -> tuple[int, int, int, int]:
        """Table rows from the first corner of a cell to each."""
        row = (self.sizes[level][1] + 2) * self.heads
        return 0, self.heads, row, row + self.heads

    def without_border(self, table: Tensor) -> Tensor:
        """`table` in the shape of `value`."""
        value = torch.zeros_like(self.value, dtype=table.dtype, memory_format=torch.contiguous_format)
        for (height, width), start, padded in zip(self.sizes, self.starts, self._maps(table), strict=True):
            value[:, start:start + height * width] = padded[:, 1:-1, 1:-1].flatten(1, 2)
        return value

    def _maps(self, table: Tensor) -> list[Tensor]:
        return [rows.view(len(self.value), height + 2, width + 2, self.heads, table.shape[1])
                for rows, (height, width) in zip(table.split(self.rows), self.sizes, strict=True)]


def _query_blocks(sampling_locations: Tensor) -> Iterator[slice]:
    images, queries, heads, levels, points, _ = sampling_locations.shape
    step = max(1, _BLOCK_BYTES // (max(images * heads * levels * points, 1) * 64))
    return (slice(start, min(start + step, queries)) for start in range(0, queries if images else 0, step))
