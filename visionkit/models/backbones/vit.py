"""The vision transformer (Dosovitskiy et al. 2020, An Image is Worth 16x16 Words, arXiv:2010.11929), on images of any size."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from visionkit.models.backbones.pretrained import Trunk
from visionkit.models.layers import PatchEmbedding, VisionTransformerEncoder, patches_of, resized_positions
from visionkit.ops.checkpointing import Checkpointing
from visionkit.registry import BACKBONES
from visionkit.structures import ImageBatch, ImageList, PackedSequence


@BACKBONES.register_module()
class ViT(Trunk):
    """A transformer on patches, which know their place by a learned table alone. It is a token backbone: it returns a packed sequence.

    Each image must be a multiple of `patch_size` pixels. Of an `ImageBatch` each image is taken by itself, with what fills its last
    patches, not its canvas; see `patches_of`. By default it is ViT-B/16 for 224 pixels.

    Args:
        patch_size: pixels.
        channels: C, of a token.
        num_layers: blocks.
        num_heads: of each attention.
        hidden_channels: of the feed-forward networks.
        position_grid: rows and columns of the learned table, which are interpolated bicubically for other grids (sec. 3.2).
        class_token: a learned token before those of each image, which belongs to no patch.
        returned: `patches`; `class`: the class token alone, as an image of one token, which is what pooling then gives; `all`: the class
            token and the patches after it, without grids; without a class token the same as `patches`.
        checkpointing: which blocks' activations are computed again in the backward pass, less memory for more time: True,
            `dict(policy="sqrt")`, `dict(policy="selective")`, see `visionkit.ops.checkpointing.Checkpointing`.
        pretrained: a checkpoint of this network, or of any model with one, to start from; see `Trunk`.
        init_cfg: the same in mmengine's form.

    Attributes:
        returns_tokens: True.
        out_channels: (C,).
        strides: image pixels a patch, each way.
    """
    returns_tokens = True

    def __init__(self, patch_size: int = 16, channels: int = 768, num_layers: int = 12, num_heads: int = 12, hidden_channels: int = 3072,
                 position_grid: Sequence[int] = (14, 14), class_token: bool = True, returned: str = "patches",
                 checkpointing: bool | str | Mapping = False, pretrained: str | None = None, init_cfg: Mapping | None = None) -> None:
        super().__init__(pretrained, init_cfg)
        if min(patch_size, channels, num_layers, num_heads, hidden_channels) < 1:
            raise ValueError(f"patch_size, channels, num_layers, num_heads and hidden_channels are 1 or more, got {patch_size}, "
                             f"{channels}, {num_layers}, {num_heads} and {hidden_channels}")
        if len(position_grid) != 2 or min(position_grid) < 1:
            raise ValueError(f"position_grid is (rows, columns) of the learned table, got {position_grid}")
        if returned not in ("patches", "class", "all"):
            raise ValueError(f"returned must be 'patches', 'class' or 'all', got {returned!r}")
        if returned == "class" and not class_token:
            raise ValueError("returned='class' needs class_token=True, got class_token=False")
        self.patch_size = patch_size
        self.position_grid = tuple(position_grid)
        self.returned = returned
        self.patch_embed = PatchEmbedding(patch_size, channels)
        self.class_token = nn.Parameter(torch.empty(1, 1, channels)) if class_token else None
        # the class token's place comes first
        self.positions = nn.Parameter(torch.empty(1, int(class_token) + position_grid[0] * position_grid[1], channels))
        self.checkpointing = Checkpointing.of(checkpointing)
        self.encoder = VisionTransformerEncoder(num_layers, channels, num_heads, hidden_channels, "gelu", 1e-6, self.checkpointing)
        for weight in (self.positions, self.class_token, *(module.weight for module in self.modules() if isinstance(module, nn.Linear))):
            if weight is not None:
                nn.init.trunc_normal_(weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        self.out_channels = (channels,)
        self.strides = (patch_size,)

    def forward(self, images: ImageList | ImageBatch | Tensor) -> PackedSequence:
        """Normalised images to tokens [T, C], see `returned`.

        Raises:
            ConfigError: an image is no multiple of `patch_size`.
        """
        patches = patches_of(images, self.patch_size)
        first = 0 if self.class_token is None else 1
        table = self.positions[0, first:].unflatten(0, self.position_grid)
        patches = patches.replace(self.patch_embed(patches.tokens) + resized_positions(table, patches.grids))
        if self.class_token is None:
            return self.encoder(patches)
        start = self.class_token[0] + self.positions[0, :1]                                                   # [1, C]
        tokens = self.encoder(PackedSequence.pack([torch.cat([start, image]) for image in patches.split()]))
        if self.returned == "all":
            return tokens
        if self.returned == "class":
            return PackedSequence.of_grids(tokens.tokens[tokens.cu_seqlens[:-1].long()], [(1, 1)] * len(tokens))
        return PackedSequence.pack([image[1:] for image in tokens.split()], patches.grids)
