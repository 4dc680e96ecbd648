"""Deformable convolution (Dai et al. 2017, arXiv:1703.06211, sec. 2.1), with modulation (Zhu et al. 2019, DCNv2, arXiv:1811.11168, eq. 1).

    y(p) = sum over taps k of  w_k . m_k(p) x(p + p_k + dp_k(p))

Sampling makes columns [positions, taps * channels], one matrix product makes the output of them. Both go through the image in bands, so
that the columns of the whole image never exist.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.ops import bilinear
from visionkit.ops.tiers import kernels
from visionkit.ops.weighted_gather import gather, gather_weights_gradient
from visionkit.registry import OPS

# B images, C channels, H x W pixels, N x M output pixels, K kernel taps, G offset groups, P output pixels of a band

_BAND_BYTES = 24 << 20      # what sampling a band of output rows may take
_GPU_BAND_BYTES = 256 << 20


def deform_conv2d(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int | tuple[int, int] = 1,
                  padding: int | tuple[int, int] = 0, dilation: int | tuple[int, int] = 1, mask: Tensor | None = None,
                  border: str = "fade") -> Tensor:
    """Convolution whose taps are displaced by `offset`, and scaled by `mask` where one is given.

    Args:
        input: [B, C, H, W].
        offset: [B, 2 * G * kh * kw, N, M] displacements in pixels of `input`: G groups of kh * kw taps, row by row, (dy, dx) for each.
            Group g moves the taps in the g-th of G blocks of channels. G follows from the shape.
        weight: [C_out, C / groups, kh, kw]; the number of groups follows from the shape.
        bias: [C_out].
        stride, padding, dilation: as in `torch.nn.functional.conv2d`.
        mask: [B, G * kh * kw, N, M] modulation of each tap (DCNv2), usually a sigmoid; None is DCNv1.
        border: 'fade', between the outermost pixel and one pixel outside a sample fades to 0, as in torchvision and mmcv; or 'clamp', a
            sample in the last pixel row or column takes that pixel's value, and outside of [0, H) x [0, W) it is 0, as in the DCNv1
            authors' code.

    Returns:
        [B, C_out, N, M] in the dtype of `input` and its memory format. On a CPU, offsets that are all zero give what `conv2d` gives, to
        the bit.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or an unknown border.
    """
    if torch.is_autocast_enabled(input.device.type):                        # as a convolution; positions keep their precision
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    _check(input, offset, weight, bias, stride, padding, dilation, mask, border)
    return torch.ops.visionkit.deform_conv2d(input, offset, mask, weight, bias, stride, padding, dilation, border)


class Geometry(NamedTuple):
    """Where the taps of a deformable convolution start from."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    offset_groups: int
    border: str

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return tuple((size + 2 * pad - dilation * (taps - 1) - 1) // stride + 1 for size, pad, dilation, taps, stride
                     in zip((height, width), self.padding, self.dilation, self.kernel, self.stride, strict=True))


