"""RoIAlign on CUDA: a program takes a few output cells and a block of channels, and walks through the samples of its cells."""
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionkit.ops.triton.bilinear import UNFUSED, add_to_corners, block_sizes, pixels_of_region, read_rows, samples, write_rows
from visionkit.ops.triton.rois import read_rois

# R RoIs, P x Q output cells each, D channels


def forward(inputs: Sequence[Tensor], rois: Tensor, levels: Tensor, rows: int, columns: int, spatial_scales: Sequence[float],
            sampling_ratio: int, aligned: bool) -> Tensor:
    """As `visionkit::roi_align`; a RoI of no level that there is pools to NaN."""
    batch, channels = inputs[0].shape[:2]
    cells = inputs[0].new_empty(len(rois), rows, columns, channels)
    maps = [input.permute(0, 2, 3, 1).contiguous() for input in inputs]      # no copy where they lie channels-last
    sizes = [input.shape[2:] for input in inputs]
    launch(cells, maps, batch, sizes, rois, levels, spatial_scales, sampling_ratio, aligned, backward=False)
    return cells.permute(0, 3, 1, 2)


def backward(grad: Tensor, rois: Tensor, levels: Tensor, batch: int, sizes: Sequence[int], spatial_scales: Sequence[float],
             sampling_ratio: int, aligned: bool) -> list[Tensor]:
    """As `visionkit::roi_align_backward`."""
    cells = grad.permute(0, 2, 3, 1).contiguous()
    sizes = list(zip(sizes[::2], sizes[1::2], strict=True))
    maps = [grad.new_zeros(batch, *size, grad.shape[1], dtype=torch.float32) for size in sizes]
    launch(cells, maps, batch, sizes, rois, levels, spatial_scales, sampling_ratio, aligned, backward=True)
    return [map.to(grad.dtype).permute(0, 3, 1, 2) for map in maps]


def launch(cells: Tensor, maps: Sequence[Tensor], batch: int, sizes: Sequence[tuple[int, int]], rois: Tensor, levels: Tensor,
           spatial_scales: Sequence[float], sampling_ratio: int, aligned: bool, *, backward: bool, bins: int = 1, bin_step: int = 0,
           pixel_step: int = 1) -> None:
    """Pool `maps` into `cells`, or add what `cells` give back to `maps`, then of float32.

    Each level is a launch that leaves out the cells of the others: one launch for all would need their sizes in a tensor, and copying that
    to the GPU waits, and breaks the capture of a CUDA graph.

    Args:
        cells: [R, P, Q, D].
        maps: of each level, rows of D channels; the images follow each other.
        sizes: of each level, (H_l, W_l).
        bins: rows of a pixel: 1, or P * Q where each cell reads rows of its own.
        bin_step, pixel_step: rows from one bin to the next, and from one pixel.
    """
    if not cells.numel():
        return
    regions, rows, columns, channels = cells.shape
    block_cells, block_channels = block_sizes(channels, maps[0], adds=backward)
    grid = triton.cdiv(regions * rows * columns, block_cells), triton.cdiv(channels, block_channels)
    rois, levels = rois.to(torch.float32).contiguous(), levels.contiguous()
    with torch.cuda.device_of(cells):
        for level, (map, size, scale) in enumerate(zip(maps, sizes, spatial_scales, strict=True)):
            _roi_align_kernel[grid](
                cells, map, rois, levels, regions, batch, *size, bin_step, pixel_step, float(scale), sampling_ratio, level, len(maps),
                CHANNELS=channels, ROWS=rows, COLUMNS=columns, BINS=bins, ALIGNED=aligned, BACKWARD=backward, BLOCK_CELLS=block_cells,
                BLOCK_CHANNELS=block_channels, **UNFUSED)


