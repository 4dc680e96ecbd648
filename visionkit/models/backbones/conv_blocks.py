"""A small plain network for small images: 3x3 convolutions, halved after each block."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from visionkit.models.backbones.pretrained import Trunk
from visionkit.ops.checkpointing import Checkpointing, run_blocks
from visionkit.registry import BACKBONES


@BACKBONES.register_module()
class ConvBlocks(Trunk):
    """Blocks of 3x3 convolutions, each with batch normalisation and ReLU, and 2x2 max pooling after each block.

    Weights start as PyTorch's convolutions do. Under a norm their scale only divides the size of a step; He et al.'s, six times as large in
    the square, learn more slowly at the same rate.

    Args:
        channels: of each block.
        convs_per_block: how many.
        out_blocks: the blocks whose pooled output is returned, counted from 1, ascending; by default all. Those beyond the last are not
            built.
        pretrained: a checkpoint of this network, or of any model with one, to start from; see `Trunk`.
        init_cfg: the same in mmengine's form.
        checkpointing: which blocks' activations are computed again in the backward pass, less memory for more time: True,
            `dict(policy="sqrt")`, `dict(policy="selective")`, see `visionkit.ops.checkpointing.Checkpointing`.

    Attributes:
        out_channels: of each returned block.
        strides: image pixels a feature pixel, of each returned block.
    """

    def __init__(self, channels: Sequence[int] = (32, 64, 96), convs_per_block: int = 2, out_blocks: Sequence[int] | None = None,
                 pretrained: str | None = None, init_cfg: Mapping | None = None, checkpointing: bool | str | Mapping = False) -> None:
        super().__init__(pretrained, init_cfg)
        self.checkpointing = Checkpointing.of(checkpointing)
        if not channels or min(channels) < 1 or convs_per_block < 1:
            raise ValueError(f"channels needs a positive number for each block and convs_per_block must be positive; got {channels} and "
                             f"{convs_per_block}")
        blocks = range(1, len(channels) + 1)
        self.out_blocks = tuple(blocks if out_blocks is None else out_blocks)
        if not self.out_blocks or list(self.out_blocks) != sorted(set(self.out_blocks) & set(blocks)):
            raise ValueError(f"out_blocks must be ascending numbers of 1 to {len(channels)}, got {self.out_blocks}")
        self.blocks = nn.ModuleList()
        in_channels = 3
        for width in channels[:self.out_blocks[-1]]:
            layers = []
            for _ in range(convs_per_block):
                layers += [nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                in_channels = width
            self.blocks.append(nn.Sequential(*layers, nn.MaxPool2d(2, ceil_mode=True)))
        self.to(memory_format=torch.channels_last)                         # a fifth faster on a CPU
        self.out_channels = tuple(channels[block - 1] for block in self.out_blocks)
        self.strides = tuple(2**block for block in self.out_blocks)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, H, W] to one [B, C_i, H / s_i, W / s_i] for each of `out_blocks`; sizes are rounded up."""
        return run_blocks(self.blocks, images, checkpointing=self.checkpointing, outputs_of=[number - 1 for number in self.out_blocks])