def _check(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int],
           dilation: tuple[int, int], mask: Tensor | None, border: str) -> None:
    for name, value in (("input", input), ("offset", offset), ("weight", weight)):
        if value.ndim != 4:
            raise ValueError(f"deform_conv2d needs a 4-dimensional {name}, got {list(value.shape)}")
    for name, value in (("offset", offset), ("weight", weight), ("bias", bias), ("mask", mask)):
        if value is not None and value.device != input.device:
            raise ValueError(f"input is on {input.device}, {name} on {value.device}; move one")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != input.dtype:
            raise ValueError(f"deform_conv2d needs {name} in the dtype of input, {input.dtype}, got {value.dtype}; convert one")
    if border not in ("fade", "clamp"):
        raise ValueError(f"border must be 'fade' (torchvision, mmcv) or 'clamp' (the DCNv1 authors), got {border!r}")
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        raise ValueError(f"stride and dilation must be positive and padding not negative, got stride {stride}, dilation {dilation}, "
                         f"padding {padding}")
    batch, channels, height, width = input.shape
    outputs, group_channels, *kernel = weight.shape
    if not group_channels or channels % group_channels or outputs % (channels // group_channels):
        raise ValueError(f"weight {list(weight.shape)} does not fit input {list(input.shape)}: {channels} channels must be a multiple of "
                         f"weight.shape[1], and weight.shape[0] of the number of groups")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must be [{outputs}], one for each output channel, got {list(bias.shape)}")
    taps = math.prod(kernel)
    offset_groups = offset.shape[1] // (2 * taps)
    if not offset_groups or offset.shape[1] % (2 * taps) or channels % offset_groups:
        raise ValueError(f"offset must have 2 * G * {taps} channels, (dy, dx) for each of {kernel[0]}x{kernel[1]} taps, with a G that "
                         f"divides {channels} input channels; got {offset.shape[1]}")
    size = Geometry(tuple(kernel), stride, padding, dilation, offset_groups, border).output_size(height, width)
    if min(size) < 0:
        raise ValueError(f"a kernel of {kernel[0]}x{kernel[1]} with dilation {dilation} is larger than the padded input of "
                         f"{height + 2 * padding[0]}x{width + 2 * padding[1]} pixels")
    if offset.shape != (batch, offset.shape[1], *size):
        raise ValueError(f"offset must be [{batch}, 2 * G * {taps}, {size[0]}, {size[1]}] for this input and stride, "
                         f"got {list(offset.shape)}")
    if mask is not None and mask.shape != (batch, offset_groups * taps, *size):
        raise ValueError(f"mask must be [{batch}, {offset_groups * taps}, {size[0]}, {size[1]}], one for each pair of offsets, "
                         f"got {list(mask.shape)}")


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


class Sampler:
    """The portable tier's samples of an input, where the taps of a deformable convolution fall.

    Rows of output are taken in bands: a slice of images and a slice of rows. All are in the order [images, rows, M, K, G].
    """

    def __init__(self, input: Tensor, offset: Tensor, mask: Tensor | None, geometry: Geometry) -> None:
        self.input, self.offset, self.mask, self.geometry = input, offset, mask, geometry
        groups = geometry.offset_groups
        self.table = bilinear.padded_table(input)                           # [B, H + 2, W + 2, C]
        width = self.table.shape[2] * groups
        self.corners = (0, groups, width, width + groups)                   # table rows from the first corner of a cell to each
        self.table = self.table.view(-1, input.shape[1] // groups)

    def columns(self, images: slice, rows: slice) -> Tensor:
        """[images * rows * M, K * C] samples of the band, in float32 or float64."""
        cells, upper_y, upper_x, mask, _, _ = self._cells(images, rows)
        weights = torch.stack(bilinear.corner_weights(upper_y, upper_x, mask), -1)
        return gather(self.table, self._reads(cells), weights).view(-1, math.prod(self.geometry.kernel) * self.input.shape[1])

    def zero_gradients(self) -> None:
        """Start collecting gradients."""
        self.grad_table = torch.zeros_like(self.table)
        self.grad_offset = torch.empty_like(self.offset, memory_format=torch.contiguous_format)
        self.grad_mask = None if self.mask is None else torch.empty_like(self.mask, memory_format=torch.contiguous_format)

    def columns_backward(self, grad: Tensor, images: slice, rows: slice) -> None:
        """Collect what `grad`, the gradient of the band's columns, means for input, offset and mask."""
        cells, upper_y, upper_x, mask, moves_y, moves_x = self._cells(images, rows)
        grad = grad.view(-1, self.table.shape[1]).to(self.table.dtype)
        weights = bilinear.corner_weights(upper_y, upper_x, mask)
        bilinear.scatter_corners(cells, weights, self.corners, grad, self.grad_table)
        corners = gather_weights_gradient(grad, self.table, self._reads(cells))
        value, grad_y, grad_x = bilinear.sample_and_slopes(corners, upper_y, upper_x)
        grad_y.mul_(moves_y)
        grad_x.mul_(moves_x)
        if mask is not None:
            self._write(self.grad_mask, [value], images, rows)
            grad_y.mul_(mask)
            grad_x.mul_(mask)
        self._write(self.grad_offset, [grad_y, grad_x], images, rows)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of input, offset and mask."""
        batch, channels, height, width = self.input.shape
        grad = self.grad_table.view(batch, height + 2, width + 2, channels)[:, 1:-1, 1:-1].permute(0, 3, 1, 2)
        return torch.empty_like(self.input).copy_(grad), self.grad_offset, self.grad_mask

    def _cells(self, images: slice, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """Of each sample, flat: table row of its cell's first corner, weights of the lower and the right corners, mask, and whether its
        value changes with its offset along y and along x."""
        geometry, working = self.geometry, self.table.dtype
        kernel, groups = geometry.kernel, geometry.offset_groups
        height, width = self.input.shape[2:]
        offset = self._read(self.offset, 2, images, rows)
        taps_y, taps_x = (torch.arange(count, dtype=working, device=offset.device) * dilation
                          for count, dilation in zip(kernel, geometry.dilation, strict=True))
        start_y = torch.arange(rows.start, rows.stop, dtype=working, device=offset.device) * geometry.stride[0] - geometry.padding[0]
        start_x = torch.arange(self.offset.shape[3], dtype=working, device=offset.device) * geometry.stride[1] - geometry.padding[1]
        regular_y = (start_y[:, None, None] + taps_y[:, None]).expand(-1, -1, kernel[1]).flatten(1)          # [rows, K]
        regular_x = (start_x[:, None, None] + taps_x).expand(-1, kernel[0], -1).flatten(1)                    # [M, K]
        y = (offset[0].view(-1, len(start_y), len(start_x), len(regular_y[0]), groups) + regular_y[:, None, :, None]).flatten()
        x = (offset[1].view(-1, len(start_x), len(regular_x[0]), groups) + regular_x[:, :, None]).flatten()
        mask = None if self.mask is None else self._read(self.mask, 1, images, rows)[0].flatten()
        if geometry.border == "clamp":
            outside = (y < 0) | (y >= height) | (x < 0) | (x >= width)
            y, x = y.clamp(max=height - 1).masked_fill_(outside, -1), x.clamp(max=width - 1)     # -1: in the border of zeros
        cell_y, upper_y = bilinear.axis_cells(y, height)
        cell_x, upper_x = bilinear.axis_cells(x, width)
        moves_y, moves_x = bilinear.moves(cell_y, upper_y), bilinear.moves(cell_x, upper_x)
        if geometry.border == "clamp":
            moves_y, moves_x = moves_y & (y < height - 1), moves_x & (x < width - 1)
        cells = cell_y.mul_(width + 2).add_(cell_x)
        first = torch.arange(images.start, images.stop, dtype=cells.dtype, device=cells.device) * ((height + 2) * (width + 2))
        cells = (cells.view(len(first), -1) + first[:, None]).flatten()
        if groups > 1:
            cells = (cells.view(-1, groups) * groups + torch.arange(groups, dtype=cells.dtype, device=cells.device)).flatten()
        return cells, upper_y, upper_x, mask, moves_y, moves_x

    def _reads(self, cells: Tensor) -> Tensor:
        return torch.stack([cells + step for step in self.corners], -1)

    def _read(self, values: Tensor, parts: int, images: slice, rows: slice) -> Tensor:
        """[parts, images, rows, M, K, G] of [B, G * K * parts, N, M], a band."""
        band = values[images, :, rows].unflatten(1, (self.geometry.offset_groups, -1, parts))
        return band.permute(3, 0, 4, 5, 2, 1).to(self.table.dtype).contiguous()

    def _write(self, target: Tensor, parts: list[Tensor], images: slice, rows: slice) -> None:
        """The inverse of `_read`."""
        band = target[images, :, rows].unflatten(1, (self.geometry.offset_groups, -1, len(parts)))
        for index, part in enumerate(parts):
            to = band[:, :, :, index]                                       # [images, G, K, rows, M]
            to.copy_(part.view(to.shape[0], to.shape[3], to.shape[4], to.shape[2], to.shape[1]).permute(0, 4, 3, 1, 2))


@torch.library.custom_op("visionkit::deform_conv2d", mutates_args=())
def _deform_conv2d(input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, stride: Sequence[int],
                   padding: Sequence[int], dilation: Sequence[int], border: str) -> Tensor:
    groups = input.shape[1] // weight.shape[1]
    # a fresh layer is a convolution, to the bit; on CUDA looking would wait, and a CPU may lack a convolution in float16
    if input.device.type == "cpu" and input.dtype != torch.float16 and mask is None and not offset.any():
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    output = _empty_output(input, offset, weight)
    if not output.numel():
        return output
    sampler = _sampler(input, offset, mask, weight, stride, padding, dilation, border)
    kernel = _kernel_1x1(weight)
    bias = None if bias is None else bias.to(kernel.dtype)
    for images, rows in _bands(input, offset, weight):
        columns = _columns(sampler, images, rows, offset, kernel, groups)
        # as a 1x1 convolution, since oneDNN is a fifth faster than the library behind a matrix product
        output[images, :, rows] = F.conv2d(columns, kernel, bias, groups=groups)
    return output


@_deform_conv2d.register_fake
def _(input, offset, mask, weight, bias, stride, padding, dilation, border):
    return _empty_output(input, offset, weight)


@torch.library.custom_op("visionkit::deform_conv2d_backward", mutates_args=())
def _deform_conv2d_backward(grad: Tensor, input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, stride: Sequence[int],
                            padding: Sequence[int], dilation: Sequence[int], border: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups, taps = input.shape[1] // weight.shape[1], math.prod(weight.shape[2:])
    sampler = _sampler(input, offset, mask, weight, stride, padding, dilation, border)
    sampler.zero_gradients()
    kernel = _kernel_1x1(weight)
    grad_kernel = torch.zeros((groups, len(kernel) // groups, kernel.shape[1]), dtype=torch.promote_types(kernel.dtype, torch.float32),
                              device=kernel.device)
    for images, rows in _bands(input, offset, weight) if grad.numel() else ():
        columns = _columns(sampler, images, rows, offset, kernel, groups)
        band = grad[images, :, rows].to(kernel.dtype)                       # [images, C_out, rows, M]
        by_channel = band.transpose(0, 1).reshape(groups, len(kernel) // groups, -1)                 # [groups, C_out / groups, P]
        grad_kernel += by_channel @ columns.permute(0, 2, 3, 1).reshape(-1, groups, kernel.shape[1]).transpose(0, 1)
        del columns
        grad_columns = F.conv_transpose2d(band.contiguous(memory_format=torch.channels_last), kernel, groups=groups)
        grad_columns = grad_columns.permute(0, 2, 3, 1).reshape(-1, groups, taps, weight.shape[1]).transpose(1, 2)
        sampler.columns_backward(grad_columns.reshape(-1, taps * input.shape[1]), images, rows)
    grad_input, grad_offset, grad_mask = sampler.gradients()
    grad_weight = torch.empty_like(weight)
    grad_weight.copy_(grad_kernel.view(-1, *weight.shape[2:], weight.shape[1]).permute(0, 3, 1, 2))
    return grad_input, grad_offset, grad.new_empty(0) if mask is None else grad_mask, grad_weight


@_deform_conv2d_backward.register_fake
def _(grad, input, offset, mask, weight, stride, padding, dilation, border):
    contiguous = {"memory_format": torch.contiguous_format}
    grad_mask = grad.new_empty(0) if mask is None else torch.empty_like(mask, **contiguous)
    return torch.empty_like(input), torch.empty_like(offset, **contiguous), grad_mask, torch.empty_like(weight)


def _save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    input, offset, mask, weight, bias, *ctx.settings = inputs
    ctx.save_for_backward(input, offset, mask, weight)
    ctx.has_bias = bias is not None


def _backward(ctx, grad: Tensor) -> tuple:
    input, offset, mask, weight = ctx.saved_tensors                         # read once: checkpointing allows no more
    grads = torch.ops.visionkit.deform_conv2d_backward(grad, input, offset, mask, weight, *ctx.settings)
    grad_input, grad_offset, grad_mask, grad_weight = grads
    return (grad_input, grad_offset, None if mask is None else grad_mask, grad_weight,
            grad.sum((0, 2, 3)) if ctx.has_bias else None, *[None] * 4)


_deform_conv2d.register_autograd(_backward, setup_context=_save_for_backward)


def _sampler(input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, stride: Sequence[int], padding: Sequence[int],
             dilation: Sequence[int], border: str) -> Sampler:
    kernel = tuple(weight.shape[2:])
    geometry = Geometry(kernel, tuple(stride), tuple(padding), tuple(dilation), offset.shape[1] // (2 * math.prod(kernel)), border)
    triton = kernels("deform_conv2d", input)
    return (triton.Sampler if triton else Sampler)(input, offset, mask, geometry)


def _bands(input: Tensor, offset: Tensor, weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """Images and rows of output, in pieces of whole images or of rows of one image."""
    batch, rows, columns, taps = len(input), *offset.shape[2:], math.prod(weight.shape[2:])
    sample_bytes = 4 * input.shape[1] + 128 * (offset.shape[1] // (2 * taps))                      # and what it takes to compute them
    row_bytes = columns * taps * sample_bytes
    budget = _BAND_BYTES if input.device.type == "cpu" else _GPU_BAND_BYTES
    images = max(1, min(batch, budget // max(rows * row_bytes, 1)))
    pieces = math.ceil(rows * row_bytes / budget) if images == 1 else 1
    step = max(math.ceil(rows / max(pieces, 1)), 1)                         # of one size: a narrow last one would cost as much
    for image in range(0, batch, images):
        for row in range(0, rows, step):
            yield slice(image, min(image + images, batch)), slice(row, min(row + step, rows))


def _empty_output(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    channels_last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    return torch.empty((len(input), len(weight), *offset.shape[2:]), dtype=input.dtype, device=input.device,
                       memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _kernel_1x1(weight: Tensor) -> Tensor:
    """[C_out, K * C / groups, 1, 1], the kernel over columns, in the type that products are made in: float16 has none on every CPU."""
    kernel = weight.permute(0, 2, 3, 1).reshape(len(weight), -1, 1, 1)
    return kernel.float() if kernel.dtype == torch.float16 and kernel.device.type == "cpu" else kernel


def _columns(sampler: Sampler, images: slice, rows: slice, offset: Tensor, kernel: Tensor, groups: int) -> Tensor:
    """[images, groups * K * C / groups, rows, M] in channels-last memory."""
    columns = sampler.columns(images, rows).to(kernel.dtype)                # [positions, K * C]
    if groups > 1:
        columns = columns.view(len(columns), -1, groups, sampler.input.shape[1] // groups).transpose(1, 2)
    return columns.reshape(images.stop - images.start, rows.stop - rows.start, offset.shape[3], -1).permute(0, 3, 1, 2)


class _DeformConv(nn.Module):
    """The weights and settings that every deformable convolution has."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], stride: int | tuple[int, int],
                 padding: int | tuple[int, int], dilation: int | tuple[int, int], groups: int, bias: bool, border: str) -> None:
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"in_channels {in_channels} and out_channels {out_channels} must be multiples of groups {groups}")
        self.stride, self.padding, self.dilation, self.border = stride, padding, dilation, border
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *_pair(kernel_size)))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `torch.nn.Conv2d` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def _convolve(self, input: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask, self.border)

    def extra_repr(self) -> str:
        outputs, channels, *kernel = self.weight.shape
        return (f"{channels}, {outputs}, kernel_size={tuple(kernel)}, stride={self.stride}, padding={self.padding}, "
                f"dilation={self.dilation}, border={self.border!r}")


