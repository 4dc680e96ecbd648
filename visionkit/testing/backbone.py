"""The contract of a backbone: images in, feature maps or tokens of the promised strides and channels out."""
from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from visionkit.structures import ImageBatch, ImageList, PackedSequence
from visionkit.testing.module import check_gradients, check_modes, check_state_dict, promise, require

# B images of H x W; level i has C_i channels at stride s_i


def check_backbone(backbone: nn.Module, *, cells: Sequence[tuple[int, int]] = ((2, 2), (3, 2), (2, 5)), unused: Collection[str] = (),
                   empty_batch: bool = True) -> None:
    """Check that `backbone` keeps the contract `forward(images [B, 3, H, W]) -> tuple of [B, C_i, H/s_i, W/s_i]`.

    In order: `strides` and `out_channels` agree with the output for several input sizes; the input stays as it is; eval mode is
    deterministic, each image alone gives what it gives in a batch, and memory order does not matter; gradients reach every
    parameter that requires one; the state dict round trip; bfloat16 under autocast; an empty batch.

    A token backbone keeps another contract, see `check_token_backbone`.

    Args:
        backbone: is not changed.
        cells: input sizes (rows, columns) in units of the largest stride.
        unused: patterns of parameters that need no gradient.
        empty_batch: whether it takes a batch of no images.

    Raises:
        AssertionError: tells which promise is broken.
    """
    name = type(backbone).__name__
    require(not getattr(backbone, "returns_tokens", False), f"{name} says returns_tokens=True; call check_token_backbone")
    backbone = copy.deepcopy(backbone)
    check_modes(backbone)
    step = _largest_stride(backbone)
    generator = torch.Generator().manual_seed(0)
    sizes = [(rows * step, columns * step) for rows, columns in cells]
    batches = [torch.randn(2, 3, height, width, generator=generator) for height, width in sizes]
    images = batches[-1]

    backbone.eval()
    with torch.no_grad():
        for batch in batches:
            _check_shapes(backbone, batch)
        given = images.clone()
        first = backbone(given)
        require(torch.equal(given, images), f"{name} changes its input in place")
        _check_equal(first, backbone(images), 0.0, f"{name} in eval mode gives two results for the same images; it is not deterministic")
        memory_order = f"{name} depends on the memory order of its input; is there a .view that should be a .reshape?"
        with promise(memory_order):
            _check_equal(first, backbone(images.contiguous(memory_format=torch.channels_last)), 1e-4, memory_order)

        exact = copy.deepcopy(backbone).double()             # so that a difference is a mistake, not rounding
        with promise(f"{name} does not run in float64, where batch invariance is checked"):
            together = exact(images.double())
        for index in range(len(images)):
            alone = exact(images[index:index + 1].double())
            _check_equal([level[index:index + 1] for level in together], alone, 1e-8,
                         f"{name} in eval mode gives image {index} another result in a batch than alone; do images share statistics?")
        check_state_dict(backbone, lambda module: list(module(images)))
        if empty_batch:
            with promise(f"{name} fails on an empty batch; if that is meant, say empty_batch=False"):
                _check_shapes(backbone, images[:0])

    def loss(module: nn.Module) -> Tensor:
        levels = module(images)
        weights = torch.Generator().manual_seed(1)           # a plain sum is constant behind a batch norm
        return sum((level.float() * torch.randn(level.shape, generator=weights)).sum() for level in levels)

    if any(parameter.requires_grad for parameter in backbone.parameters()):
        check_gradients(backbone, loss, unused)
    with torch.autocast("cpu", torch.bfloat16), promise(f"{name} fails under bfloat16 autocast"):
        if any(parameter.requires_grad for parameter in backbone.parameters()):
            check_gradients(backbone, loss, unused)
        with torch.no_grad():
            _check_shapes(backbone, images)


