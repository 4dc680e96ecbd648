"""Which reference box is responsible for which object."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from visionkit.ops import box_area, box_iou
from visionkit.registry import TARGETS

NEGATIVE = -1
IGNORED = -2


@TARGETS.register_module()
class IoUMatcher(nn.Module):
    """Each reference box takes the object it overlaps most, or is background, or is left out.

    Faster R-CNN (arXiv:1506.01497), sec. 3.1.2.

    Args:
        positive: from this IoU on, a box is an example of the object it overlaps most.
        negative: below this IoU it is background; what lies between the two is ignored.
        background_from: what overlaps objects by less than this is ignored too: Fast R-CNN (arXiv:1504.08083, sec. 2.3) learns
            background from boxes near objects only.
        rescue_from: every object takes the boxes that overlap it most, if by at least this IoU, even from another object; None: not.
        crowd_share: background boxes with more than this share of their area in one crowd region are ignored.
    """

    def __init__(self, positive: float = 0.5, negative: float = 0.5, rescue_from: float | None = None, crowd_share: float = 0.5,
                 background_from: float = 0.0) -> None:
        super().__init__()
        if not 0 <= background_from <= negative <= positive <= 1:
            raise ValueError(f"matching needs 0 <= background_from <= negative <= positive <= 1, got {background_from=}, {negative=}, "
                             f"{positive=}")
        if rescue_from is not None and not 0 < rescue_from <= 1:
            raise ValueError(f"rescue_from must lie in (0, 1], got {rescue_from}: at 0 an object that no box overlaps would take "
                             f"every box; 0.01 lets each object have its best")
        self.positive = positive
        self.negative = negative
        self.rescue_from = rescue_from
        self.crowd_share = crowd_share
        self.background_from = background_from

    @torch.no_grad()
    def forward(self, boxes: Tensor, objects: Tensor, crowds: Tensor) -> Tensor:
        """Match `boxes` [N, 4] with `objects` [G, 4].

        Returns:
            [N] int64: the index of the object, or NEGATIVE, or IGNORED.
        """
        if len(objects):
            iou = box_iou(objects, boxes)                                   # [G, N]: one row an object keeps the reductions fast
            best, matched = iou.max(0)
            background = (best >= self.background_from) & (best < self.negative)
            matched = torch.where(best >= self.positive, matched, torch.where(background, NEGATIVE, IGNORED))
            if self.rescue_from is not None and len(boxes):
                reach = iou.max(1, keepdim=True).values                     # what each object gets at best
                rescued = (iou == reach) & (reach >= self.rescue_from)
                taker = torch.where(rescued, torch.arange(len(objects), device=boxes.device)[:, None], -1).amax(0)
                matched = torch.where(taker >= 0, taker, matched)           # of several objects the last takes the box
        else:
            matched = boxes.new_full((len(boxes),), NEGATIVE, dtype=torch.int64)
        if len(crowds):
            top_left = torch.maximum(boxes[:, None, :2], crowds[:, :2])
            inside = (torch.minimum(boxes[:, None, 2:], crowds[:, 2:]) - top_left).clamp(min=0).prod(-1)    # [N, crowds]
            share = inside.max(1).values / box_area(boxes).clamp(min=1e-6)
            matched[(matched == NEGATIVE) & (share > self.crowd_share)] = IGNORED
        return matched
