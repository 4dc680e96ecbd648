"""The assignment that makes detection a set prediction: one query an object, at the least total cost."""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from visionkit.models.targets.set_target import SetTarget
from visionkit.registry import TARGETS

# B images, Q queries, C classes, N objects of all images

_ALPHA, _GAMMA = 0.25, 2        # of the focal cost
_EMPTY = 1e-20                  # an area that is safe to divide by
_PIECE = 1 << 16                # costs at a time on a CPU, which fit in its cache


@TARGETS.register_module()
class HungarianMatcher(nn.Module):
    """Give each object a query of its own so that the sum of the costs is least (DETR, arXiv:2005.12872, sec. 3.1 and eq. 1).

    An object is only ever compared with the queries of its own image.

    Args:
        class_cost: weight of the class cost: with softmax, the object's class has the *probability* p and costs -p (no logarithm, which
            would drown the other terms); with sigmoid, what the focal loss would be lower by, were the query to predict the class
            (Deformable DETR, arXiv:2010.04159).
        box_cost: weight of the L1 distance of (cx, cy, w, h).
        giou_cost: weight of the negative generalized IoU.
        classification: `softmax`, whose last logit is no-object, or `sigmoid`, where each class has a logit of its own.
    """

    def __init__(self, class_cost: float = 1.0, box_cost: float = 5.0, giou_cost: float = 2.0, classification: str = "softmax") -> None:
        super().__init__()
        if min(class_cost, box_cost, giou_cost) < 0 or max(class_cost, box_cost, giou_cost) == 0:
            raise ValueError(f"matching costs must not be negative, and one of them positive; got {class_cost=}, {box_cost=}, {giou_cost=}")
        if classification not in ("softmax", "sigmoid"):
            raise ValueError(f"classification must be 'softmax' or 'sigmoid', got {classification!r}")
        self.class_cost = class_cost
        self.box_cost = box_cost
        self.giou_cost = giou_cost
        self.classification = classification

    def forward(self, logits: Tensor, boxes: Tensor, targets: Sequence[SetTarget]) -> list[tuple[Tensor, Tensor]]:
        """Match the queries of each image with its objects.

        Args:
            logits: [B, Q, C], with no-object as the last class where the classification is softmax.
            boxes: [B, Q, 4] as (cx, cy, w, h), fractions of the image.
            targets: one an image.

        Returns:
            the matched queries of each image, ascending, and the object of each; of more objects than queries some stay without.

        Raises:
            ValueError: the costs of an image are NaN or infinite, or an object is of a class that there is no logit for.
        """
        counts = [len(target.labels) for target in targets]
        if not any(counts):
            none = torch.zeros(0, dtype=torch.int64, device=logits.device)
            return [(none, none)] * len(targets)
        image = np.repeat(np.arange(len(targets)), counts)                                              # [N] whose object it is
        costs = self._costs(logits.float(), boxes.float(), torch.from_numpy(image).to(logits.device), targets).cpu().numpy()
        finite = np.isfinite(costs).all(1)
        if not finite.all():
            raise ValueError(_no_match(int(image[finite.argmin()]), logits, boxes, targets, self._num_classes(logits)))
        pairs, first = [], 0
        for count in counts:
            objects, queries = linear_sum_assignment(costs[first:first + count])
            order = queries.argsort()
            pairs.append(np.stack([queries[order], objects[order]]))
            first += count
        matched = torch.from_numpy(np.concatenate(pairs, 1)).to(logits.device)                          # one copy for all images
        return [tuple(pair) for pair in matched.split([pair.shape[1] for pair in pairs], 1)]

    @torch.inference_mode()
    def _costs(self, logits: Tensor, boxes: Tensor, image: Tensor, targets: Sequence[SetTarget]) -> Tensor:
        """[N, Q]: eq. 1 of each object and each query of its image; NaN where the object's class is none of the logits'."""
        given = torch.cat([target.labels for target in targets])
        labels = given.clamp(0, self._num_classes(logits) - 1)
        objects = torch.cat([target.boxes for target in targets]).float()
        objects = objects.masked_fill((labels != given)[:, None], math.nan).t()[..., None]              # [4, N, 1]
        boxes = boxes.permute(2, 0, 1).contiguous()                                                     # [4, B, Q]: read in one sweep each
        scores = (logits.softmax(-1) if self.classification == "softmax" else logits).transpose(1, 2)   # [B, C, Q]
        costs = []
        step = max(1, _PIECE // logits.shape[1]) if logits.is_cpu else len(image)
        for start in range(0, len(image), step):
            rows = slice(start, start + step)
            query, object, score = boxes[:, image[rows]], objects[:, rows], scores[image[rows], labels[rows]]
            distance = (query - object).abs_()                                                          # [4, n, Q]
            giou = _generalized_iou(query[2:], object[2:], distance[:2])
            class_cost = -score if self.classification == "softmax" else _focal_cost(score)
            costs.append(class_cost.mul_(self.class_cost).add_(distance.sum(0), alpha=self.box_cost).sub_(giou, alpha=self.giou_cost))
        return torch.cat(costs)

    def _num_classes(self, logits: Tensor) -> int:
        return logits.shape[2] - 1 if self.classification == "softmax" else logits.shape[2]


def _generalized_iou(size: Tensor, other: Tensor, distance: Tensor) -> Tensor:
    """[n, Q], of boxes with sides `size` [2, n, Q] and `other` [2, n, 1], whose centres lie `distance` [2, n, Q] apart along x and y.

    Along each axis the overlap is (w + w') / 2 - distance, or the shorter side if that lies within the longer one; what the two sides
    have beyond the overlap, with the overlap once, is their hull.
    """
    both = size + other
    overlap = (both / 2).sub_(distance).minimum(torch.minimum(size, other))                             # negative where they are apart
    hull = both.sub_(overlap)
    width, height = overlap.clamp_(min=0)
    intersection = width.mul_(height)
    union = (size[0] * size[1]).add_(other[0] * other[1]).sub_(intersection).clamp_(min=_EMPTY)
    return intersection.div_(union).add_(union.div_(hull[0].mul_(hull[1]).clamp_(min=_EMPTY))).sub_(1)


def _focal_cost(logits: Tensor) -> Tensor:
    """The focal loss of a class that is present, less the one of a class that is not."""
    p = logits.sigmoid()
    return _ALPHA * (1 - p) ** _GAMMA * F.softplus(-logits) - (1 - _ALPHA) * p ** _GAMMA * F.softplus(logits)


def _no_match(index: int, logits: Tensor, boxes: Tensor, targets: Sequence[SetTarget], num_classes: int) -> str:
    unknown = sorted({label for label in targets[index].labels.tolist() if not 0 <= label < num_classes})
    if unknown:
        return (f"image {index} of the batch has objects of class {', '.join(map(str, unknown))}, and the model knows the classes 0 to "
                f"{num_classes - 1}; make its num_classes that of the data set")
    parts = {"its class logits": logits[index], "its predicted boxes": boxes[index], "the boxes of its objects": targets[index].boxes}
    culprits = [name for name, value in parts.items() if not value.isfinite().all()]
    return (f"image {index} of the batch cannot be matched, its costs are NaN or infinite: so are {' and '.join(culprits)}. If training "
            f"diverged, lower the learning rate or clip the gradients; if the objects are at fault, correct their annotations")
