"""Position-sensitive RoI pooling on CUDA: a program takes a few bins and a block of classes, and walks through the pixels of its bins."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionkit.ops.score_maps import ScoreMapTable
from visionkit.ops.triton.bilinear import UNFUSED, add_to_rows, block_sizes, read_rows, write_rows
from visionkit.ops.triton.rois import read_rois, round_half_away

# R RoIs, P x Q bins each, C classes


def forward(input: Tensor, rois: Tensor, rows: int, columns: int, spatial_scale: float, rule: str, bin_major: bool) -> Tensor:
    """As `visionkit::ps_roi_pool`."""
    layout = ScoreMapTable.of(input, rows * columns, bin_major=bin_major)
    cells = input.new_empty(len(rois), rows, columns, layout.classes)
    _launch(cells, layout.fill(input, input.dtype), layout, rois, spatial_scale, rule, backward=False)
    return cells.permute(0, 3, 1, 2).contiguous()


def backward(grad: Tensor, rois: Tensor, batch: int, height: int, width: int, spatial_scale: float, rule: str, bin_major: bool,
             channels_last: bool) -> Tensor:
    """As `visionkit::ps_roi_pool_backward`."""
    _, classes, rows, columns = grad.shape
    shape = torch.Size((batch, classes * rows * columns, height, width))
    layout = ScoreMapTable(shape, rows * columns, channels_last=channels_last, bin_major=bin_major)
    table = grad.new_zeros(layout.rows, classes, dtype=torch.float32)
    _launch(grad.permute(0, 2, 3, 1).contiguous(), table, layout, rois, spatial_scale, rule, backward=True)
    return layout.unfill(table, grad.dtype)


def _launch(cells: Tensor, table: Tensor, layout: ScoreMapTable, rois: Tensor, spatial_scale: float, rule: str, *, backward: bool) -> None:
    """Pool `table` into `cells` [R, P, Q, C], or add what `cells` give back to `table`, then of float32."""
    if not cells.numel():
        return
    regions, rows, columns, classes = cells.shape
    block_cells, block_channels = block_sizes(classes, table, adds=backward)
    grid = triton.cdiv(regions * rows * columns, block_cells), triton.cdiv(classes, block_channels)
    with torch.cuda.device_of(cells):
        _ps_roi_pool_kernel[grid](
            cells, table, rois.to(torch.float32).contiguous(), regions, layout.batch, layout.height, layout.width, layout.bin_step,
            layout.pixel_step, float(spatial_scale), CHANNELS=classes, ROWS=rows, COLUMNS=columns, R_FCN=rule == "r_fcn", BACKWARD=backward,
            BLOCK_CELLS=block_cells, BLOCK_CHANNELS=block_channels, **UNFUSED)


@triton.jit(do_not_specialize=["regions", "batch", "height", "width", "bin_step", "pixel_step"])
def _ps_roi_pool_kernel(
        cells_ptr, map_ptr, rois_ptr, regions, batch, height, width, bin_step, pixel_step, scale, CHANNELS: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, R_FCN: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_CELLS: tl.constexpr,
        BLOCK_CHANNELS: tl.constexpr):
    cell = tl.program_id(0) * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    roi, bin = cell // (ROWS * COLUMNS), cell % (ROWS * COLUMNS)
    image, x1, y1, x2, y2, sound = read_rois(rois_ptr, roi, roi < regions, batch)
    top, bottom = _edges(y1, y2, bin // COLUMNS, ROWS, height, scale, sound, R_FCN)
    left, right = _edges(x1, x2, bin % COLUMNS, COLUMNS, width, scale, sound, R_FCN)
    most_y, most_x = tl.max(bottom - top, 0), tl.max(right - left, 0)
    pixels = tl.maximum((bottom - top) * (right - left), 1).to(tl.float32)
    first_row = image * (ROWS * COLUMNS) * height * width + bin * bin_step
    if BACKWARD:
        values = read_rows(cells_ptr, cell.to(tl.int64), sound, channel, CHANNELS) / pixels[:, None]
    else:
        values = tl.zeros((BLOCK_CELLS, BLOCK_CHANNELS), tl.float32)
    for step_y in range(0, most_y):
        for step_x in range(0, most_x):
            y, x = top + step_y, left + step_x
            row, inside = first_row + (y * width + x).to(tl.int64) * pixel_step, (y < bottom) & (x < right)
            if BACKWARD:
                add_to_rows(map_ptr, row, inside.to(tl.float32), values, channel, CHANNELS)
            else:
                values += read_rows(map_ptr, row, inside, channel, CHANNELS)
    if not BACKWARD:
        write_rows(cells_ptr, cell.to(tl.int64), values / pixels[:, None], roi < regions, channel, CHANNELS)


@triton.jit
def _edges(low, high, bin, BINS: tl.constexpr, size, scale, sound, R_FCN: tl.constexpr):
    """First pixel and the one after the last of each bin along an axis, from the corners of its RoI, image pixels. No pixel if that is not
    sound."""
    if R_FCN:
        low, high = round_half_away(low) * scale, (round_half_away(high) + 1) * scale
        length, limit = tl.maximum(high - low, 0.1), size
    else:
        low, high = round_half_away(low * scale), round_half_away(high * scale)
        length, limit = tl.maximum(high - low, 1.0), size - 1
    length = tl.div_rn(length, BINS * 1.0)                                  # of a bin
    if R_FCN:
        first, last = tl.floor(bin * length + low), tl.ceil((bin + 1) * length + low)
    else:
        first, last = tl.floor(bin * length) + low, tl.ceil((bin + 1) * length) + low
    first = tl.where(sound, tl.minimum(tl.maximum(first, 0.0), limit), 0.0).to(tl.int32)
    last = tl.where(sound, tl.minimum(tl.maximum(last, 0.0), limit), 0.0).to(tl.int32)
    return first, last
