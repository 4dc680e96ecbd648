"""Network in network (Lin et al. 2013, arXiv:1312.4400), as RotNet has it for CIFAR-10 (arXiv:1803.07728, sec. 3.1)."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from visionkit.models.backbones.pretrained import Trunk
from visionkit.ops.checkpointing import Checkpointing, run_blocks
from visionkit.registry import BACKBONES

# Of each block: channels and kernel size of its convolutions, then the pooling after them.
_BLOCKS = (
    (((192, 5), (160, 1), (96, 1)), nn.MaxPool2d),
    (((192, 5), (192, 1), (192, 1)), nn.AvgPool2d),
    (((192, 3), (192, 1), (192, 1)), None),
    (((192, 3), (192, 1), (192, 1)), None),
)


@BACKBONES.register_module()
class NIN(Trunk):
    """Four blocks of a spatial convolution and two 1x1 convolutions, each with batch normalisation and ReLU.

    The first block ends with max pooling, the second with average pooling, both of 3x3 with stride 2, as in the authors' code.

    Args:
        out_blocks: the blocks whose output is returned, of 1 to 4, ascending; by default all. Those beyond the last are not built.
        pretrained: a checkpoint of this network, or of any model with one, to start from; see `Trunk`.
        init_cfg: the same in mmengine's form.
        checkpointing: which blocks' activations are computed again in the backward pass, less memory for more time: True,
            `dict(policy="sqrt")`, `dict(policy="selective")`, see `visionkit.ops.checkpointing.Checkpointing`.

    Attributes:
        out_channels: of each returned block.
        strides: image pixels a feature pixel, of each returned block.
    """

    def __init__(self, out_blocks: Sequence[int] = (1, 2, 3, 4), pretrained: str | None = None,
                 init_cfg: Mapping | None = None, checkpointing: bool | str | Mapping = False) -> None:
        super().__init__(pretrained, init_cfg)
        self.checkpointing = Checkpointing.of(checkpointing)
        if not out_blocks or list(out_blocks) != sorted(set(out_blocks) & {1, 2, 3, 4}):
            raise ValueError(f"out_blocks must be ascending numbers of 1 to 4, got {tuple(out_blocks)}")
        self.out_blocks = tuple(out_blocks)
        self.blocks = nn.ModuleList()
        in_channels = 3
        for convolutions, pooling in _BLOCKS[:self.out_blocks[-1]]:
            layers = []
            for width, kernel in convolutions:
                conv = nn.Conv2d(in_channels, width, kernel, padding=kernel // 2, bias=False)
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                in_channels = width
            if pooling is not None:
                layers.append(pooling(3, stride=2, padding=1))
            self.blocks.append(nn.Sequential(*layers))
        self.out_channels = tuple(_BLOCKS[block - 1][0][-1][0] for block in self.out_blocks)
        self.strides = tuple((2, 4, 4, 4)[block - 1] for block in self.out_blocks)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, H, W] to one [B, C_i, H / s_i, W / s_i] for each of `out_blocks`; sizes are rounded up."""
        return run_blocks(self.blocks, images, checkpointing=self.checkpointing, outputs_of=[number - 1 for number in self.out_blocks])
