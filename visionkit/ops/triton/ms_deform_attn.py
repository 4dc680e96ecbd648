"""Multi-scale deformable attention on CUDA: a program takes the heads of a few queries, and walks through the points that they look at."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionkit.ops.triton.bilinear import (
    UNFUSED,
    add_to_corners,
    block_sizes,
    pixels_of_zero_padded,
    read_rows,
    samples,
    samples_and_slopes,
    write_rows,
)

# N images, S pixels of all levels, M heads, D channels a head, Q queries, L levels, P points a level; a cell is a head of a query


def forward(value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, sampling_locations: Tensor,
            attention_weights: Tensor) -> Tensor:
    """As `visionkit::ms_deform_attn`; where a level does not lie within the pixels of `value`, all is NaN."""
    output = value.new_empty(value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])
    _launch(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, [output], backward=False)
    return output


def backward(grad: Tensor, value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, sampling_locations: Tensor,
             attention_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `visionkit::ms_deform_attn_backward`."""
    grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    grad_locations = torch.zeros_like(sampling_locations, memory_format=torch.contiguous_format)
    grad_weights = torch.zeros_like(attention_weights, memory_format=torch.contiguous_format)
    _launch(value, spatial_shapes, level_start_index, sampling_locations, attention_weights,
            [grad.contiguous(), grad_value, grad_locations, grad_weights], backward=True)
    return grad_value.to(value.dtype), grad_locations, grad_weights


def _launch(value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, sampling_locations: Tensor, attention_weights: Tensor,
            results: list[Tensor], *, backward: bool) -> None:
    images, pixels, heads, channels = value.shape
    queries, _, levels, points = attention_weights.shape[1:]
    cells = images * queries * heads
    if not cells * channels:
        return
    shapes, starts = spatial_shapes.to(value.device).contiguous(), level_start_index.to(value.device).contiguous()
    block_cells, block_channels = block_sizes(channels, value, adds=backward)
    kernel, blocks = _ms_deform_attn_kernel, triton.cdiv(channels, block_channels)
    if backward:
        kernel, blocks = _ms_deform_attn_backward_kernel, 1                  # which sums over all channels
    with torch.cuda.device_of(value):
        kernel[triton.cdiv(cells, block_cells), blocks](
            value.contiguous(), shapes, starts, sampling_locations.contiguous(), attention_weights.contiguous(), *results, cells, queries,
            pixels, HEADS=heads, CHANNELS=channels, LEVELS=levels, POINTS=points, BLOCK_CELLS=block_cells, BLOCK_CHANNELS=block_channels,
            **UNFUSED)


@triton.jit(do_not_specialize=["cells", "queries", "pixels"])
def _ms_deform_attn_kernel(
        value_ptr, shapes_ptr, starts_ptr, locations_ptr, weights_ptr, output_ptr, cells, queries, pixels, HEADS: tl.constexpr,
        CHANNELS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, BLOCK_CELLS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    cell = tl.program_id(0) * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    exists = cell < cells
    first_pixel, head = (cell // (queries * HEADS)).to(tl.int64) * pixels, cell % HEADS
    total = tl.zeros((BLOCK_CELLS, BLOCK_CHANNELS), tl.float32)
    for level in range(0, LEVELS):
        height, width, start, fits = _level(shapes_ptr, starts_ptr, level, pixels)
        total += tl.where(fits, 0.0, float("nan"))
        for point in range(0, POINTS):
            at = (cell.to(tl.int64) * LEVELS + level) * POINTS + point
            y, top, bottom, x, left, right, weight = _point(locations_ptr, weights_ptr, at, exists, height, width)
            corner = (first_pixel + start + y * width + x) * HEADS + head
            total += samples(value_ptr, corner, width * HEADS, HEADS, top * weight, bottom * weight, left, right, channel, CHANNELS)
    write_rows(output_ptr, cell.to(tl.int64), total, exists, channel, CHANNELS)


@triton.jit(do_not_specialize=["cells", "queries", "pixels"])
def _ms_deform_attn_backward_kernel(
        value_ptr, shapes_ptr, starts_ptr, locations_ptr, weights_ptr, grad_ptr, grad_value_ptr, grad_locations_ptr, grad_weights_ptr,
        cells, queries, pixels, HEADS: tl.constexpr, CHANNELS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
        BLOCK_CELLS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    cell = tl.program_id(0) * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    exists = cell < cells
    first_pixel, head = (cell // (queries * HEADS)).to(tl.int64) * pixels, cell % HEADS
    for level in range(0, LEVELS):
        height, width, start, fits = _level(shapes_ptr, starts_ptr, level, pixels)
        for point in range(0, POINTS):
            at = (cell.to(tl.int64) * LEVELS + level) * POINTS + point
            y, top, bottom, x, left, right, weight = _point(locations_ptr, weights_ptr, at, exists, height, width)
            corner = (first_pixel + start + y * width + x) * HEADS + head
            grad_y = tl.zeros((BLOCK_CELLS,), tl.float32)
            grad_x = tl.zeros((BLOCK_CELLS,), tl.float32)
            grad_weight = tl.zeros((BLOCK_CELLS,), tl.float32)
            for first_channel in range(0, CHANNELS, BLOCK_CHANNELS):
                channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
                grad = read_rows(grad_ptr, cell.to(tl.int64), exists, channel, CHANNELS)
                sample, slope_y, slope_x = samples_and_slopes(value_ptr, corner, width * HEADS, HEADS, y, x, height, width, top, bottom,
                                                              left, right, channel, CHANNELS)
                grad_y += tl.sum(grad * slope_y, 1)
                grad_x += tl.sum(grad * slope_x, 1)
                grad_weight += tl.sum(grad * sample, 1)
                add_to_corners(grad_value_ptr, corner, width * HEADS, HEADS, top * weight, bottom * weight, left, right, grad, channel,
                               CHANNELS)
            grad_y *= weight * height                                       # locations are in units of the map's size
            grad_x *= weight * width
            tl.store(grad_locations_ptr + at * 2, grad_x.to(grad_locations_ptr.dtype.element_ty), mask=exists)
            tl.store(grad_locations_ptr + at * 2 + 1, grad_y.to(grad_locations_ptr.dtype.element_ty), mask=exists)
            tl.store(grad_weights_ptr + at, grad_weight.to(grad_weights_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _level(shapes_ptr, starts_ptr, level, pixels):
    """Height, width and first pixel of a level, and whether it lies within the pixels there are; one that does not has a height of 0."""
    height, width = tl.load(shapes_ptr + level * 2).to(tl.int64), tl.load(shapes_ptr + level * 2 + 1).to(tl.int64)
    start = tl.load(starts_ptr + level).to(tl.int64)
    fits = (start >= 0) & (height >= 0) & (width >= 0) & (start + height * width <= pixels)
    return tl.where(fits, height, 0).to(tl.int32), width.to(tl.int32), start, fits


@triton.jit
def _point(locations_ptr, weights_ptr, at, exists, height, width):
    """Of the point that each cell looks at: its pixel and weights along y, those along x, and its attention weight."""
    where_x = tl.load(locations_ptr + at * 2, mask=exists, other=0).to(tl.float32) * width - 0.5
    where_y = tl.load(locations_ptr + at * 2 + 1, mask=exists, other=0).to(tl.float32) * height - 0.5
    weight = tl.load(weights_ptr + at, mask=exists, other=0).to(tl.float32)
    y, top, bottom = pixels_of_zero_padded(where_y, height)
    x, left, right = pixels_of_zero_padded(tl.where(exists, where_x, -1), width)         # -1 is outside
    return y, top, bottom, x, left, right, weight
