"""Where a patch lies, seen from another (Doersch et al. 2015, arXiv:1505.05192)."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.models.losses import mean_over_ranks
from visionkit.registry import HEADS

# N pairs, D numbers an embedding


@HEADS.register_module()
class RelativePatchHead(nn.Module):
    """Two embeddings side by side, a hidden layer, and eight answers (sec. 3 and fig. 3).

    Args:
        in_channels: D.
        hidden_channels: of the hidden layer.
        dropout: of its units.
        norm_momentum: the part of a batch's statistics that the hidden layer's running ones take over. At 0.003 they need some thousand
            iterations; a run of a few hundred wants more, or its validation shows numbers of a network that never was.
    """

    def __init__(self, in_channels: int, hidden_channels: int = 4096, dropout: float = 0.5, norm_momentum: float = 0.003) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * in_channels, hidden_channels)
        self.norm = nn.BatchNorm1d(hidden_channels, momentum=norm_momentum)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(hidden_channels, 8)
        for layer, std in ((self.hidden, 0.01), (self.classify, 0.005)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, centre: Tensor, neighbour: Tensor) -> Tensor:
        """[N, D] and [N, D] to logits [N, 8], in float32 also under autocast.

        The answers are the cells around the centre in raster order: 0 is above on the left, 3 on the left, 4 on the right.
        """
        hidden = self.norm(self.hidden(torch.cat([centre, neighbour], -1)))
        logits = self.classify(self.dropout(hidden.relu()))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of [..., 8] with [...] int64, the mean over all pairs of all processes; 0 where there are none."""
        summed = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
        return summed / mean_over_ranks(labels.numel(), logits.device)
