"""What the kernels share: bilinear samples of maps in channels-last memory, in blocks of N positions by C channels.

Along an axis, a position lies between a pixel and the next, with a weight for each; `pixels_*` give them by the rule of an op for the border. The
four corners are rows of the map: `top_left` [N], and those `step_x` and `step_y` rows further. Rows whose weight is 0 are not touched and may be
anywhere, nor are those whose weight is not a number: it makes the sample NaN all the same.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

_THREADS = 128              # of a program: Triton's four warps
UNFUSED = {"enable_fp_fusion": False}       # option of every launch: positions round as in the portable tier, since the last bit decides at borders


def block_sizes(channels: int, dtype: torch.dtype) -> tuple[int, int]:
    """N and C of a program's blocks, powers of two, such that each thread takes channels of one position: up to 16 bytes, one load.

    Args:
        channels: in a row of the map.
        dtype: of the map.
    """
    vector = min(channels & -channels, 16 // dtype.itemsize)                 # a load must be aligned to its size in every row
    block_channels = min(triton.next_power_of_2(channels), 256, _THREADS * vector)
    return _THREADS * vector // block_channels, block_channels


@triton.jit
def pixels_of_region(where, counts, size):
    """Pixel below each position, and the weights of it and of the next, by RoIAlign's rule: the outermost pixel reaches one pixel further out.
    Positions beyond, and those that do not count or are not numbers, have weights of 0."""
    counts = counts & (where >= -1) & (where <= tl.where(size > 0, size, -2))
    where = tl.where(counts, tl.minimum(tl.maximum(where, 0.0), size - 1), 0.0)
    lower = tl.floor(where)
    next_weight = where - lower
    return lower.to(tl.int32), tl.where(counts, 1 - next_weight, 0.0), tl.where(counts, next_weight, 0.0)


@triton.jit
def pixels_of_zero_padded(where, size):
    """Pixel below each position, and the weights of it and of the next, where maps are 0 outside: pixels outside have weights of 0.

    The pixel below is in [-1, size), -2 where neither it nor the next is in the map. Positions that are not numbers have weights that are not."""
    near, away = (where > -1) & (where < size), (where <= -1) | (where >= size)
    lower = tl.floor(where)
    next_weight = where - lower
    pixel = tl.where(near, lower, tl.where(away, -2, -1)).to(tl.int32)
    return pixel, tl.where(pixel >= 0, 1 - next_weight, 0.0), tl.where((pixel >= -1) & (pixel + 1 < size), next_weight, 0.0)


@triton.jit
def samples(map_ptr, top_left, step_y, step_x, top_weight, bottom_weight, left_weight, right_weight, channel, CHANNELS: tl.constexpr):
    """[N, C] sums of the corners, times their weights."""
    return (_weighted_row(map_ptr, top_left, top_weight * left_weight, channel, CHANNELS)
            + _weighted_row(map_ptr, top_left + step_x, top_weight * right_weight, channel, CHANNELS)
            + _weighted_row(map_ptr, top_left + step_y, bottom_weight * left_weight, channel, CHANNELS)
            + _weighted_row(map_ptr, top_left + step_y + step_x, bottom_weight * right_weight, channel, CHANNELS))


@triton.jit
def samples_and_slopes(map_ptr, top_left, step_y, step_x, top_weight, bottom_weight, left_weight, right_weight, y, x, height, width, channel,
                       CHANNELS: tl.constexpr):
    """`samples` of zero-padded maps, and how they change along y and along x, each [N, C]; `y` and `x` are the pixels of `top_left`."""
    is_top, is_bottom = y >= 0, (y >= -1) & (y + 1 < height)
    is_left, is_right = x >= 0, (x >= -1) & (x + 1 < width)
    top_left_value = read_rows(map_ptr, top_left, is_top & is_left, channel, CHANNELS)
    top_right_value = read_rows(map_ptr, top_left + step_x, is_top & is_right, channel, CHANNELS)
    bottom_left_value = read_rows(map_ptr, top_left + step_y, is_bottom & is_left, channel, CHANNELS)
    bottom_right_value = read_rows(map_ptr, top_left + step_y + step_x, is_bottom & is_right, channel, CHANNELS)
    top = left_weight[:, None] * top_left_value + right_weight[:, None] * top_right_value
    bottom = left_weight[:, None] * bottom_left_value + right_weight[:, None] * bottom_right_value
    left = top_weight[:, None] * top_left_value + bottom_weight[:, None] * bottom_left_value
    right = top_weight[:, None] * top_right_value + bottom_weight[:, None] * bottom_right_value
    return top_weight[:, None] * top + bottom_weight[:, None] * bottom, bottom - top, right - left


@triton.jit
def add_to_corners(map_ptr, top_left, step_y, step_x, top_weight, bottom_weight, left_weight, right_weight, values, channel, CHANNELS: tl.constexpr):
    """Add `values` [N, C] to the corners, rows of float32, times their weights."""
    add_to_rows(map_ptr, top_left, top_weight * left_weight, values, channel, CHANNELS)
    add_to_rows(map_ptr, top_left + step_x, top_weight * right_weight, values, channel, CHANNELS)
    add_to_rows(map_ptr, top_left + step_y, bottom_weight * left_weight, values, channel, CHANNELS)
    add_to_rows(map_ptr, top_left + step_y + step_x, bottom_weight * right_weight, values, channel, CHANNELS)


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
def _weighted_row(map_ptr, row, weight, channel, CHANNELS: tl.constexpr):
    return read_rows(map_ptr, row, tl.abs(weight) > 0, channel, CHANNELS) * weight[:, None]
