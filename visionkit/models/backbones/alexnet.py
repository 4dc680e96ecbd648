"""AlexNet (Krizhevsky et al. 2012, ImageNet Classification with Deep Convolutional Neural Networks) as pretext tasks are compared on it:
one tower with batch normalisation instead of local response normalisation (RotNet, arXiv:1803.07728, sec. 3.2)."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from visionkit.models.backbones.pretrained import Trunk
from visionkit.ops.checkpointing import Checkpointing, run_blocks
from visionkit.registry import BACKBONES

# Of each stage: channels, kernel size and stride of its convolution, and whether pooling follows.
_STAGES = ((96, 11, 4, True), (256, 5, 1, True), (384, 3, 1, False), (384, 3, 1, False), (256, 3, 1, True))


@BACKBONES.register_module()
class AlexNet(Trunk):
    """Five convolutions, each with batch normalisation and ReLU; the first, second and last with 3x3 max pooling of stride 2.

    Channels are those of the paper's two towers together. Convolutions have no bias: the norm behind them has one. Everything is padded so
    that a map has as many cells as its stride promises: of 224 pixels the last one has 7x7, in the paper 6x6.

    Args:
        out_stages: the stages whose output is returned, of 1 to 5 (conv1 to conv5 in the papers' tables), ascending; those beyond the last
            are not built.
        pretrained: a checkpoint of this network, or of any model with one, to start from; see `Trunk`.
        init_cfg: the same in mmengine's form.
        checkpointing: which stages' activations are computed again in the backward pass, less memory for more time: True,
            `dict(policy="sqrt")`, `dict(policy="selective")`, see `visionkit.ops.checkpointing.Checkpointing`.

    Attributes:
        out_channels: of each returned stage.
        strides: image pixels a feature pixel, of each returned stage.
    """

    def __init__(self, out_stages: Sequence[int] = (1, 2, 3, 4, 5), pretrained: str | None = None, init_cfg: Mapping | None = None,
                 checkpointing: bool | str | Mapping = False) -> None:
        super().__init__(pretrained, init_cfg)
        if not out_stages or list(out_stages) != sorted(set(out_stages) & {1, 2, 3, 4, 5}):
            raise ValueError(f"out_stages must be ascending numbers of 1 to 5 (conv1 to conv5), got {tuple(out_stages)}")
        self.out_stages = tuple(out_stages)
        self.checkpointing = Checkpointing.of(checkpointing)
        self.stages = nn.ModuleList()
        in_channels, stride, strides = 3, 1, []
        for channels, kernel, step, pooled in _STAGES[:self.out_stages[-1]]:
            conv = nn.Conv2d(in_channels, channels, kernel, step, kernel // 2, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            pooling = [nn.MaxPool2d(3, 2, 1)] if pooled else []
            self.stages.append(nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True), *pooling))
            in_channels, stride = channels, stride * step * (2 if pooled else 1)
            strides.append(stride)
        self.out_channels = tuple(_STAGES[stage - 1][0] for stage in self.out_stages)
        self.strides = tuple(strides[stage - 1] for stage in self.out_stages)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, H, W] to one [B, C_i, H / s_i, W / s_i] for each of `out_stages`; sizes are rounded up."""
        return run_blocks(self.stages, images, checkpointing=self.checkpointing, outputs_of=[stage - 1 for stage in self.out_stages])
