"""Samples of deformable convolution on CUDA: a program takes a few output positions, and a block of the channels of an offset group."""
from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionkit.ops.triton.bilinear import UNFUSED, add_to_corners, block_sizes, pixels_of_zero_padded, read_rows, samples, samples_and_slopes

if TYPE_CHECKING:
    from visionkit.ops.deform_conv import Geometry

# B images, H x W pixels, N x M output pixels, K kernel taps, G offset groups of C channels


class Sampler:
    """As `visionkit.ops.deform_conv.Sampler`; columns are in the dtype of the input."""

    def __init__(self, input: Tensor, offset: Tensor, mask: Tensor | None, geometry: Geometry) -> None:
        self.input, self.offset, self.mask, self.geometry = input, offset.contiguous(), None if mask is None else mask.contiguous(), geometry
        self.map = input.permute(0, 2, 3, 1).contiguous()                   # no copy where it lies channels-last

    def columns(self, images: slice, rows: slice) -> Tensor:
        """[images * rows * M, K * G * C] samples of the band."""
        columns = self.map.new_empty(self._positions(images, rows), math.prod(self.geometry.kernel) * self.map.shape[3])
        channels = self.map.shape[3] // self.geometry.offset_groups
        block_positions, block_channels = block_sizes(channels, self.map.dtype)
        grid = triton.cdiv(len(columns), block_positions), self.geometry.offset_groups * triton.cdiv(channels, block_channels)
        self._launch(_columns_kernel, grid, [columns], images, rows, block_positions, block_channels)
        return columns

    def zero_gradients(self) -> None:
        """Start collecting gradients."""
        self.grad_map = torch.zeros_like(self.map, dtype=torch.float32)
        self.grad_offset = torch.empty_like(self.offset)
        self.grad_mask = None if self.mask is None else torch.empty_like(self.mask)

    def columns_backward(self, grad: Tensor, images: slice, rows: slice) -> None:
        """Collect what `grad`, the gradient of the band's columns, means for input, offset and mask."""
        channels = self.map.shape[3] // self.geometry.offset_groups
        block_positions, block_channels = block_sizes(channels, torch.float32)
        grid = triton.cdiv(self._positions(images, rows), block_positions), math.prod(self.geometry.kernel) * self.geometry.offset_groups
        grads = [grad.contiguous(), self.grad_map, self.grad_offset, self.grad_offset if self.grad_mask is None else self.grad_mask]
        self._launch(_columns_backward_kernel, grid, grads, images, rows, block_positions, block_channels)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of input, offset and mask."""
        return torch.empty_like(self.input).copy_(self.grad_map.permute(0, 3, 1, 2)), self.grad_offset, self.grad_mask

    def _positions(self, images: slice, rows: slice) -> int:
        return (images.stop - images.start) * (rows.stop - rows.start) * self.offset.shape[3]

    def _launch(self, kernel: triton.JITFunction, grid: tuple[int, int], others: list[Tensor], images: slice, rows: slice, block_positions: int,
                block_channels: int) -> None:
        if not all(grid):
            return
        geometry, groups = self.geometry, self.geometry.offset_groups
        _, height, width, channels = self.map.shape
        with torch.cuda.device_of(self.map):
            kernel[grid](self.map, self.offset, self.offset if self.mask is None else self.mask, *others, self._positions(images, rows), images.start,
                         rows.start, rows.stop - rows.start, height, width, *self.offset.shape[2:], *geometry.stride, *geometry.padding, *geometry.dilation,
                         CHANNELS=channels // groups, GROUPS=groups, TAPS_Y=geometry.kernel[0], TAPS_X=geometry.kernel[1], HAS_MASK=self.mask is not None,
                         CLAMP=geometry.border == "clamp", BLOCK_POSITIONS=block_positions, BLOCK_CHANNELS=block_channels, **UNFUSED)


_NUMBERS = ["positions", "first_image", "first_row", "rows", "height", "width", "rows_out", "columns_out", "stride_y", "stride_x", "padding_y", "padding_x",
            "dilation_y", "dilation_x"]                                     # for which it is not worth compiling again


@triton.jit(do_not_specialize=_NUMBERS)
def _columns_kernel(map_ptr, offset_ptr, mask_ptr, columns_ptr, positions, first_image, first_row, rows, height, width, rows_out, columns_out, stride_y,
                    stride_x, padding_y, padding_x, dilation_y, dilation_x, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, TAPS_Y: tl.constexpr,
                    TAPS_X: tl.constexpr, HAS_MASK: tl.constexpr, CLAMP: tl.constexpr, BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    position = tl.program_id(0) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    group = tl.program_id(1) % GROUPS
    channel = tl.program_id(1) // GROUPS * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    exists = position < positions
    image = first_image + position // (rows * columns_out)
    row, column = first_row + position // columns_out % rows, position % columns_out
    for tap in range(0, TAPS_Y * TAPS_X):
        y, x, factor, _, _ = _positions_of_tap(offset_ptr, mask_ptr, image, row, column, group, tap, exists, height, width, rows_out, columns_out, stride_y,
                                               stride_x, padding_y, padding_x, dilation_y, dilation_x, GROUPS, TAPS_Y, TAPS_X, HAS_MASK, CLAMP)
        top, top_weight, bottom_weight = pixels_of_zero_padded(y, height)
        left, left_weight, right_weight = pixels_of_zero_padded(x, width)
        top_left = ((image.to(tl.int64) * height + top) * width + left) * GROUPS + group
        values = samples(map_ptr, top_left, width * GROUPS, GROUPS, top_weight * factor, bottom_weight * factor, left_weight, right_weight, channel, CHANNELS)
        at = ((position.to(tl.int64) * (TAPS_Y * TAPS_X) + tap) * GROUPS + group)[:, None] * CHANNELS + channel[None, :]
        tl.store(columns_ptr + at, values.to(columns_ptr.dtype.element_ty), mask=exists[:, None] & (channel < CHANNELS)[None, :])


@triton.jit(do_not_specialize=_NUMBERS)
def _columns_backward_kernel(map_ptr, offset_ptr, mask_ptr, grad_ptr, grad_map_ptr, grad_offset_ptr, grad_mask_ptr, positions, first_image, first_row, rows,
                             height, width, rows_out, columns_out, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, CHANNELS: tl.constexpr,
                             GROUPS: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, HAS_MASK: tl.constexpr, CLAMP: tl.constexpr,
                             BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    position = tl.program_id(0) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    group, tap = tl.program_id(1) % GROUPS, tl.program_id(1) // GROUPS
    exists = position < positions
    image = first_image + position // (rows * columns_out)
    row, column = first_row + position // columns_out % rows, position % columns_out
    y, x, factor, moves_y, moves_x = _positions_of_tap(offset_ptr, mask_ptr, image, row, column, group, tap, exists, height, width, rows_out, columns_out,
                                                       stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, GROUPS, TAPS_Y, TAPS_X, HAS_MASK,
                                                       CLAMP)
    top, top_weight, bottom_weight = pixels_of_zero_padded(y, height)
    left, left_weight, right_weight = pixels_of_zero_padded(x, width)
    top_left = ((image.to(tl.int64) * height + top) * width + left) * GROUPS + group
    grad_y = tl.zeros((BLOCK_POSITIONS,), tl.float32)
    grad_x = tl.zeros((BLOCK_POSITIONS,), tl.float32)
    grad_factor = tl.zeros((BLOCK_POSITIONS,), tl.float32)
    for first_channel in range(0, CHANNELS, BLOCK_CHANNELS):
        channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
        grad = read_rows(grad_ptr, (position.to(tl.int64) * (TAPS_Y * TAPS_X) + tap) * GROUPS + group, exists, channel, CHANNELS)
        sample, slope_y, slope_x = samples_and_slopes(map_ptr, top_left, width * GROUPS, GROUPS, top_weight, bottom_weight, left_weight, right_weight, top,
                                                      left, height, width, channel, CHANNELS)
        grad_y += tl.sum(grad * slope_y, 1)
        grad_x += tl.sum(grad * slope_x, 1)
        grad_factor += tl.sum(grad * sample, 1)
        add_to_corners(grad_map_ptr, top_left, width * GROUPS, GROUPS, top_weight * factor, bottom_weight * factor, left_weight, right_weight, grad, channel,
                       CHANNELS)
    area = rows_out * columns_out
    plane = (image.to(tl.int64) * GROUPS + group) * (TAPS_Y * TAPS_X) + tap
    at = row * columns_out + column
    tl.store(grad_offset_ptr + plane * 2 * area + at, tl.where(moves_y, grad_y * factor, 0).to(grad_offset_ptr.dtype.element_ty), mask=exists)
    tl.store(grad_offset_ptr + (plane * 2 + 1) * area + at, tl.where(moves_x, grad_x * factor, 0).to(grad_offset_ptr.dtype.element_ty), mask=exists)
    if HAS_MASK:
        tl.store(grad_mask_ptr + plane * area + at, grad_factor.to(grad_mask_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _positions_of_tap(offset_ptr, mask_ptr, image, row, column, group, tap, exists, height, width, rows_out, columns_out, stride_y, stride_x, padding_y,
                      padding_x, dilation_y, dilation_x, GROUPS: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, HAS_MASK: tl.constexpr,
                      CLAMP: tl.constexpr):
    """Where a tap falls at each output position, what its sample is multiplied by, and whether it moves with its offset along y and along x."""
    area = rows_out * columns_out
    plane = (image.to(tl.int64) * GROUPS + group) * (TAPS_Y * TAPS_X) + tap
    at = row * columns_out + column
    y = tl.load(offset_ptr + plane * 2 * area + at, mask=exists, other=0).to(tl.float32)
    x = tl.load(offset_ptr + (plane * 2 + 1) * area + at, mask=exists, other=0).to(tl.float32)
    y += row * stride_y - padding_y + tap // TAPS_X * dilation_y
    x += column * stride_x - padding_x + tap % TAPS_X * dilation_x
    factor = exists.to(tl.float32)
    if HAS_MASK:
        factor = tl.load(mask_ptr + plane * area + at, mask=exists, other=0).to(tl.float32)
    counts = exists
    if CLAMP:
        counts = exists & ~((y < 0) | (y >= height) | (x < 0) | (x >= width))
    y, x = tl.where(counts, y, -1), tl.where(counts, x, -1)                 # where there is no pixel
    moves_y, moves_x = counts, counts
    if CLAMP:
        moves_y, moves_x = y < height - 1, x < width - 1
        y, x = tl.where(y > height - 1, height - 1, y), tl.where(x > width - 1, width - 1, x)
    return y, x, factor, moves_y, moves_x
