"""Greedy non-maximum suppression, without a compiled kernel.

Two ways, both exact. *Blocks*: the best boxes are settled among themselves and then taken away from all the rest; fast while each block
thins out the rest. *Sweep*: two boxes can only overlap by more than t if their left edges lie within (1 - t) of a width of each other, so
boxes are swept from left to right and only the few pairs that pass are measured; fast where most boxes stay. Either way the pairs that
overlap are edges of a graph in which a better box suppresses a worse one, and the greedy answer is the fixed point of "a box stays unless
a box that stays suppresses it", reached in as many rounds as the longest chain of suppressions.
"""
from __future__ import annotations

import torch
from torch import Tensor

_MAX_PAIRS = 1 << 23        # more candidate pairs than this (64 MB an index) and the blockwise way takes less memory
_BLOCK = 256


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes that no better box overlaps by more than `iou_threshold`.

    Args:
        boxes: [N, 4] as (x1, y1, x2, y2), pixels.
        scores: [N]; ties are broken by the lower index.
        iou_threshold: in [0, 1].

    Returns:
        [K] int64, by descending score.

    Raises:
        ValueError: wrong shapes or threshold, different devices, or a score that is not a number.
    """
    _check(boxes, scores, iou_threshold)
    return torch.ops.visionkit.nms(boxes, scores, None, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """`nms` within each group: boxes of different groups do not suppress each other.

    Args:
        boxes: [N, 4] as (x1, y1, x2, y2), pixels.
        scores: [N]; ties are broken by the lower index.
        idxs: [N] integers, the group of each box: its class, its pyramid level, its image.
        iou_threshold: in [0, 1].

    Returns:
        [K] int64, by descending score over all groups.

    Raises:
        ValueError: wrong shapes or threshold, different devices, or a score that is not a number.
    """
    _check(boxes, scores, iou_threshold)
    if idxs.shape != scores.shape or idxs.is_floating_point():
        raise ValueError(f"idxs must be integers, one a box: {list(scores.shape)}, got {list(idxs.shape)} of {idxs.dtype}")
    return torch.ops.visionkit.nms(boxes, scores, idxs, iou_threshold)


def _check(boxes: Tensor, scores: Tensor, iou_threshold: float) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be [N, 4], got {list(boxes.shape)}")
    if scores.shape != boxes.shape[:1]:
        raise ValueError(f"nms needs one score a box, got scores {list(scores.shape)} for boxes {list(boxes.shape)}")
    if scores.device != boxes.device:
        raise ValueError(f"boxes are on {boxes.device}, scores on {scores.device}; move one")
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must lie in [0, 1], got {iou_threshold}")


@torch.library.custom_op("visionkit::nms", mutates_args=())
def _nms(boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float) -> Tensor:
    if boxes.shape[0] == 0:
        return boxes.new_zeros(0, dtype=torch.int64)
    if scores.isnan().any():
        raise ValueError(f"nms got {int(scores.isnan().sum())} scores that are not numbers (NaN) among {len(scores)}; the model diverged")
    by_score = scores.argsort(descending=True, stable=True)
    boxes = boxes[by_score] if boxes.dtype in (torch.float32, torch.float64) else boxes[by_score].float()
    groups = None if groups is None else groups[by_score]
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    alive = torch.arange(len(boxes), device=boxes.device)
    thinning = groups is None                                                  # blocks compare across groups in vain
    while len(alive):
        edges = None
        if not thinning:
            edges = _suppressions_by_sweep(boxes[alive], None if groups is None else groups[alive], iou_threshold)
        if edges is not None:
            keep[alive[_keep_by_graph(*edges, len(alive))]] = True
            break
        block, rest = alive[:_BLOCK], alive[_BLOCK:]
        better, worse = _overlaps(boxes, groups, block, block, iou_threshold).triu_(1).nonzero(as_tuple=True)
        block = block[_keep_by_graph(better, worse, len(block))]
        keep[block] = True
        alive = rest[~_overlaps(boxes, groups, block, rest, iou_threshold).any(0)]
        thinning = len(alive) < len(rest) * (1 - len(block) / _BLOCK / 4)      # did the block take more away than it cost to compare?
    return by_score[keep]


@_nms.register_fake
def _(boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _suppressions_by_sweep(boxes: Tensor, groups: Tensor | None, iou_threshold: float) -> tuple[Tensor, Tensor] | None:
    """Pairs (better, worse) of ranks whose boxes overlap too much; None if there are too many candidates to list.

    Args:
        boxes: [N, 4] by descending score.
        groups: [N] or None.
        iou_threshold: in [0, 1].
    """
    left = boxes[:, 0].double() - boxes[:, 0].min()
    span = left.max() + (boxes[:, 2] - boxes[:, 0]).max().clamp(min=0) + 1      # no window reaches from one group into the next
    if not torch.isfinite(span):
        return None
    if groups is not None:
        left = left + torch.unique(groups, return_inverse=True)[1] * span
    left, by_left = left.sort()
    swept = boxes[by_left]
    width = (swept[:, 2] - swept[:, 0]).clamp(min=0)
    reach = (1 - iou_threshold) * width.double() * 1.001 + 1e-3                 # slack: the exact test below decides
    last = torch.searchsorted(left, left + reach, right=True)
    first = torch.arange(1, len(boxes) + 1, device=boxes.device)
    counts = last - first
    total = int(counts.sum())
    if total > _MAX_PAIRS:
        return None
    a = torch.repeat_interleave(counts, output_size=total)                     # position of the left box of each pair
    # index_select: four times as fast on a CPU as the same read written with brackets
    b = torch.arange(total, device=boxes.device).add_((first - (counts.cumsum(0) - counts)).index_select(0, a))
    top, height = swept[:, 1].contiguous(), (swept[:, 3] - swept[:, 1]).clamp(min=0)
    distance = (top.index_select(0, a) - top.index_select(0, b)).abs_()
    reach = torch.maximum(height.index_select(0, a), height.index_select(0, b)).mul_((1 - iou_threshold) * 1.001).add_(1e-3)
    near = (distance <= reach).nonzero()[:, 0]
    a, b = a.index_select(0, near), b.index_select(0, near)
    overlaps = (_paired_iou(swept.index_select(0, a), swept.index_select(0, b)) > iou_threshold).nonzero()[:, 0]
    a, b = by_left[a.index_select(0, overlaps)], by_left[b.index_select(0, overlaps)]      # back to ranks: lower is better
    return torch.minimum(a, b), torch.maximum(a, b)


def _paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """[P] IoU of box p with other p; NaN where both are empty, which no threshold is below."""
    size = (torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])).clamp_(min=0)
    intersection = size[:, 0] * size[:, 1]
    areas = [(b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (boxes, others)]
    return intersection / (areas[0] + areas[1] - intersection)


def _keep_by_graph(better: Tensor, worse: Tensor, count: int) -> Tensor:
    """[N] bool, the fixed point: a box stays unless a box that stays suppresses it. The best undecided box settles each round."""
    keep = torch.ones(count, dtype=torch.bool, device=better.device)
    while True:
        suppressed = torch.zeros_like(keep)
        suppressed[worse[keep[better]]] = True
        if torch.equal(suppressed, ~keep):
            return keep
        keep = ~suppressed


def _overlaps(boxes: Tensor, groups: Tensor | None, rows: Tensor, columns: Tensor, iou_threshold: float) -> Tensor:
    """[R, C] bool: the IoU of the boxes `rows` and `columns` is above the threshold, in the same group."""
    x1, y1, x2, y2 = boxes[rows].t().contiguous()[:, :, None]
    u1, v1, u2, v2 = boxes[columns].t().contiguous()
    intersection = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp_(min=0)
    intersection.mul_((torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp_(min=0))
    union = ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1)).sub_(intersection)
    overlaps = intersection.div_(union) > iou_threshold
    return overlaps if groups is None else overlaps & (groups[rows][:, None] == groups[columns])
