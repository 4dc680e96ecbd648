"""Samples of deformable convolution on CUDA: a program takes a few output positions, and a block of the channels of an offset group."""
from __future__ import annotations

import math
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from visionkit.ops.deform_conv import Geometry

# B images, H x W pixels, N x M output pixels, K kernel taps, G offset groups of C channels


class Sampler:
    """As `visionkit.ops.deform_conv.Sampler`; columns are in the dtype of the input."""

    def __init__(self, input: Tensor, offset: Tensor, mask: Tensor | None, geometry: Geometry) -> None:
        self.input, self.geometry = input, geometry
        self.offset, self.mask = offset.contiguous(), None if mask is None else mask.contiguous()
        self.map = input.permute(0, 2, 3, 1).contiguous()                   # no copy where it lies channels-last
        self.taps, self.channels = math.prod(geometry.kernel), input.shape[1] // geometry.offset_groups

    def columns(self, images: slice, rows: slice) -> Tensor:
        """[images * rows * M, K * G * C] samples of the band."""
        positions = (images.stop - images.start) * (rows.stop - rows.start) * self.offset.shape[3]
        columns = self.map.new_empty(positions, self.taps * self.map.shape[3])
        self._launch(columns, [], images, rows)
        return columns

    def zero_gradients(self) -> None:
        """Start collecting gradients."""
        self.grad_map = torch.zeros_like(self.map, dtype=torch.float32)
        self.grad_offset = torch.empty_like(self.offset)
        self.grad_mask = None if self.mask is None else torch.empty_like(self.mask)

    def columns_backward(self, grad: Tensor, images: slice, rows: slice) -> None:
        """Collect what `grad`, the gradient of the band's columns, means for input, offset and mask."""
        grad_mask = self.grad_offset if self.grad_mask is None else self.grad_mask
        self._launch(grad.contiguous(), [self.grad_map, self.grad_offset, grad_mask], images, rows)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of input, offset and mask."""
        return torch.empty_like(self.input).copy_(self.grad_map.permute(0, 3, 1, 2)), self.grad_offset, self.grad_mask

    def _launch(self, columns: Tensor, grads: list[Tensor], images: slice, rows: slice) -> None:
        """Fill the columns of the band, or read them to add to `grads`."""
        if not columns.numel():
            return
        geometry, groups = self.geometry, self.geometry.offset_groups
        block_positions, block_channels = block_sizes(self.channels, self.map, adds=bool(grads))
        kernel, blocks = _columns_kernel, triton.cdiv(self.channels, block_channels)
        if grads:
            kernel, blocks = _columns_backward_kernel, self.taps                 # which sums over all channels
        with torch.cuda.device_of(self.map):
            kernel[triton.cdiv(len(columns), block_positions), blocks * groups](
                self.map, self.offset, self.offset if self.mask is None else self.mask, columns, *grads, len(columns), images.start,
                rows.start, rows.stop - rows.start, *self.map.shape[1:3], *self.offset.shape[2:], *geometry.stride, *geometry.padding,
                *geometry.dilation, CHANNELS=self.channels, GROUPS=groups, TAPS_Y=geometry.kernel[0], TAPS_X=geometry.kernel[1],
                MODULATED=self.mask is not None, CLAMP=geometry.border == "clamp", BLOCK_POSITIONS=block_positions,
                BLOCK_CHANNELS=block_channels, **UNFUSED)


_NUMBERS = ["positions", "first_image", "first_row", "rows", "height", "width", "rows_out", "columns_out", "stride_y", "stride_x",
            "padding_y", "padding_x", "dilation_y", "dilation_x"]           # not worth compiling again


@triton.jit(do_not_specialize=_NUMBERS)
def _columns_kernel(
        map_ptr, offset_ptr, mask_ptr, columns_ptr, positions, first_image, first_row, rows, height, width, rows_out, columns_out,
        stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
        TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, MODULATED: tl.constexpr, CLAMP: tl.constexpr, BLOCK_POSITIONS: tl.constexpr,
        BLOCK_CHANNELS: tl.constexpr):
    position = tl.program_id(0) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    group = tl.program_id(1) % GROUPS
    channel = tl.program_id(1) // GROUPS * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    exists = position < positions
    image = (first_image + position // (rows * columns_out)).to(tl.int64)
    row, column = first_row + position // columns_out % rows, position % columns_out
    for tap in range(0, TAPS_Y * TAPS_X):
        plane = (image * GROUPS + group) * (TAPS_Y * TAPS_X) + tap
        start_y = row * stride_y - padding_y + tap // TAPS_X * dilation_y
        start_x = column * stride_x - padding_x + tap % TAPS_X * dilation_x
        y, x, factor = _places(offset_ptr, mask_ptr, plane, rows_out * columns_out, row * columns_out + column, exists, start_y, start_x,
                               height, width, MODULATED, CLAMP)
        y, top, bottom = pixels_of_zero_padded(y, height)
        x, left, right = pixels_of_zero_padded(x, width)
        corner = ((image * height + y) * width + x) * GROUPS + group
        values = samples(map_ptr, corner, width * GROUPS, GROUPS, top * factor, bottom * factor, left, right, channel, CHANNELS)
        write_rows(columns_ptr, (position.to(tl.int64) * (TAPS_Y * TAPS_X) + tap) * GROUPS + group, values, exists, channel, CHANNELS)


@triton.jit(do_not_specialize=_NUMBERS)
def _columns_backward_kernel(
        map_ptr, offset_ptr, mask_ptr, grad_ptr, grad_map_ptr, grad_offset_ptr, grad_mask_ptr, positions, first_image, first_row, rows,
        height, width, rows_out, columns_out, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, CHANNELS: tl.constexpr,
        GROUPS: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, MODULATED: tl.constexpr, CLAMP: tl.constexpr,
        BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    position = tl.program_id(0) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    group, tap = tl.program_id(1) % GROUPS, tl.program_id(1) // GROUPS
    exists = position < positions
    image = (first_image + position // (rows * columns_out)).to(tl.int64)
    row, column = first_row + position // columns_out % rows, position % columns_out
    area, at = rows_out * columns_out, row * columns_out + column
    plane = (image * GROUPS + group) * (TAPS_Y * TAPS_X) + tap
    start_y = row * stride_y - padding_y + tap // TAPS_X * dilation_y
    start_x = column * stride_x - padding_x + tap % TAPS_X * dilation_x
    where_y, where_x, factor = _places(offset_ptr, mask_ptr, plane, area, at, exists, start_y, start_x, height, width, MODULATED, CLAMP)
    y, top, bottom = pixels_of_zero_padded(where_y, height)
    x, left, right = pixels_of_zero_padded(where_x, width)
    corner = ((image * height + y) * width + x) * GROUPS + group
    grad_y = tl.zeros((BLOCK_POSITIONS,), tl.float32)
    grad_x = tl.zeros((BLOCK_POSITIONS,), tl.float32)
    grad_factor = tl.zeros((BLOCK_POSITIONS,), tl.float32)
    for first_channel in range(0, CHANNELS, BLOCK_CHANNELS):
        channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
        grad = read_rows(grad_ptr, (position.to(tl.int64) * (TAPS_Y * TAPS_X) + tap) * GROUPS + group, exists, channel, CHANNELS)
        sample, slope_y, slope_x = samples_and_slopes(map_ptr, corner, width * GROUPS, GROUPS, y, x, height, width, top, bottom, left,
                                                      right, channel, CHANNELS)
        grad_y += tl.sum(grad * slope_y, 1)
        grad_x += tl.sum(grad * slope_x, 1)
        grad_factor += tl.sum(grad * sample, 1)
        add_to_corners(grad_map_ptr, corner, width * GROUPS, GROUPS, top * factor, bottom * factor, left, right, grad, channel, CHANNELS)
    if CLAMP:                                                               # in the last row and column samples do not move
        grad_y, grad_x = tl.where(where_y < height - 1, grad_y, 0), tl.where(where_x < width - 1, grad_x, 0)
    tl.store(grad_offset_ptr + plane * 2 * area + at, (grad_y * factor).to(grad_offset_ptr.dtype.element_ty), mask=exists)
    tl.store(grad_offset_ptr + (plane * 2 + 1) * area + at, (grad_x * factor).to(grad_offset_ptr.dtype.element_ty), mask=exists)
    if MODULATED:
        tl.store(grad_mask_ptr + plane * area + at, grad_factor.to(grad_mask_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _places(offset_ptr, mask_ptr, plane, area, at, exists, start_y, start_x, height, width, MODULATED: tl.constexpr,
            CLAMP: tl.constexpr):
    """Where a tap falls for each output position, -1 where it does not count, and what its sample is multiplied by.

    `plane` is the tap's in the mask, `at` the position within planes of `area` pixels, and `start_*` where the tap is without offset."""
    y = tl.where(exists, start_y + tl.load(offset_ptr + plane * 2 * area + at, mask=exists, other=0).to(tl.float32), -1)
    x = tl.where(exists, start_x + tl.load(offset_ptr + (plane * 2 + 1) * area + at, mask=exists, other=0).to(tl.float32), -1)
    if CLAMP:
        outside = (y < 0) | (y >= height) | (x < 0) | (x >= width)
        y = tl.where(outside, -1, tl.where(y > height - 1, height - 1, y))
        x = tl.where(outside, -1, tl.where(x > width - 1, width - 1, x))
    factor = exists.to(tl.float32)
    if MODULATED:
        factor = tl.load(mask_ptr + plane * area + at, mask=exists, other=0).to(tl.float32)
    return y, x, factor