@OPS.register_module()
class DeformConv2d(_DeformConv):
    """`deform_conv2d` with a weight of its own; offset and mask come from elsewhere: `forward(input, offset, mask=None)`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], stride: int | tuple[int, int] = 1,
                 padding: int | tuple[int, int] = 0, dilation: int | tuple[int, int] = 1, groups: int = 1, bias: bool = True,
                 border: str = "fade") -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, border)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._convolve(input, offset, mask)


@OPS.register_module()
class DeformConv2dPack(_DeformConv):
    """Deformable convolution that computes its own offsets (DCNv1, sec. 2.1).

    The offset branch is a convolution of the same kernel, stride, padding and dilation on the same input. Its weights start at zero, so the
    layer starts as an ordinary convolution with the same `weight` and `bias`.

    Args:
        offset_groups: groups of channels that are displaced together.
        others: as in `torch.nn.Conv2d` and `deform_conv2d`.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], stride: int | tuple[int, int] = 1,
                 padding: int | tuple[int, int] = 0, dilation: int | tuple[int, int] = 1, groups: int = 1, offset_groups: int = 1,
                 bias: bool = True, border: str = "fade") -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, border)
        self.conv_offset = _zero_branch(in_channels, 2 * offset_groups, kernel_size, stride, padding, dilation)

    def forward(self, input: Tensor) -> Tensor:
        return self._convolve(input, self.conv_offset(input), None)


