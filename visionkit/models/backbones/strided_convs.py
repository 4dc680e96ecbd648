"""The convolutional encoder of Deep InfoMax (Hjelm et al. 2019, arXiv:1808.06670, appendix A.2), after DCGAN's discriminator."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from visionkit.models.backbones.pretrained import Trunk
from visionkit.ops.checkpointing import Checkpointing, run_blocks
from visionkit.registry import BACKBONES


@BACKBONES.register_module()
class StridedConvs(Trunk):
    """4x4 convolutions with stride 2 and padding 1, each with batch norm and ReLU; the map after each is returned.

    The convolutions have no bias: the norm behind them has one.

    Args:
        channels: of each convolution; 64, 128, 256 for images of 32 pixels (`basic32x32` in the authors' code), and 512 more for 64.
        pretrained: a checkpoint of this network, or of any model with one, to start from; see `Trunk`.
        init_cfg: the same in mmengine's form.
        checkpointing: which blocks' activations are computed again in the backward pass, less memory for more time: True,
            `dict(policy="sqrt")`, `dict(policy="selective")`, see `visionkit.ops.checkpointing.Checkpointing`.
    """

    def __init__(self, channels: Sequence[int] = (64, 128, 256), pretrained: str | None = None,
                 init_cfg: Mapping | None = None, checkpointing: bool | str | Mapping = False) -> None:
        super().__init__(pretrained, init_cfg)
        self.checkpointing = Checkpointing.of(checkpointing)
        if not channels or min(channels) < 1:
            raise ValueError(f"channels needs one positive number a convolution, got {tuple(channels)}")
        self.out_channels = tuple(channels)
        self.strides = tuple(2 ** (index + 1) for index in range(len(channels)))
        self.blocks = nn.ModuleList(_block(*pair) for pair in zip((3, *channels[:-1]), channels, strict=True))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, H, W] to one [B, C_i, H / 2^i, W / 2^i] a convolution, i from 1; sizes are rounded down."""
        return run_blocks(self.blocks, images, checkpointing=self.checkpointing, outputs_of=range(len(self.blocks)))

    def copy_after(self, index: int) -> nn.Sequential:
        """Layers like those that follow map `index`, with weights of their own: [B, C_index, h, w] to the last map."""
        channels = self.out_channels[index:]
        return nn.Sequential(*(_block(*pair) for pair in zip(channels[:-1], channels[1:], strict=True)))


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 4, 2, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))
