"""Which order nine tiles are in (Noroozi and Favaro 2016, arXiv:1603.09246)."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.models.losses import mean_over_ranks
from visionkit.registry import HEADS

# B images, T orders an image, K orders there are, D numbers an embedding of a tile


@HEADS.register_module()
class JigsawHead(nn.Module):
    """A layer for each tile alone, the nine side by side in the order asked, a hidden layer, and an answer for each order (fig. 3).

    Args:
        in_channels: D.
        num_answers: K.
        tile_channels: of the layer that all tiles share, the paper's fc6.
        hidden_channels: of the layer that sees all tiles, the paper's fc7.
        dropout: of the units of both.
    """

    def __init__(self, in_channels: int, num_answers: int, tile_channels: int = 512, hidden_channels: int = 4096,
                 dropout: float = 0.5) -> None:
        super().__init__()
        self.tile = nn.Linear(in_channels, tile_channels)
        self.hidden = nn.Linear(9 * tile_channels, hidden_channels)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(hidden_channels, num_answers)
        for layer in (self.tile, self.hidden):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)

    def forward(self, tiles: Tensor, orders: Tensor) -> Tensor:
        """[B, 9, D] and orders [B, T, 9] int64 to logits [B, T, K], in float32 also under autocast.

        Place i of a puzzle holds tile orders[..., i].
        """
        tiles = self.dropout(self.tile(tiles).relu())                                # [B, 9, tile_channels]
        image = torch.arange(len(tiles), device=tiles.device).view(-1, 1, 1)
        shuffled = tiles[image, orders].flatten(2)                                   # [B, T, 9 * tile_channels]
        logits = self.classify(self.dropout(self.hidden(shuffled).relu()))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of [..., K] with [...] int64, the mean over all puzzles of all processes; 0 where there are none."""
        summed = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
        return summed / mean_over_ranks(labels.numel(), logits.device)
