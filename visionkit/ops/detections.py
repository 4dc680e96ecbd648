"""From the scores and boxes of many candidates to the few that are an image's detections."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from visionkit.ops.boxes import box_iou
from visionkit.ops.nms import batched_nms
from visionkit.ops.soft_nms import batched_soft_nms
from visionkit.registry import OPS

Thinning = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

# N candidates, K <= N that stay; C classes without background, R regions of an image


def detections_from_scores(scores: Tensor, boxes: Tensor, score_threshold: float, nms: Thinning,
                           max_per_image: int) -> tuple[Tensor, Tensor, Tensor]:
    """The detections of one image: every class of every region is a candidate.

    Args:
        scores: [R, C], of each class that it is in the region.
        boxes: [R, C, 4], where each would then be, or [R, 1, 4], the same for all classes.
        score_threshold: candidates whose score is not above it are dropped.
        nms: `NMS`, `SoftNMS` or `BoxVoting`; thins out the rest.
        max_per_image: what is kept in the end, best first.

    Returns:
        boxes [K, 4], scores [K] descending and labels [K].
    """
    region, label = (scores > score_threshold).nonzero(as_tuple=True)
    slot = label if boxes.shape[1] > 1 else torch.zeros_like(label)
    thinned = nms(boxes[region, slot], scores[region, label], label)
    return tuple(values[:max_per_image] for values in thinned)


@OPS.register_module("nms")
class NMS:
    """Candidates that a better one overlaps too much are dropped.

    Args:
        iou: how much is too much.
        class_agnostic: a candidate of one class also drops those of others.
    """

    def __init__(self, iou: float = 0.5, class_agnostic: bool = False) -> None:
        _check_iou("iou", iou)
        self.iou = iou
        self.class_agnostic = class_agnostic

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [N, 4], scores [N] and labels [N] to those of the K that stay, by descending score."""
        keep = batched_nms(boxes, scores, _groups(labels, self.class_agnostic), self.iou)
        return boxes[keep], scores[keep], labels[keep]


@OPS.register_module("soft_nms")
class SoftNMS:
    """Candidates that a better one overlaps lose score instead (Bodla et al. 2017, arXiv:1704.04503).

    Args:
        sigma: of the Gaussian rule, scores times exp(-IoU^2 / sigma); 0.5 by default.
        iou: take the linear rule instead, scores times 1 - IoU from this IoU on.
        min_score: candidates that fall below are dropped.
        class_agnostic: a candidate of one class also lowers those of others.
    """

    def __init__(self, sigma: float | None = None, iou: float | None = None, min_score: float = 0.001,
                 class_agnostic: bool = False) -> None:
        if sigma is not None and iou is not None:
            raise ValueError(f"sigma is for the Gaussian rule and iou for the linear one; give one of them, got {sigma=}, {iou=}")
        if sigma is not None and sigma <= 0:
            raise ValueError(f"sigma must be positive, got {sigma}")
        if iou is not None:
            _check_iou("iou", iou)
        self.rule = {"method": "gaussian", "sigma": sigma or 0.5} if iou is None else {"method": "linear", "iou_threshold": iou}
        self.min_score = min_score
        self.class_agnostic = class_agnostic

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [N, 4], scores [N] and labels [N] to those of the K that stay, by descending new score."""
        keep, scores = batched_soft_nms(boxes, scores, _groups(labels, self.class_agnostic), score_threshold=self.min_score, **self.rule)
        return boxes[keep], scores, labels[keep]


@OPS.register_module("box_voting")
class BoxVoting:
    """NMS, and then each box that stays is the mean of all candidates around it, by their scores (Gidaris & Komodakis 2015,
    arXiv:1505.01749, sec. 4).

    Args:
        iou: of the NMS.
        vote_iou: candidates of the class that overlap a box by at least this much vote on where it is.
        class_agnostic: a candidate of one class also drops those of others, and votes for them.
    """

    def __init__(self, iou: float = 0.5, vote_iou: float = 0.5, class_agnostic: bool = False) -> None:
        _check_iou("iou", iou)
        _check_iou("vote_iou", vote_iou)
        self.iou = iou
        self.vote_iou = vote_iou
        self.class_agnostic = class_agnostic

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [N, 4], scores [N] and labels [N] to those of the K that stay, by descending score."""
        groups = _groups(labels, self.class_agnostic)
        keep = batched_nms(boxes, scores, groups, self.iou)
        return torch.cat([self._vote(some, boxes, scores, groups) for some in keep.split(256)]), scores[keep], labels[keep]

    def _vote(self, keep: Tensor, boxes: Tensor, scores: Tensor, groups: Tensor) -> Tensor:
        """Where the candidates put each of the boxes `keep`; a box without extent, which overlaps nothing, stays where it is."""
        voters = (box_iou(boxes[keep], boxes) >= self.vote_iou) & (groups[keep, None] == groups)              # [K, N]
        votes = voters * scores
        total = votes.sum(1, keepdim=True)
        return torch.where(total > 0, votes @ boxes / total.where(total > 0, 1), boxes[keep])


def _groups(labels: Tensor, class_agnostic: bool) -> Tensor:
    return torch.zeros_like(labels) if class_agnostic else labels


def _check_iou(name: str, iou: float) -> None:
    if not 0 <= iou <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {iou}")
