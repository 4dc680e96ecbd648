"""Which of the matched boxes are learned from."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from visionkit.models.targets.iou_matcher import NEGATIVE
from visionkit.registry import TARGETS


@TARGETS.register_module()
class BalancedSampler(nn.Module):
    """A fixed number of boxes an image, drawn at random, with a limited share of positives (Fast R-CNN, arXiv:1504.08083, sec. 2.3).

    Args:
        num: boxes an image; fewer where there are not enough.
        positive_fraction: of `num`, positives at most; negatives fill the rest.
        shuffle: draw at random; otherwise take the first, which tests and comparisons between runs want.
    """

    def __init__(self, num: int, positive_fraction: float, shuffle: bool = True) -> None:
        super().__init__()
        if num < 1 or not 0 <= positive_fraction <= 1:
            raise ValueError(f"sampling needs num >= 1 and a positive_fraction in [0, 1], got {num} and {positive_fraction}")
        self.num = num
        self.positive_fraction = positive_fraction
        self.shuffle = shuffle

    def forward(self, matched: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the positives and of the negatives drawn from `matched` [N], the answer of a matcher."""
        positives = self._draw((matched >= 0).nonzero()[:, 0], int(self.num * self.positive_fraction))
        negatives = self._draw((matched == NEGATIVE).nonzero()[:, 0], self.num - len(positives))
        return positives, negatives

    def _draw(self, candidates: Tensor, count: int) -> Tensor:
        if len(candidates) <= count:
            return candidates
        if not self.shuffle:
            return candidates[:count]
        chosen = torch.randperm(len(candidates))[:count].to(candidates.device)      # on the CPU: the same draw on every device
        return candidates[chosen]


@TARGETS.register_module()
class AllSampler(nn.Module):
    """Every box that is not ignored."""

    def __init__(self) -> None:                              # nn.Module's own takes any argument, and a config's mistake would not show
        super().__init__()

    def forward(self, matched: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the positives and of the negatives in `matched` [N], the answer of a matcher."""
        return (matched >= 0).nonzero()[:, 0], (matched == NEGATIVE).nonzero()[:, 0]
