"""By how much an image is turned, told from its features (Gidaris et al. 2018, arXiv:1803.07728)."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.models.layers import global_mean
from visionkit.models.losses import mean_over_ranks
from visionkit.registry import HEADS
from visionkit.structures import PackedSequence

# N views, C channels


@HEADS.register_module()
class RotationHead(nn.Module):
    """Global average pooling and a linear layer to the four rotations.

    Args:
        in_channels: C, of the features.
        num_answers: K, where a puzzle in the place of the rotations has another number.
    """

    def __init__(self, in_channels: int, num_answers: int = 4) -> None:
        super().__init__()
        self.classify = nn.Linear(in_channels, num_answers)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)

    def forward(self, features: Tensor | PackedSequence) -> Tensor:
        """[N, C, h, w], or tokens of N views, to logits [N, K], in float32 also under autocast."""
        logits = self.classify(global_mean(features))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of [..., K] with [...] int64, the mean over all views of all processes; 0 where there are none."""
        summed = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
        return summed / mean_over_ranks(labels.numel(), logits.device)
