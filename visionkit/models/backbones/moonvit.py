"""MoonViT, the vision encoder of Kimi-VL (Kimi Team 2025, arXiv:2504.07491, sec. 2.1): every image at its own size, no padding between."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from visionkit.models.backbones.pretrained import Trunk
from visionkit.models.layers import (
    PatchEmbedding,
    VisionTransformerEncoder,
    merged_patches,
    patch_coordinates,
    patches_of,
    resized_positions,
    rotation_2d,
)
from visionkit.ops.checkpointing import Checkpointing
from visionkit.registry import BACKBONES, ConfigError
from visionkit.structures import ImageBatch, ImageList, PackedSequence

LONGEST_SIDE = 512                                           # patches; a side has fewer


@BACKBONES.register_module()
class MoonViT(Trunk):
    """A vision transformer whose positions fit any grid: a learned table, interpolated, on the patches, and rotations by row and column in
    each attention. It is a token backbone: it returns a packed sequence.

    Each image must be a multiple of `patch_size * merge` pixels, as `NativeResolutionPreprocessor` makes it. Of an `ImageBatch` each image
    is taken by itself, with what fills its last patches, not its canvas; see `patches_of`. By default it is MoonViT-SO-400M.

    Args:
        patch_size: pixels.
        channels: C, of a token.
        num_layers: blocks.
        num_heads: of each attention; C / num_heads is a multiple of 4.
        hidden_channels: of the feed-forward networks.
        position_grid: rows and columns of the learned table, which are interpolated bicubically for other grids.
        merge: rows and columns of patches that become one token, as many each; None: every patch is a token.
        rope_base: of the rotations.
        position_std: of the numbers that the learned table begins with. 1, as published, is as much as a token's content and more, which is
            for a table that is loaded; to learn from nothing, 0.02 lets the network see what is in an image from the start.
        checkpointing: which blocks' activations are computed again in the backward pass, less memory for more time: True,
            `dict(policy="sqrt")`, `dict(policy="selective")`, see `visionkit.ops.checkpointing.Checkpointing`.
        pretrained: a checkpoint of this network, or of any model with one, to start from; see `Trunk`.
        init_cfg: the same in mmengine's form.

    Attributes:
        returns_tokens: True.
        out_channels: (C,), of a patch.
        strides: image pixels a token, each way.
        patches_per_token: m, `merge` multiplied, 1 without.
    """
    returns_tokens = True

    def __init__(self, patch_size: int = 14, channels: int = 1152, num_layers: int = 27, num_heads: int = 16, hidden_channels: int = 4304,
                 position_grid: Sequence[int] = (64, 64), merge: Sequence[int] | None = (2, 2), rope_base: float = 10000.0,
                 position_std: float = 1.0, checkpointing: bool | str | Mapping = False, pretrained: str | None = None,
                 init_cfg: Mapping | None = None) -> None:
        super().__init__(pretrained, init_cfg)
        if min(patch_size, channels, num_layers, num_heads, hidden_channels) < 1:
            raise ValueError(f"patch_size, channels, num_layers, num_heads and hidden_channels are 1 or more, got {patch_size}, "
                             f"{channels}, {num_layers}, {num_heads} and {hidden_channels}")
        if len(position_grid) != 2 or min(position_grid) < 1:
            raise ValueError(f"position_grid is (rows, columns) of the learned table, got {position_grid}")
        if channels % (4 * num_heads):
            raise ValueError(f"rows and columns rotate pairs of channels: channels must be a multiple of 4 * num_heads = {4 * num_heads}, "
                             f"got {channels}")
        if merge is not None and not (isinstance(merge, Sequence) and len(merge) == 2 and isinstance(merge[0], int)
                                      and merge[0] == merge[1] >= 1):
            raise ValueError(f"merge must be as many rows as columns of patches, such as (2, 2), or None; got {merge}")
        self.patch_size = patch_size
        self.head_channels = channels // num_heads
        self.merge = None if merge is None else tuple(merge)
        self.rope_base = rope_base
        self.patch_embed = PatchEmbedding(patch_size, channels)
        self.positions = nn.Parameter(torch.empty(*position_grid, channels))
        self.checkpointing = Checkpointing.of(checkpointing)
        self.encoder = VisionTransformerEncoder(num_layers, channels, num_heads, hidden_channels, "gelu_tanh", 1e-5, self.checkpointing)
        nn.init.normal_(self.positions, std=position_std)
        for block in self.encoder.blocks:
            for linear in (block.feed_forward.linear1, block.feed_forward.linear2):
                nn.init.trunc_normal_(linear.weight, std=(2 / linear.in_features) ** 0.5)
                nn.init.zeros_(linear.bias)
        merged = 1 if merge is None else merge[0]
        self.patches_per_token = merged ** 2
        self.out_channels = (channels,)
        self.strides = (patch_size * merged,)

    def forward(self, images: ImageList | ImageBatch | Tensor) -> PackedSequence:
        """Normalised images to tokens with grids: [T / m, m, C], the m patches of a token row by row, so that a neck can still normalise
        each (`MLPProjector`); [T, C] where `merge` is None.

        Raises:
            ConfigError: an image is no multiple of the stride, or has a side of 512 patches or more.
        """
        patches = patches_of(images, self.patch_size, self.strides[0])
        for index, grid in enumerate(patches.grids):
            if max(grid) >= LONGEST_SIDE:
                raise ConfigError(f"image {index} has {grid[0]}x{grid[1]} patches, and a side has fewer than {LONGEST_SIDE}; crop "
                                  f"it in the pipeline, or scale it down")
        tokens = self.patch_embed(patches.tokens) + resized_positions(self.positions, patches.grids)
        rotation = rotation_2d(*patch_coordinates(patches), self.head_channels, self.rope_base)               # once, for all blocks
        tokens = self.encoder(patches.replace(tokens), rotation)
        return tokens if self.merge is None else merged_patches(tokens, self.merge)