@OPS.register_module()
class ModulatedDeformConv2dPack(_DeformConv):
    """Deformable convolution that computes its own offsets and modulation (DCNv2, sec. 3.1).

    As `DeformConv2dPack`, with a third output of the branch for each tap: its sigmoid is the mask, 0.5 at the start, so that the layer
    starts as half an ordinary convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], stride: int | tuple[int, int] = 1,
                 padding: int | tuple[int, int] = 0, dilation: int | tuple[int, int] = 1, groups: int = 1, offset_groups: int = 1,
                 bias: bool = True, border: str = "fade") -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, border)
        self.conv_offset = _zero_branch(in_channels, 3 * offset_groups, kernel_size, stride, padding, dilation)

    def forward(self, input: Tensor) -> Tensor:
        branch = self.conv_offset(input)
        pairs = branch.shape[1] // 3 * 2                                    # two thirds are offsets, the rest masks
        return self._convolve(input, branch[:, :pairs], branch[:, pairs:].sigmoid())


def _zero_branch(in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], stride: int | tuple[int, int],
                 padding: int | tuple[int, int], dilation: int | tuple[int, int]) -> nn.Conv2d:
    """A convolution with `out_channels` a tap that is zero everywhere."""
    branch = nn.Conv2d(in_channels, out_channels * math.prod(_pair(kernel_size)), kernel_size, stride, padding, dilation)
    nn.init.zeros_(branch.weight)
    nn.init.zeros_(branch.bias)
    return branch
