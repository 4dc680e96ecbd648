"""Reference boxes on a grid."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visionkit.registry import TARGETS


@TARGETS.register_module()
class AnchorGrid(nn.Module):
    """Anchors of every shape at every position of every pyramid level (Ren et al. 2015, Faster R-CNN, arXiv:1506.01497, sec. 3.1.1).

    Args:
        strides: of each level, image pixels.
        scales: anchor sides of a square anchor, in strides.
        ratios: heights over widths, at constant area.
    """

    def __init__(self, strides: Sequence[int], scales: Sequence[float] = (8.0,), ratios: Sequence[float] = (0.5, 1.0, 2.0)) -> None:
        super().__init__()
        if not strides or not scales or min(*strides, *scales, *ratios) <= 0:
            raise ValueError(f"strides, scales and ratios must be positive and not empty; got {strides}, {scales}, {ratios}")
        self.strides = tuple(strides)
        self.per_position = len(scales) * len(ratios)
        for level, stride in enumerate(self.strides):
            half = torch.tensor([[scale * stride / ratio**0.5, scale * stride * ratio**0.5] for ratio in ratios for scale in scales]) / 2
            self.register_buffer(f"shape{level}", torch.cat([-half, half], 1), persistent=False)

    def forward(self, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Anchors of each level.

        Args:
            sizes: the (h, w) of each level's feature map.

        Returns:
            one [h * w * A, 4] a level, position by position in rows, A anchors each; (x1, y1, x2, y2) in image pixels, centred on the
            top left corner of each cell.
        """
        if len(sizes) != len(self.strides):
            raise ValueError(f"the anchor grid has {len(self.strides)} strides {self.strides}, got {len(sizes)} feature levels")
        return [self._level(getattr(self, f"shape{level}"), stride, *size)
                for level, (stride, size) in enumerate(zip(self.strides, sizes, strict=True))]

    @staticmethod
    def _level(shapes: Tensor, stride: int, height: int, width: int) -> Tensor:
        y, x = torch.meshgrid(torch.arange(height, device=shapes.device) * stride, torch.arange(width, device=shapes.device) * stride,
                              indexing="ij")
        corners = torch.stack([x, y, x, y], -1).view(-1, 1, 4)
        return (corners + shapes).view(-1, 4)