@triton.jit(do_not_specialize=["regions", "batch", "height", "width", "bin_step", "pixel_step", "sampling_ratio", "level", "levels"])
def _roi_align_kernel(
        cells_ptr, map_ptr, rois_ptr, levels_ptr, regions, batch, height, width, bin_step, pixel_step, scale, sampling_ratio, level,
        levels, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BINS: tl.constexpr, ALIGNED: tl.constexpr,
        BACKWARD: tl.constexpr, BLOCK_CELLS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    cell = tl.program_id(0) * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    roi = cell // (ROWS * COLUMNS)
    its_level = tl.load(levels_ptr + roi, mask=roi < regions, other=0)
    is_a_level = (its_level >= 0) & (its_level < levels)
    mine = (roi < regions) & (tl.where(is_a_level, its_level, 0) == level)
    if tl.max(mine.to(tl.int32), 0) > 0:
        image, x1, y1, x2, y2, sound = read_rois(rois_ptr, roi, mine, batch)
        sound = sound & is_a_level
        shift = 0.5 if ALIGNED else 0.0
        start_y, start_x = y1 * scale - shift, x1 * scale - shift
        box_height, box_width = y2 * scale - shift - start_y, x2 * scale - shift - start_x
        if not ALIGNED:                                                     # the first RoIAlign forces RoIs to at least one pixel
            box_height, box_width = tl.maximum(box_height, 1), tl.maximum(box_width, 1)
        cell_y, cell_x = cell // COLUMNS % ROWS, cell % COLUMNS
        count_y, first_y, last_y = _samples_of_cells(start_y, box_height, cell_y, ROWS, sampling_ratio, height, sound)
        count_x, first_x, last_x = _samples_of_cells(start_x, box_width, cell_x, COLUMNS, sampling_ratio, width, sound)
        most_y, most_x = tl.max(last_y - first_y, 0), tl.max(last_x - first_x, 0)
        share = 1 / tl.maximum(count_y * count_x, 1)
        first_row = image * BINS * height * width + cell % BINS * bin_step
        if BACKWARD:
            values = read_rows(cells_ptr, cell.to(tl.int64), sound, channel, CHANNELS) * share[:, None]
        else:
            values = tl.zeros((BLOCK_CELLS, BLOCK_CHANNELS), tl.float32)
        for step_y in range(0, most_y):
            sample_y = first_y + step_y
            where_y = start_y + box_height * tl.div_rn(cell_y * count_y + sample_y + 0.5, ROWS * count_y)
            y, top, bottom = pixels_of_region(where_y, sample_y < last_y, height)
            for step_x in range(0, most_x):
                sample_x = first_x + step_x
                where_x = start_x + box_width * tl.div_rn(cell_x * count_x + sample_x + 0.5, COLUMNS * count_x)
                x, left, right = pixels_of_region(where_x, sample_x < last_x, width)
                corner = first_row + (y * width + x).to(tl.int64) * pixel_step
                if BACKWARD:
                    add_to_corners(map_ptr, corner, width * pixel_step, pixel_step, top, bottom, left, right, values, channel, CHANNELS)
                else:
                    values += samples(map_ptr, corner, width * pixel_step, pixel_step, top, bottom, left, right, channel, CHANNELS)
        if not BACKWARD:
            values = tl.where(sound[:, None], values * share[:, None], float("nan"))
            write_rows(cells_ptr, cell.to(tl.int64), values, mine, channel, CHANNELS)


@triton.jit
def _samples_of_cells(start, length, cell, CELLS: tl.constexpr, sampling_ratio, size, sound):
    """Along an axis, the number of samples of each cell, the first of them that may lie on the map, and the one after the last that may.

    Only with a `sampling_ratio` of -1 are any left out: there, a RoI far larger than the map, as of a model that diverges, has too many."""
    length_of_cell = tl.div_rn(length, CELLS * 1.0)                         # its ceiling must be the portable one
    count = tl.where(sampling_ratio > 0, sampling_ratio, tl.ceil(length_of_cell))
    count = tl.where(sound, tl.minimum(count, 1 << 20), 0)
    start_of_cell = start + length_of_cell * cell
    a_pixel = count / length_of_cell
    first = tl.where(sampling_ratio > 0, 0, tl.floor((-1 - start_of_cell) * a_pixel - 1))
    last = tl.where(sampling_ratio > 0, count, tl.ceil((size - start_of_cell) * a_pixel + 1))
    first = tl.where(first > 0, tl.minimum(first, count), 0)
    last = tl.where(last < count, tl.maximum(last, first), count)
    return count, first.to(tl.int32), last.to(tl.int32)
