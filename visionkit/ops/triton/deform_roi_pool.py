"""Deformable RoI pooling on CUDA: a program takes a few bins, for channels that move together, and walks through their samples."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionkit.ops.score_maps import ScoreMapTable
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
from visionkit.ops.triton.rois import read_rois, round_half_away

# R RoIs, P x Q bins each, D output channels in N classes that move together; a unit is a class of a bin


def forward(input: Tensor, rois: Tensor, offset: Tensor | None, rows: int, columns: int, spatial_scale: float, sampling_ratio: int,
            gamma: float, position_sensitive: bool) -> Tensor:
    """As `visionkit::deform_roi_pool`."""
    layout = ScoreMapTable.of(input, rows * columns if position_sensitive else 1, bin_major=not position_sensitive)
    cells = input.new_empty(len(rois), rows, columns, layout.classes)
    _launch(cells, layout.fill(input, input.dtype), [], layout, rois, offset, spatial_scale, sampling_ratio, gamma)
    return cells.permute(0, 3, 1, 2)


def backward(grad: Tensor, input: Tensor, rois: Tensor, offset: Tensor | None, rows: int, columns: int, spatial_scale: float,
             sampling_ratio: int, gamma: float, position_sensitive: bool) -> tuple[Tensor, Tensor]:
    """As `visionkit::deform_roi_pool_backward`."""
    layout = ScoreMapTable.of(input, rows * columns if position_sensitive else 1, bin_major=not position_sensitive)
    grad_table = input.new_zeros(layout.rows, layout.classes, dtype=torch.float32)
    grad_offset = input.new_empty(0) if offset is None else torch.zeros_like(offset, memory_format=torch.contiguous_format)
    _launch(grad.permute(0, 2, 3, 1).contiguous(), layout.fill(input, input.dtype), [grad_table, grad_offset], layout, rois, offset,
            spatial_scale, sampling_ratio, gamma)
    return layout.unfill(grad_table, input.dtype), grad_offset


def _launch(cells: Tensor, table: Tensor, grads: list[Tensor], layout: ScoreMapTable, rois: Tensor, offset: Tensor | None,
            spatial_scale: float, sampling_ratio: int, gamma: float) -> None:
    """Pool `table` into `cells` [R, P, Q, D], or add what `cells` give back to `grads`, of the table and of `offset`."""
    if not cells.numel():
        return
    regions, rows, columns, channels = cells.shape
    classes = 1 if offset is None else offset.shape[1] // 2
    channels //= classes
    block_units, block_channels = block_sizes(channels, table, adds=bool(grads))
    kernel, blocks = _deform_roi_pool_kernel, triton.cdiv(channels, block_channels)
    if grads:
        kernel, blocks = _deform_roi_pool_backward_kernel, 1                 # which sums over all channels
    with torch.cuda.device_of(cells):
        kernel[triton.cdiv(regions * rows * columns * classes, block_units), blocks](
            cells, table, rois.to(torch.float32).contiguous(), cells if offset is None else offset.contiguous(), *grads, regions,
            layout.batch, layout.height, layout.width, layout.bin_step, layout.pixel_step, float(spatial_scale), float(gamma),
            sampling_ratio, CHANNELS=channels, CLASSES=classes, ROWS=rows, COLUMNS=columns, BINS=layout.bins, MOVED=offset is not None,
            BLOCK_UNITS=block_units, BLOCK_CHANNELS=block_channels, **UNFUSED)


_NUMBERS = ["regions", "batch", "height", "width", "bin_step", "pixel_step", "sampling_ratio"]   # not worth compiling again


@triton.jit(do_not_specialize=_NUMBERS)
def _deform_roi_pool_kernel(
        cells_ptr, map_ptr, rois_ptr, offset_ptr, regions, batch, height, width, bin_step, pixel_step, scale, gamma, sampling_ratio,
        CHANNELS: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BINS: tl.constexpr, MOVED: tl.constexpr,
        BLOCK_UNITS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    unit = tl.program_id(0) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    exists = unit // (CLASSES * ROWS * COLUMNS) < regions
    first_row, start_y, start_x, box_height, box_width, offset_at, sound = _bins(
        rois_ptr, offset_ptr, unit, exists, batch, height, width, bin_step, scale, gamma, CLASSES, ROWS, COLUMNS, BINS, MOVED)
    count_y = _count(start_y, box_height, ROWS, sampling_ratio, height, sound)
    count_x = _count(start_x, box_width, COLUMNS, sampling_ratio, width, sound)
    step_y, step_x = width * pixel_step * CLASSES, pixel_step * CLASSES
    values = tl.zeros((BLOCK_UNITS, BLOCK_CHANNELS), tl.float32)
    for sample_y in range(0, sampling_ratio):
        where_y, counts_y, moves_y = _places(start_y, box_height, ROWS, sample_y, sampling_ratio, height, sound)
        y, top, bottom = pixels_of_zero_padded(where_y, height)
        for sample_x in range(0, sampling_ratio):
            where_x, counts_x, moves_x = _places(start_x, box_width, COLUMNS, sample_x, sampling_ratio, width, sound)
            x, left, right = pixels_of_zero_padded(where_x, width)
            corner = first_row + (y * width + x).to(tl.int64) * step_x
            values += samples(map_ptr, corner, step_y, step_x, top, bottom, left, right, channel, CHANNELS)
    values = tl.where(sound[:, None], values / tl.maximum(count_y * count_x, 1)[:, None], float("nan"))
    write_rows(cells_ptr, unit.to(tl.int64), values, exists, channel, CHANNELS)


@triton.jit(do_not_specialize=_NUMBERS)
def _deform_roi_pool_backward_kernel(
        cells_ptr, map_ptr, rois_ptr, offset_ptr, grad_map_ptr, grad_offset_ptr, regions, batch, height, width, bin_step, pixel_step, scale,
        gamma, sampling_ratio, CHANNELS: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BINS: tl.constexpr,
        MOVED: tl.constexpr, BLOCK_UNITS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    unit = tl.program_id(0) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    exists = unit // (CLASSES * ROWS * COLUMNS) < regions
    first_row, start_y, start_x, box_height, box_width, offset_at, sound = _bins(
        rois_ptr, offset_ptr, unit, exists, batch, height, width, bin_step, scale, gamma, CLASSES, ROWS, COLUMNS, BINS, MOVED)
    count_y = _count(start_y, box_height, ROWS, sampling_ratio, height, sound)
    count_x = _count(start_x, box_width, COLUMNS, sampling_ratio, width, sound)
    share = 1 / tl.maximum(count_y * count_x, 1)
    step_y, step_x = width * pixel_step * CLASSES, pixel_step * CLASSES
    grad_y = tl.zeros((BLOCK_UNITS,), tl.float32)
    grad_x = tl.zeros((BLOCK_UNITS,), tl.float32)
    for first_channel in range(0, CHANNELS, BLOCK_CHANNELS):
        channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
        grad = read_rows(cells_ptr, unit.to(tl.int64), sound, channel, CHANNELS) * share[:, None]
        for sample_y in range(0, sampling_ratio):
            where_y, counts_y, moves_y = _places(start_y, box_height, ROWS, sample_y, sampling_ratio, height, sound)
            y, top, bottom = pixels_of_zero_padded(where_y, height)
            for sample_x in range(0, sampling_ratio):
                where_x, counts_x, moves_x = _places(start_x, box_width, COLUMNS, sample_x, sampling_ratio, width, sound)
                x, left, right = pixels_of_zero_padded(where_x, width)
                corner = first_row + (y * width + x).to(tl.int64) * step_x
                if MOVED:
                    sample, slope_y, slope_x = samples_and_slopes(map_ptr, corner, step_y, step_x, y, x, height, width, top, bottom, left,
                                                                  right, channel, CHANNELS)
                    grad_y += tl.where(moves_y, tl.sum(grad * slope_y, 1), 0)
                    grad_x += tl.where(moves_x, tl.sum(grad * slope_x, 1), 0)
                add_to_corners(grad_map_ptr, corner, step_y, step_x, top, bottom, left, right, grad, channel, CHANNELS)
    if MOVED:
        grad_y *= gamma * box_height
        grad_x *= gamma * box_width
        tl.store(grad_offset_ptr + offset_at, grad_x.to(grad_offset_ptr.dtype.element_ty), mask=exists)
        tl.store(grad_offset_ptr + offset_at + ROWS * COLUMNS, grad_y.to(grad_offset_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _bins(rois_ptr, offset_ptr, unit, exists, batch, height, width, bin_step, scale, gamma, CLASSES: tl.constexpr, ROWS: tl.constexpr,
          COLUMNS: tl.constexpr, BINS: tl.constexpr, MOVED: tl.constexpr):
    """Of each unit: the row of its class at the first pixel of its map, where its bin starts along y and x, height and width of its RoI,
    where its offset along x stands, P * Q before that along y, and whether the RoI is sound."""
    cell, moves_with = unit // CLASSES, unit % CLASSES
    roi, bin = cell // (ROWS * COLUMNS), cell % (ROWS * COLUMNS)
    image, x1, y1, x2, y2, sound = read_rois(rois_ptr, roi, exists, batch)
    start_y, start_x = round_half_away(y1) * scale - 0.5, round_half_away(x1) * scale - 0.5
    box_height = tl.maximum((round_half_away(y2) + 1) * scale - 0.5 - start_y, 0.1)
    box_width = tl.maximum((round_half_away(x2) + 1) * scale - 0.5 - start_x, 0.1)
    start_y += bin // COLUMNS * tl.div_rn(box_height, ROWS * 1.0)
    start_x += bin % COLUMNS * tl.div_rn(box_width, COLUMNS * 1.0)
    offset_at = (roi.to(tl.int64) * CLASSES + moves_with) * (2 * ROWS * COLUMNS) + bin
    if MOVED:
        start_x += tl.load(offset_ptr + offset_at, mask=exists, other=0).to(tl.float32) * gamma * box_width
        start_y += tl.load(offset_ptr + offset_at + ROWS * COLUMNS, mask=exists, other=0).to(tl.float32) * gamma * box_height
    first_row = (image * BINS * height * width + cell % BINS * bin_step) * CLASSES + moves_with
    return first_row, start_y, start_x, box_height, box_width, offset_at, sound


@triton.jit
def _places(start, length, BINS: tl.constexpr, sample, sampling_ratio, size, sound):
    """Along an axis, where a sample of each bin lies, -1 if it does not count; 1 if it counts, else 0; whether it moves with the offset."""
    where = start + tl.div_rn(length, BINS * 1.0) * tl.div_rn(sample * 1.0, sampling_ratio * 1.0)
    moves = sound & (where >= 0) & (where < size - 1)
    counts = tl.where((where < -0.5) | (where > size - 0.5), 0.0, sound.to(tl.float32))     # what is not a number counts, to be seen
    where = tl.where(where < 0, 0.0, tl.where(where > size - 1, size - 1, where))
    return tl.where(counts > 0, where, -1.0), counts, moves


@triton.jit
def _count(start, length, BINS: tl.constexpr, sampling_ratio, size, sound):
    """Along an axis, how many samples of each bin count."""
    count = tl.zeros_like(start)
    for sample in range(0, sampling_ratio):
        where, counts, moves = _places(start, length, BINS, sample, sampling_ratio, size, sound)
        count += counts
    return count
