"""From features to the class of the whole image."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.models.layers import global_mean
from visionkit.models.losses import mean_over_ranks
from visionkit.registry import HEADS
from visionkit.structures import PackedSequence

# B images, C channels, N classes


@HEADS.register_module()
class ClassificationHead(nn.Module):
    """The mean over locations or tokens, and a linear layer (Lin et al. 2014, arXiv:1312.4400, sec. 3.2; He et al. 2015).

    Args:
        in_channels: C of the features; their owner tells.
        num_classes: N.
        label_smoothing: the share of the target that goes evenly to all classes (Szegedy et al. 2016, arXiv:1512.00567, sec. 7).
        dropout: of the mean, in training.
    """

    def __init__(self, in_channels: int, num_classes: int, label_smoothing: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if not 0 <= label_smoothing < 1 or not 0 <= dropout < 1:
            raise ValueError(f"label_smoothing and dropout lie within 0 and 1, 1 excluded; got {label_smoothing=}, {dropout=}")
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, features: Tensor | PackedSequence, valid: Tensor | None = None) -> Tensor:
        """[B, N] logits.

        Args:
            features: [B, C, h, w], or [B, C] that is averaged already, or tokens of B images.
            valid: [B, H, W] bool, true on the image and false on its padding; by default all is image. Tokens have no padding.
        """
        return self.linear(self.dropout(global_mean(features, valid)))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy, the mean over the images of all processes; 0 where there are none. `labels` is [B] int64."""
        summed = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="sum")
        return summed / mean_over_ranks(labels.numel(), logits.device)
