"""The second stage: what is in each proposal, and where exactly (Girshick 2015, Fast R-CNN, arXiv:1504.08083)."""
from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.models.heads.roi_head import RoIHead
from visionkit.models.heads.roi_pooling import PyramidRoIAlign
from visionkit.ops.detections import Thinning
from visionkit.registry import HEADS


@HEADS.register_module()
class RoIBoxHead(RoIHead):
    """RoI pooling, fully connected layers, a class and a box for each class.

    Args:
        in_channels: of each pyramid level.
        strides: of each pyramid level.
        pooling: features of each box; by default `dict(type="PyramidRoIAlign", pool_size=7)`.
        hidden_channels: of each fully connected layer.
        class_agnostic: one box for all classes.
        others: as of `RoIHead`.
    """

    def __init__(self, num_classes: int, in_channels: Sequence[int], strides: Sequence[int], pooling: dict | nn.Module | None = None,
                 hidden_channels: Sequence[int] = (1024, 1024), class_agnostic: bool = False,
                 box_stds: Sequence[float] = (0.1, 0.1, 0.2, 0.2), matcher: dict | nn.Module | None = None,
                 sampler: dict | nn.Module | None = None, smooth_l1_beta: float = 0.0, score_threshold: float = 0.05,
                 nms: dict | Thinning | None = None, max_per_image: int = 100) -> None:
        super().__init__(num_classes, box_stds, matcher, sampler, smooth_l1_beta, score_threshold, nms, max_per_image)
        self.pooling = HEADS.make(pooling or PyramidRoIAlign(in_channels, strides), at="pooling", in_channels=in_channels, strides=strides)
        self.box_classes = 1 if class_agnostic else num_classes
        widths = (self.pooling.out_channels * self.pooling.pool_size**2, *hidden_channels)
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.classify = nn.Linear(widths[-1], num_classes + 1)
        self.regress = nn.Linear(widths[-1], self.box_classes * 4)
        for layer in self.hidden:
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.normal_(self.regress.weight, std=0.001)
        for layer in (*self.hidden, self.classify, self.regress):
            nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [R, C + 1] and deltas [R, C or 1, 4] of boxes, see `RoIHead`."""
        pooled = self.pooling(features, boxes)
        hidden = pooled.permute(0, 2, 3, 1).flatten(1)          # bin by bin, as it lies in memory: no copy of the largest tensor here
        for layer in self.hidden:
            hidden = F.relu(layer(hidden), inplace=True)
        return self.classify(hidden).float(), self.regress(hidden).view(-1, self.box_classes, 4).float()
