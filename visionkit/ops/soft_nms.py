"""Soft non-maximum suppression (Bodla et al. 2017, arXiv:1704.04503, fig. 2): boxes that overlap a better one lose score instead of life.

The best box is taken, all others are rescored by their overlap with it, and so on. A block of the best is settled among itself for as long
as none outside, where scores can only fall, may be better than the best within; what was taken then rescores the rest at once.
"""
from __future__ import annotations

import torch
from torch import Tensor

from visionkit.ops.boxes import box_iou

_BLOCK = 256
_METHODS = ("gaussian", "linear")


def soft_nms(boxes: Tensor, scores: Tensor, sigma: float = 0.5, score_threshold: float = 0.001, method: str = "gaussian",
             iou_threshold: float = 0.3) -> tuple[Tensor, Tensor]:
    """Indices and rescored scores of the boxes whose score does not fall below a threshold.

    Args:
        boxes: [N, 4] as (x1, y1, x2, y2), pixels.
        scores: [N], not negative; ties are broken by the lower index.
        sigma: width of the Gaussian.
        score_threshold: boxes whose score falls below it are dropped.
        method: 'gaussian', the score is multiplied by exp(-IoU^2 / sigma); or 'linear', by 1 - IoU where IoU reaches `iou_threshold`.
        iou_threshold: in [0, 1], for 'linear'.

    Returns:
        [K] int64 indices and [K] scores, by descending score. No gradient flows.

    Raises:
        ValueError: wrong shapes, method or parameters, different devices, or a score that is negative or not a number.
    """
    return _call(boxes, scores, None, sigma, score_threshold, method, iou_threshold)


def batched_soft_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, sigma: float = 0.5, score_threshold: float = 0.001,
                     method: str = "gaussian", iou_threshold: float = 0.3) -> tuple[Tensor, Tensor]:
    """`soft_nms` within each group: boxes of different groups do not rescore each other.

    Args:
        idxs: [N] integers, the group of each box, such as its class.
        others: as in `soft_nms`.
    """
    if idxs.shape != scores.shape or idxs.is_floating_point():
        raise ValueError(f"idxs must be integers, one a box: {list(scores.shape)}, got {list(idxs.shape)} of {idxs.dtype}")
    return _call(boxes, scores, idxs, sigma, score_threshold, method, iou_threshold)


def _call(boxes: Tensor, scores: Tensor, groups: Tensor | None, sigma: float, score_threshold: float, method: str,
          iou_threshold: float) -> tuple[Tensor, Tensor]:
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be [N, 4], got {list(boxes.shape)}")
    if scores.shape != boxes.shape[:1] or not scores.is_floating_point():
        raise ValueError(f"soft_nms needs one floating score a box, got scores {list(scores.shape)} of {scores.dtype} for boxes "
                         f"{list(boxes.shape)}")
    for name, value in (("scores", scores), ("idxs", groups)):
        if value is not None and value.device != boxes.device:
            raise ValueError(f"boxes are on {boxes.device}, {name} on {value.device}; move one")
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}; got {method!r}")
    if sigma <= 0 or score_threshold < 0 or not 0 <= iou_threshold <= 1:
        raise ValueError(f"sigma must be positive, score_threshold not negative and iou_threshold in [0, 1]; got {sigma}, "
                         f"{score_threshold} and {iou_threshold}")
    return torch.ops.visionkit.soft_nms(boxes.detach(), scores.detach(), groups, sigma, score_threshold, method, iou_threshold)


@torch.library.custom_op("visionkit::soft_nms", mutates_args=())
def _soft_nms(boxes: Tensor, scores: Tensor, groups: Tensor | None, sigma: float, score_threshold: float, method: str,
              iou_threshold: float) -> tuple[Tensor, Tensor]:
    device, dtype = scores.device, scores.dtype
    working = torch.promote_types(torch.promote_types(boxes.dtype, dtype), torch.float32)
    # one box after the other: work for a CPU, wherever the boxes are
    boxes, scores = boxes.to("cpu", working), scores.to("cpu", working, copy=True)
    groups = None if groups is None else groups.cpu()
    if not (scores >= 0).all():
        raise ValueError(f"soft_nms needs scores that are not negative; of {len(scores)}, {int((scores < 0).sum())} are negative and "
                         f"{int(scores.isnan().sum())} are not a number (NaN)")

    def factors(better: Tensor, others: Tensor) -> Tensor:
        """[better, others], what each other box's score is multiplied by."""
        iou = box_iou(boxes[better], boxes[others])
        factor = (iou.square() / -sigma).exp() if method == "gaussian" else torch.where(iou >= iou_threshold, 1 - iou, 1.0)
        return factor if groups is None else torch.where(groups[better][:, None] == groups[others], factor, 1.0)

    kept, kept_scores = [], []
    left = (scores >= score_threshold).nonzero()[:, 0]
    while len(left):
        by_score = left[scores[left].argsort(descending=True, stable=True)]
        block, rest = by_score[:_BLOCK].sort()[0], by_score[_BLOCK:]         # in the order of indices: argmax takes the first of equals
        ceiling = scores[rest[0]].item() if len(rest) else -1.0
        values, among = scores[block].numpy(), factors(block, block).numpy()
        taken = []
        while (best := values.max()) >= score_threshold and best >= 0 and (best > ceiling or not taken):
            index = values.argmax()
            taken.append(int(index))
            kept_scores.append(float(best))
            values *= among[index]
            values[taken] = -1
        scores[block] = torch.from_numpy(values)
        taken = block[taken]
        kept.append(taken)
        rescored = scores[rest]
        for factor in factors(taken, rest):
            rescored *= factor
        scores[rest] = rescored
        left = torch.cat([block, rest]).sort()[0]
        left = left[scores[left] >= score_threshold]
    kept = torch.cat(kept) if kept else left
    return kept.to(device), torch.tensor(kept_scores, dtype=working).to(device, dtype)


@_soft_nms.register_fake
def _(boxes, scores, groups, sigma, score_threshold, method, iou_threshold):
    kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty(kept, dtype=torch.int64), scores.new_empty(kept)
