"""Feature pyramid network (Lin et al. 2017, arXiv:1612.03144)."""
from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.registry import NECKS


@NECKS.register_module()
class FPN(nn.Module):
    """A pyramid with strong features at every scale (sec. 3).

    Args:
        in_channels: of each input level, finest first.
        strides: of each input level.
        out_channels: of every output level.
        num_levels: output levels; those beyond the inputs are the coarsest level, every other pixel (footnote 2). None: as many as inputs.

    Attributes:
        out_channels, strides: of each output level.
    """

    def __init__(self, in_channels: Sequence[int], strides: Sequence[int], out_channels: int = 256, num_levels: int | None = None) -> None:
        super().__init__()
        num_levels = len(in_channels) if num_levels is None else num_levels
        if num_levels < len(in_channels):
            raise ValueError(f"an FPN has at least its {len(in_channels)} input levels, got num_levels={num_levels}; "
                             f"take stages out of the backbone's out_stages instead")
        self.lateral = nn.ModuleList(nn.Conv2d(channels, out_channels, 1) for channels in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in in_channels)
        self.num_extra = num_levels - len(in_channels)
        self.out_channels = (out_channels,) * num_levels
        self.strides = (*strides, *(strides[-1] * 2 ** (extra + 1) for extra in range(self.num_extra)))
        for conv in (*self.lateral, *self.output):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """[B, C_i, h_i, w_i], finest first, to [B, out_channels, h_i, w_i] and the extra levels."""
        merged = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for level in reversed(range(len(merged) - 1)):
            merged[level] = merged[level] + F.interpolate(merged[level + 1], size=merged[level].shape[2:], mode="nearest")
        pyramid = [output(level) for output, level in zip(self.output, merged, strict=True)]
        for _ in range(self.num_extra):
            pyramid.append(F.max_pool2d(pyramid[-1], 1, stride=2))
        return tuple(pyramid)
