"""What DETR and its descendants learn from, once each object has its query."""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.ops import cxcywh_to_xyxy, elementwise_generalized_box_iou, sigmoid_focal_loss
from visionkit.registry import LOSSES

# B images, Q queries, C classes, K matched pairs of all images


@LOSSES.register_module()
class SetPredictionLoss(nn.Module):
    """Class, box and generalized IoU, already weighted (DETR, arXiv:2005.12872, eq. 2 and appendix A.2).

    Args:
        class_weight: of the class term.
        box_weight: of the L1 distance of (cx, cy, w, h).
        giou_weight: of 1 - generalized IoU.
        classification: `softmax`, a cross entropy whose last class is no-object; or `sigmoid`, a focal loss for each class on its own
            (Deformable DETR, arXiv:2010.04159).
        no_object_weight: softmax: how much a query without an object counts, against 1 for one with.
        focal_alpha: sigmoid: weight of the class that is present, 1 less it for the others.
        focal_gamma: sigmoid: the larger, the less an easy example counts.
    """

    def __init__(self, class_weight: float = 1.0, box_weight: float = 5.0, giou_weight: float = 2.0, classification: str = "softmax",
                 no_object_weight: float = 0.1, focal_alpha: float = 0.25, focal_gamma: float = 2.0) -> None:
        super().__init__()
        if classification not in ("softmax", "sigmoid"):
            raise ValueError(f"classification must be 'softmax' or 'sigmoid', got {classification!r}")
        self.class_weight = class_weight
        self.box_weight = box_weight
        self.giou_weight = giou_weight
        self.classification = classification
        self.no_object_weight = no_object_weight
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma

    def forward(self, logits: Tensor, boxes: Tensor, targets: Sequence[tuple[Tensor, Tensor]], pairs: Sequence[tuple[Tensor, Tensor]],
                num_boxes: float) -> dict[str, Tensor]:
        """The terms of one decoder layer.

        Args:
            logits: [B, Q, C], with no-object as the last class where the classification is softmax.
            boxes: [B, Q, 4] as (cx, cy, w, h), fractions of the image.
            targets: labels [N] and boxes [N, 4] of each image's objects, see `SetTarget`.
            pairs: which queries and which objects of each image belong together, see `HungarianMatcher`.
            num_boxes: objects in a batch, the mean over all processes and at least 1, see `mean_over_ranks`.

        Returns:
            `loss_class`, `loss_box` and `loss_giou`, scalars times their weights. Without any object the latter two are 0, and their
            gradients too.
        """
        image = torch.cat([torch.full_like(queries, index) for index, (queries, _) in enumerate(pairs)])             # [K]
        query = torch.cat([queries for queries, _ in pairs])
        labels, wanted = (torch.cat([field[objects] for field, (_, objects) in zip(fields, pairs, strict=True)])
                          for fields in zip(*targets, strict=True))                                                  # [K], [K, 4]
        found = boxes[image, query]
        giou = elementwise_generalized_box_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted))
        if self.classification == "softmax":
            loss_class = self._cross_entropy(logits, image, query, labels)
        else:
            present = torch.zeros_like(logits)
            present[image, query, labels] = 1
            loss_class = sigmoid_focal_loss(logits, present, self.focal_alpha, self.focal_gamma, "sum") / num_boxes
        return {
            "loss_class": self.class_weight * loss_class,
            "loss_box": self.box_weight * (found - wanted).abs().sum() / num_boxes,
            "loss_giou": self.giou_weight * (1 - giou).sum() / num_boxes,
        }

    def _cross_entropy(self, logits: Tensor, image: Tensor, query: Tensor, labels: Tensor) -> Tensor:
        """Of all queries, a mean by weight: the sum is divided by the sum of the weights, not by the number of queries."""
        no_object = logits.shape[-1] - 1
        classes = torch.full(logits.shape[:2], no_object, device=logits.device)
        classes[image, query] = labels
        weights = logits.new_ones(no_object + 1)
        weights[no_object] = self.no_object_weight
        return F.cross_entropy(logits.flatten(0, 1), classes.flatten(), weights)
