"""What vision transformers that read packed images are made of (Dosovitskiy et al. 2020, An Image is Worth 16x16 Words, arXiv:2010.11929;
Dehghani et al. 2023, NaViT, arXiv:2307.06304): images of any size, one after the other, with no token that belongs to none."""
from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.models.layers.transformer import FeedForward
from visionkit.ops.attention import varlen_attention
from visionkit.ops.attention.inputs import without_autocast
from visionkit.ops.checkpointing import Checkpointing, run_blocks
from visionkit.registry import ConfigError
from visionkit.structures import ImageBatch, ImageList, PackedSequence

# n images of h x w patches, P pixels the side of a patch; T tokens of all images, C channels, H heads of D channels


def patches_of(images: ImageList | ImageBatch | Tensor, patch_size: int, divisor: int | None = None) -> PackedSequence:
    """Cut images into patches, row by row.

    Of an image list all pixels count, what each image was padded with included: it is there to fill patches. Of an image batch each image
    has as much of the padding as brings it to the next multiple of `divisor`; the rest of the canvas is left out. A tensor is a batch of
    whole images.

    Args:
        images: [3, H, W] each.
        patch_size: P.
        divisor: what height and width must be a multiple of; by default P.

    Returns:
        [T, 3 * P * P], channel by channel, with grids.

    Raises:
        ValueError: these are no images.
        ConfigError: an image is no multiple of `divisor`, or the canvas of a batch ends before its patch does.
    """
    divisor = divisor or patch_size
    if isinstance(images, Tensor) and (images.ndim != 4 or images.shape[1] != 3):
        raise ValueError(f"a batch of images is [B, 3, H, W], got {list(images.shape)}")
    sequences, grids = [], []
    for index, image in enumerate(_each(images, divisor)):
        height, width = image.shape[-2:]
        if height % divisor or width % divisor:
            where = "x".join(map(str, images.sizes[index])) + f" in a canvas of {images.tensor.shape[2]}x{images.tensor.shape[3]}" if (
                isinstance(images, ImageBatch)) else f"{height}x{width}"
            raise ConfigError(f"image {index} has {where} pixels, and patches fill multiples of {divisor} only; take "
                              f"data_preprocessor=dict(type='NativeResolutionPreprocessor', multiple={divisor}), which fills them up with "
                              f"black, or resize in the pipeline")
        grid = (height // patch_size, width // patch_size)
        cells = image.unflatten(2, (grid[1], patch_size)).unflatten(1, (grid[0], patch_size))                 # [3, h, P, w, P]
        sequences.append(cells.permute(1, 3, 0, 2, 4).reshape(grid[0] * grid[1], -1))
        grids.append(grid)
    return PackedSequence.pack(sequences, grids)


def _each(images: ImageList | ImageBatch | Tensor, divisor: int) -> Sequence[Tensor]:
    if isinstance(images, ImageList):
        return images.images
    if isinstance(images, Tensor):
        return images.unbind()
    return [image[:, :h + -h % divisor, :w + -w % divisor] for image, (h, w) in zip(images.tensor, images.sizes, strict=True)]


class PatchEmbedding(nn.Module):
    """Each patch to a token by one linear map (ViT, eq. 1). Its weight has the shape of the convolution that it is.

    Args:
        patch_size: P.
        channels: C.
    """

    def __init__(self, patch_size: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """[T, 3 * P * P] to [T, C]."""
        return F.linear(patches.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias)


def resized_positions(table: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
    """A learned table of positions at other sizes, by bicubic interpolation between the centres of its cells, without antialiasing.

    As a product with a matrix each way, whose gradient is deterministic on every device.

    Args:
        table: [rows, columns, C].
        grids: the (h, w) of each image; one that is the table's takes it as it is.

    Returns:
        [T, C].
    """
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    resized = {}
    with without_autocast(table.device):                     # which would interpolate in half precision
        for grid in set(grids):
            if grid == tuple(table.shape[:2]):
                resized[grid] = table.flatten(0, 1)
            else:
                down, across = (bicubic_weights(old, new).to(wide) for old, new in zip(table.shape[:2], grid, strict=True))
                columns = torch.einsum("ws,rsc->rwc", across, wide)
                resized[grid] = torch.einsum("hr,rwc->hwc", down, columns).flatten(0, 1).to(table.dtype)
    return torch.cat([resized[grid] for grid in grids])


@functools.lru_cache(maxsize=1024)
def bicubic_weights(cells: int, places: int) -> Tensor:
    """[places, cells] float64: how much of each cell there is in each place of a row that is interpolated. In float64, because float32
    rounds a place beyond cell 32 by 2e-6 of a cell, which alone changes a table of normal numbers by 1e-5."""
    with torch.inference_mode(False), torch.no_grad():
        unit = torch.eye(cells, dtype=torch.float64, device="cpu")[None, :, :, None]                          # a cell each channel
        return F.interpolate(unit, (places, 1), mode="bicubic", align_corners=False)[0, :, :, 0].T.contiguous()


def patch_coordinates(images: PackedSequence) -> tuple[Tensor, Tensor]:
    """The row and the column of each token in its image, int64 [T] each."""
    image = images.index()
    place = torch.arange(len(images.tokens), device=image.device) - images.cu_seqlens[:-1].long()[image]
    width = torch.tensor([w for _, w in images.grids], device=image.device)[image]
    return place // width, place % width


def rotation_2d(rows: Tensor, columns: Tensor, head_channels: int, base: float = 10000.0) -> Tensor:
    """Rotary positions of two axes (Su et al. 2021, RoFormer, arXiv:2104.09864, sec. 3.2.2, with MoonViT's order of the axes).

    Channels 2p and 2p + 1 of a head are rotated together: pair p = 2i by the column, p = 2i + 1 by the row, times base^(-4i / D).

    Args:
        rows: [T].
        columns: [T].
        head_channels: D, a multiple of 4.
        base: wavelengths reach from 2 pi to 2 pi times this.

    Returns:
        [T, D / 2] complex numbers of length 1, complex64.
    """
    if head_channels % 4:
        raise ValueError(f"rows and columns rotate pairs of channels and need heads of a multiple of 4 channels, got {head_channels}; "
                         f"change channels or num_heads")
    frequencies = 1 / base ** (torch.arange(0, head_channels, 4, device=rows.device, dtype=torch.float32) / head_channels)
    angles = torch.stack([columns, rows], -1)[:, None] * frequencies[:, None]                                 # [T, D / 4, 2]
    return torch.polar(torch.ones_like(angles), angles).flatten(1)


def rotated(heads: Tensor, rotation: Tensor) -> Tensor:
    """Queries or keys [T, ..., D], rotated by [T, D / 2]: computed in float32 at least, in the dtype that they came in."""
    pairs = torch.view_as_complex(heads.to(torch.promote_types(heads.dtype, torch.float32)).unflatten(-1, (-1, 2)))
    turned = pairs * rotation.view(len(rotation), *[1] * (pairs.ndim - 2), -1)
    return torch.view_as_real(turned).flatten(-2).to(heads.dtype)


class PackedAttention(nn.Module):
    """Multi-head self-attention within each sequence.

    Args:
        channels: C.
        num_heads: H, each of C / H channels.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise ValueError(f"heads share the channels equally: {channels} channels cannot be split among {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)         # rows: the queries of all heads, the keys, the values
        self.output = nn.Linear(channels, channels)

    def forward(self, x: Tensor, cu_seqlens: Tensor, lengths: Sequence[int], rotation: Tensor | None = None) -> Tensor:
        """[T, C] to [T, C]; for the other arguments see `VisionTransformerBlock`."""
        qkv = self.qkv(x).view(len(x), 3, self.num_heads, -1)
        q, k, v = qkv.unbind(1) if rotation is None else (*rotated(qkv[:, :2], rotation).unbind(1), qkv[:, 2])
        return self.output(varlen_attention(q, k, v, cu_seqlens, cu_seqlens, lengths_q=lengths).flatten(1))


class VisionTransformerBlock(nn.Module):
    """Attention, then the feed-forward network, each on normalised tokens and added to what came in (ViT, eq. 2 and 3).

    Args:
        channels: C.
        num_heads: of the attention.
        hidden_channels: of the feed-forward network.
        activation: of `FeedForward`.
        eps: of the layer normalisations.
    """

    def __init__(self, channels: int, num_heads: int, hidden_channels: int, activation: str = "gelu", eps: float = 1e-6) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(channels, eps)
        self.attention = PackedAttention(channels, num_heads)
        self.feed_forward_norm = nn.LayerNorm(channels, eps)
        self.feed_forward = FeedForward(channels, hidden_channels, activation=activation)

    def forward(self, x: Tensor, cu_seqlens: Tensor, lengths: Sequence[int], rotation: Tensor | None = None) -> Tensor:
        """[T, C] to [T, C].

        Args:
            x: tokens of all sequences.
            cu_seqlens: int32 [n + 1], where each sequence begins, and where the last one ends.
            lengths: of each sequence, known without asking the device.
            rotation: [T, D / 2], see `rotation_2d`; by default queries and keys have no positions of their own.
        """
        x = x + self.attention(self.attention_norm(x), cu_seqlens, lengths, rotation)
        return x + self.feed_forward(self.feed_forward_norm(x))


class VisionTransformerEncoder(nn.Module):
    """Blocks one after the other, and a last normalisation. For the other arguments see `VisionTransformerBlock`.

    Args:
        num_layers: blocks.
        checkpointing: which blocks' activations are computed again in the backward pass, less memory for more time: True,
            `dict(policy="sqrt")`, `dict(policy="selective")`, see `visionkit.ops.checkpointing.Checkpointing`.
    """

    def __init__(self, num_layers: int, channels: int, num_heads: int, hidden_channels: int, activation: str = "gelu", eps: float = 1e-6,
                 checkpointing: bool | str | Mapping | Checkpointing = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(VisionTransformerBlock(channels, num_heads, hidden_channels, activation, eps)
                                    for _ in range(num_layers))
        self.norm = nn.LayerNorm(channels, eps)
        self.checkpointing = Checkpointing.of(checkpointing)

    def forward(self, tokens: PackedSequence, rotation: Tensor | None = None) -> PackedSequence:
        """Tokens [T, C] to tokens [T, C]; `rotation` is the same for all blocks."""
        x = run_blocks(self.blocks, tokens.tokens, tokens.cu_seqlens, tokens.lengths, rotation, checkpointing=self.checkpointing)
        return tokens.replace(self.norm(x))


def merged_patches(images: PackedSequence, merge: tuple[int, int]) -> PackedSequence:
    """Put neighbouring patches into one token, side by side: nothing is averaged.

    Args:
        images: tokens [T, C] with grids that `merge` divides.
        merge: rows and columns of patches that become a token, m of them in all.

    Returns:
        tokens [T / m, m, C], the patches of each row by row, with grids in tokens.
    """
    rows, columns = merge
    groups = [image.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)) for image in images.maps()]          # [C, h/2, 2, w/2, 2]
    tokens = [group.permute(1, 3, 2, 4, 0).reshape(-1, rows * columns, group.shape[0]) for group in groups]
    return PackedSequence.pack(tokens, [(h // rows, w // columns) for h, w in images.grids])
