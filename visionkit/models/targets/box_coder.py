"""Boxes as offsets from reference boxes."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visionkit.registry import TARGETS


@TARGETS.register_module()
class BoxCoder(nn.Module):
    """The parametrisation of Girshick et al. 2014 (R-CNN, arXiv:1311.2524, appendix C): shift of the centre over the size of the
    reference, log of the size ratio; both divided by `stds`.

    Args:
        stds: of (dx, dy, dw, dh), so that the targets have about unit variance.
        max_ratio: predicted sides are at most so many times the reference's, which keeps exp() finite.
    """

    def __init__(self, stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0), max_ratio: float = 1000 / 16) -> None:
        super().__init__()
        if len(stds) != 4 or min(stds) <= 0:
            raise ValueError(f"stds must be four positive numbers for (dx, dy, dw, dh), got {stds}")
        self.register_buffer("stds", torch.tensor(stds, dtype=torch.float32), persistent=False)
        self.max_log_ratio = math.log(max_ratio)

    def encode(self, references: Tensor, boxes: Tensor) -> Tensor:
        """[N, 4] offsets that lead from `references` [N, 4] to `boxes` [N, 4]; both of positive size."""
        center, size = _center_and_size(references)
        box_center, box_size = _center_and_size(boxes)
        return torch.cat([(box_center - center) / size, (box_size / size).log()], -1) / self.stds

    def decode(self, references: Tensor, deltas: Tensor) -> Tensor:
        """Boxes [..., 4] that `deltas` [..., 4] lead to from `references` [..., 4], broadcast; not clipped to any image."""
        center, size = _center_and_size(references)
        shift, log_ratio = (deltas * self.stds).split(2, -1)
        center = center + shift * size
        half = size * log_ratio.clamp(-self.max_log_ratio, self.max_log_ratio).exp() / 2
        return torch.cat([center - half, center + half], -1)


def _center_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    top_left, bottom_right = boxes.split(2, -1)
    return (top_left + bottom_right) / 2, bottom_right - top_left
