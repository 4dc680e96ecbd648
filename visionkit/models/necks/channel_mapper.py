"""The multi-scale feature maps that deformable attention reads (Zhu et al. 2020, arXiv:2010.04159, appendix A.2 and fig. 4)."""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from visionkit.registry import NECKS


@NECKS.register_module()
class ChannelMapper(nn.Module):
    """Every level to the same channels, each by itself: there is no top-down path, attention carries between levels.

    Args:
        in_channels: of each input level, finest first.
        strides: of each input level.
        out_channels: of every output level, a multiple of 32.
        num_levels: output levels; the first beyond the inputs is a 3x3 convolution of stride 2 on the coarsest *input*, those after it on
            the level before. None: as many as inputs.

    Attributes:
        out_channels, strides: of each output level.
    """

    def __init__(self, in_channels: Sequence[int], strides: Sequence[int], out_channels: int = 256, num_levels: int | None = None) -> None:
        super().__init__()
        num_levels = len(in_channels) if num_levels is None else num_levels
        if num_levels < len(in_channels):
            raise ValueError(f"a ChannelMapper has at least its {len(in_channels)} input levels, got num_levels={num_levels}; "
                             f"take stages out of the backbone's out_stages instead")
        if out_channels % 32:
            raise ValueError(f"group normalisation has 32 groups: out_channels must be a multiple of 32, got {out_channels}")
        num_extra = num_levels - len(in_channels)
        self.lateral = nn.ModuleList(_normalised(nn.Conv2d(channels, out_channels, 1)) for channels in in_channels)
        extra_channels = [in_channels[-1], *[out_channels] * num_extra][:num_extra]
        self.extra = nn.ModuleList(_normalised(nn.Conv2d(channels, out_channels, 3, stride=2, padding=1)) for channels in extra_channels)
        self.out_channels = (out_channels,) * num_levels
        self.strides = (*strides, *(strides[-1] * 2 ** (extra + 1) for extra in range(num_extra)))

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """[B, C_i, h_i, w_i], finest first, to [B, out_channels, h_i, w_i] and the extra levels."""
        pyramid = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        coarsest = features[-1]
        for extra in self.extra:
            coarsest = extra(coarsest)
            pyramid.append(coarsest)
        return tuple(pyramid)


def _normalised(conv: nn.Conv2d) -> nn.Sequential:
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.GroupNorm(32, conv.out_channels))
