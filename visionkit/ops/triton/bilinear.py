"""What the kernels share: bilinear samples of channels-last maps, in blocks of N positions by C channels.

Along an axis a position lies between a pixel and the next, with a weight for each; `pixels_of_*` give them by an op's rule for the border.
Of the four corners, `corner` [N] is the row of the map, [rows, CHANNELS], for the top left one; the others are `step_y` and `step_x` rows
further. Rows with a weight of 0 may be anywhere, they are not touched. Nor are those whose weight is not a number; the sample is NaN all
the same.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_THREADS = 128                              # of a program: Triton's four warps
UNFUSED = {"enable_fp_fusion": False}       # for every launch: at borders the last bit decides, and it must be the portable one


def block_sizes(channels: int, map: Tensor, *, adds: bool) -> tuple[int, int]:
    """N and C of a program's blocks, powers of two, such that a thread has one position, and the channels that one instruction takes.

    Args:
        channels: in a row of the map.
        map: whose rows are read.
        adds: rows of its gradient are added to.
    """
    widest = 16 // map.dtype.itemsize if not adds else 4 if _adds_four(map.device) else 1
    vector = min(channels & -channels, widest)                              # in every row aligned to its size
    block_channels = min(triton.next_power_of_2(channels), 256, _THREADS * vector)
    return _THREADS * vector // block_channels, block_channels


def _adds_four(device: torch.device) -> bool:
    """Whether an atomic addition takes four floats, as on Hopper, or one."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def pixels_of_region(where, counts, size):
    """Pixel below each position, and the weights of it and of the next, by RoIAlign's rule: the outermost pixel reaches one pixel further
    out. Positions beyond, and those that do not count or are not numbers, have weights of 0."""
    counts = counts & (where >= -1) & (where <= tl.where(size > 0, size, -2))
    where = tl.where(counts, tl.minimum(tl.maximum(where, 0.0), size - 1), 0.0)
    pixel = tl.floor(where)
    weight = where - pixel
    return pixel.to(tl.int32), tl.where(counts, 1 - weight, 0.0), tl.where(counts, weight, 0.0)


@triton.jit
def pixels_of_zero_padded(where, size):
    """Pixel below each position, and the weights of it and of the next, where maps are 0 outside: there, pixels have weights of 0.

    The pixel below is in [-1, size), or -2 where neither it nor the next is in the map. A position that is not a number has no numbers for
    weights."""
    near, away = (where > -1) & (where < size), (where <= -1) | (where >= size)
    low = tl.floor(where)
    weight = where - low
    pixel = tl.where(near, low, tl.where(away, -2, -1)).to(tl.int32)
    return pixel, tl.where(pixel >= 0, 1 - weight, 0.0), tl.where((pixel >= -1) & (pixel + 1 < size), weight, 0.0)


@triton.jit
def samples(map_ptr, corner, step_y, step_x, top, bottom, left, right, channel, CHANNELS: tl.constexpr):
    """[N, C] sums of the corners times their weights: `top` and `bottom` along y, `left` and `right` along x."""
    return (_weighted_row(map_ptr, corner, top * left, channel, CHANNELS)
            + _weighted_row(map_ptr, corner + step_x, top * right, channel, CHANNELS)
            + _weighted_row(map_ptr, corner + step_y, bottom * left, channel, CHANNELS)
            + _weighted_row(map_ptr, corner + step_y + step_x, bottom * right, channel, CHANNELS))


@triton.jit
def samples_and_slopes(map_ptr, corner, step_y, step_x, y, x, height, width, top, bottom, left, right, channel, CHANNELS: tl.constexpr):
    """`samples` of zero-padded maps, and how they change along y and along x, each [N, C]. `y` and `x` are the pixels of `corner`."""
    in_top, in_bottom = y >= 0, (y >= -1) & (y + 1 < height)
    in_left, in_right = x >= 0, (x >= -1) & (x + 1 < width)
    top_left = read_rows(map_ptr, corner, in_top & in_left, channel, CHANNELS)
    top_right = read_rows(map_ptr, corner + step_x, in_top & in_right, channel, CHANNELS)
    bottom_left = read_rows(map_ptr, corner + step_y, in_bottom & in_left, channel, CHANNELS)
    bottom_right = read_rows(map_ptr, corner + step_y + step_x, in_bottom & in_right, channel, CHANNELS)
    at_top = left[:, None] * top_left + right[:, None] * top_right
    at_bottom = left[:, None] * bottom_left + right[:, None] * bottom_right
    at_left = top[:, None] * top_left + bottom[:, None] * bottom_left
    at_right = top[:, None] * top_right + bottom[:, None] * bottom_right
    return top[:, None] * at_top + bottom[:, None] * at_bottom, at_bottom - at_top, at_right - at_left


@triton.jit
def add_to_corners(map_ptr, corner, step_y, step_x, top, bottom, left, right, values, channel, CHANNELS: tl.constexpr):
    """Add `values` [N, C], times their weights, to the corners in a map of float32."""
    add_to_rows(map_ptr, corner, top * left, values, channel, CHANNELS)
    add_to_rows(map_ptr, corner + step_x, top * right, values, channel, CHANNELS)
    add_to_rows(map_ptr, corner + step_y, bottom * left, values, channel, CHANNELS)
    add_to_rows(map_ptr, corner + step_y + step_x, bottom * right, values, channel, CHANNELS)


@triton.jit
def read_rows(map_ptr, row, wanted, channel, CHANNELS: tl.constexpr):
    """[N, C] of rows in float32, 0 where not `wanted` [N]."""
    at = map_ptr + row[:, None] * CHANNELS + channel[None, :]
    return tl.load(at, mask=wanted[:, None] & (channel < CHANNELS)[None, :], other=0).to(tl.float32)


@triton.jit
def add_to_rows(map_ptr, row, weight, values, channel, CHANNELS: tl.constexpr):
    """Add `values` [N, C] times `weight` [N] to rows of float32."""
    at = map_ptr + row[:, None] * CHANNELS + channel[None, :]
    tl.atomic_add(at, values * weight[:, None], mask=(tl.abs(weight) > 0)[:, None] & (channel < CHANNELS)[None, :], sem="relaxed")


@triton.jit
def write_rows(map_ptr, row, values, wanted, channel, CHANNELS: tl.constexpr):
    """Store `values` [N, C] as rows where `wanted` [N]."""
    at = map_ptr + row[:, None] * CHANNELS + channel[None, :]
    tl.store(at, values.to(map_ptr.dtype.element_ty), mask=wanted[:, None] & (channel < CHANNELS)[None, :])


@triton.jit
def _weighted_row(map_ptr, row, weight, channel, CHANNELS: tl.constexpr):
    return read_rows(map_ptr, row, tl.abs(weight) > 0, channel, CHANNELS) * weight[:, None]