def check_token_backbone(backbone: nn.Module, *, cells: Sequence[tuple[int, int]] = ((2, 2), (3, 1), (2, 5)),
                         unused: Collection[str] = ()) -> None:
    """Check that `backbone` keeps the contract of one that says `returns_tokens = True`:
    `forward(images: ImageList | ImageBatch | [B, 3, H, W]) -> PackedSequence`, a sequence an image.

    In order: `strides` and `out_channels` agree with the tokens and grids of images of several sizes; the input stays as it is; eval mode
    is deterministic; each image alone gives what it gives among others, and the same whether it lies in an image list, a padded batch or a
    tensor; gradients reach every parameter that requires one; the state dict round trip; bfloat16 under autocast.

    Args:
        backbone: is not changed.
        cells: sizes of the images (rows, columns) in units of the stride.
        unused: patterns of parameters that need no gradient.

    Raises:
        AssertionError: tells which promise is broken.
    """
    name = type(backbone).__name__
    require(getattr(backbone, "returns_tokens", False), f"{name} does not say returns_tokens=True; call check_backbone")
    backbone = copy.deepcopy(backbone)
    check_modes(backbone)
    stride = _largest_stride(backbone)
    require(len(backbone.strides) == 1, f"{name} is a token backbone: it has one stride, got {backbone.strides}")
    generator = torch.Generator().manual_seed(0)
    images = ImageList(tuple(torch.randn(3, rows * stride, columns * stride, generator=generator) for rows, columns in cells))

    backbone.eval()
    with torch.no_grad():
        given = [image.clone() for image in images.images]
        first = _checked_tokens(backbone, images)
        require(all(map(torch.equal, given, images.images)), f"{name} changes its input in place")
        require(torch.equal(first.tokens, backbone(images).tokens),
                f"{name} in eval mode gives two results for the same images; it is not deterministic")
        exact = copy.deepcopy(backbone).double()             # so that a difference is a mistake, not rounding
        doubled = [image.double() for image in images.images]
        with promise(f"{name} does not run in float64, where batch invariance is checked"):
            together = exact(ImageList(tuple(doubled)))
        batch = exact(ImageBatch.stack(doubled))
        for index, (tokens, padded) in enumerate(zip(together.split(), batch.split(), strict=True)):
            alone = exact(ImageList((doubled[index],)))
            require(_equal(tokens, alone.tokens), f"{name} in eval mode gives image {index} another result among others than alone; does "
                                                  f"attention stay within an image?")
            require(_equal(tokens, padded), f"{name} gives image {index} another result in an image batch, where it is padded")
            require(_equal(tokens, exact(doubled[index][None]).tokens), f"{name} gives image {index} another result in a tensor")
        check_state_dict(backbone, lambda module: [module(images).tokens])

    def loss(module: nn.Module) -> Tensor:
        tokens = module(images).tokens
        weights = torch.Generator().manual_seed(1)           # a plain sum is constant behind a normalisation
        return (tokens.float() * torch.randn(tokens.shape, generator=weights)).sum()

    if any(parameter.requires_grad for parameter in backbone.parameters()):
        check_gradients(backbone, loss, unused)
        with torch.autocast("cpu", torch.bfloat16), promise(f"{name} fails under bfloat16 autocast"):
            check_gradients(backbone, loss, unused)


def _checked_tokens(backbone: nn.Module, images: ImageList) -> PackedSequence:
    name, channels, stride = type(backbone).__name__, backbone.out_channels[0], backbone.strides[0]
    tokens = backbone(images)
    require(isinstance(tokens, PackedSequence), f"{name} must return a PackedSequence, got {type(tokens).__name__}")
    require(len(tokens) == len(images), f"{name} returns {len(tokens)} sequences of {len(images)} images")
    require(tokens.tokens.shape[-1] == channels, f"{name} promises {channels} channels, and its tokens are {list(tokens.tokens.shape)}")
    require(tokens.tokens.isfinite().all(), f"{name}: tokens are not finite")
    wanted = tuple((image.shape[1] // stride, image.shape[2] // stride) for image in images.images)
    require(tokens.grids in (None, wanted, ((1, 1),) * len(images)), f"{name}: stride {stride} makes the grids {list(wanted)} of these "
                                                                     f"images, got {tokens.grids}; tokens that are no places have none")
    return tokens


def _equal(tokens: Tensor, others: Tensor) -> bool:
    return tokens.shape == others.shape and bool((tokens - others).abs().max() <= 1e-8 * max(1.0, tokens.abs().max().item()))


def _largest_stride(backbone: nn.Module) -> int:
    name = type(backbone).__name__
    for attribute in ("strides", "out_channels"):
        values = getattr(backbone, attribute, None)
        require(isinstance(values, (tuple, list)) and len(values) > 0 and all(isinstance(value, int) and value > 0 for value in values),
                f"{name}.{attribute} must be a tuple of positive ints, one a feature map, got {values!r}")
    require(len(backbone.strides) == len(backbone.out_channels),
            f"{name} has {len(backbone.strides)} strides but {len(backbone.out_channels)} out_channels")
    return math.lcm(*backbone.strides)


def _check_shapes(backbone: nn.Module, images: Tensor) -> None:
    name = type(backbone).__name__
    levels = backbone(images)
    require(isinstance(levels, tuple), f"{name} must return a tuple of feature maps, got {type(levels).__name__}")
    require(len(levels) == len(backbone.strides), f"{name} returns {len(levels)} feature maps and promises {len(backbone.strides)} strides")
    batch, _, height, width = images.shape
    for index, (level, channels, stride) in enumerate(zip(levels, backbone.out_channels, backbone.strides, strict=True)):
        wanted = (batch, channels, height // stride, width // stride)
        require(tuple(level.shape) == wanted, f"{name}, feature map {index}: {channels} channels at stride {stride} of a {height}x{width} "
                                              f"image make {list(wanted)}, got {list(level.shape)}")
        require(level.isfinite().all(), f"{name}, feature map {index} is not finite")


def _check_equal(levels: Sequence[Tensor], others: Sequence[Tensor], tolerance: float, message: str) -> None:
    for index, (level, other) in enumerate(zip(levels, others, strict=True)):
        difference = (level - other).abs().max().item() if level.numel() else 0.0
        scale = max(1.0, level.abs().max().item()) if level.numel() else 1.0
        require(difference <= tolerance * scale, f"{message} (feature map {index} differs by {difference:.2g})")
