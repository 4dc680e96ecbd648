"""Greedy non-maximum suppression, without a compiled kernel.

Two ways, both exact; a crowd is thinned out by the first until the second is cheaper. *Blocks*: the best boxes left are settled among
themselves, and what they overlap is taken away from the rest: dense arithmetic, fast while each box takes many others away. *Sweep*:
boxes that overlap by more than t start within (1 - t) of a side of each other. Sorted by strips of the image, and from left to right in
a strip, all that a box can overlap stands in a few short runs, and only those pairs are measured; fast where most boxes stay. Pairs
that overlap are edges of a graph in which a better box suppresses a worse one unless it is suppressed itself.

Memory: O(N) and about 25 MB, however crowded the boxes are.
"""
from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_FIRST_BLOCK, _BLOCK = 64, 256        # boxes settled at a time: few at first, which is enough where many boxes surround few objects
_PAIRS = 1 << 19            # pairs measured at a time: what the arithmetic on them reads and writes stays in the cache
_FEW_EDGES = 1024           # from here on a loop in Python is no slower than rounds of tensor operations

# N boxes, best first; T = [5, N] table of them: x1, y1, x2, y2, area


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes that no better box overlaps by more than `iou_threshold`.

    Empty boxes, and those whose corners or areas are not finite, overlap nothing. No gradient flows.

    Args:
        boxes: [N, 4] as (x1, y1, x2, y2), pixels; bfloat16 and float16 are measured in float32.
        scores: [N]; ties are broken by the lower index.
        iou_threshold: in [0, 1].

    Returns:
        [K] int64, by descending score.

    Raises:
        ValueError: wrong shapes, types or threshold, different devices, or a score that is not a number.
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
        ValueError: wrong shapes, types or threshold, different devices, or a score that is not a number.
    """
    _check(boxes, scores, iou_threshold)
    if idxs.shape != scores.shape or idxs.is_floating_point():
        raise ValueError(f"idxs must be integers, one a box: {list(scores.shape)}, got {list(idxs.shape)} of {idxs.dtype}")
    if idxs.device != boxes.device:
        raise ValueError(f"boxes are on {boxes.device}, idxs on {idxs.device}; move one")
    return torch.ops.visionkit.nms(boxes, scores, idxs, iou_threshold)


def _check(boxes: Tensor, scores: Tensor, iou_threshold: float) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be [N, 4], got {list(boxes.shape)}")
    if not boxes.is_floating_point():
        raise ValueError(f"boxes must be floating-point numbers, got {boxes.dtype}; convert them with .float()")
    if scores.shape != boxes.shape[:1]:
        raise ValueError(f"nms needs one score a box, got scores {list(scores.shape)} for boxes {list(boxes.shape)}")
    if scores.device != boxes.device:
        raise ValueError(f"boxes are on {boxes.device}, scores on {scores.device}; move one")
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must lie in [0, 1], got {iou_threshold}")


@torch.library.custom_op("visionkit::nms", mutates_args=())
def _nms(boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float) -> Tensor:
    if scores.isnan().any():
        raise ValueError(f"nms got {int(scores.isnan().sum())} scores that are not numbers (NaN) among {len(scores)}; the model diverged")
    by_score = scores.argsort(descending=True, stable=True)
    x1, y1, x2, y2 = boxes.index_select(0, by_score).to(torch.promote_types(boxes.dtype, torch.float32)).t()
    width, height = x2 - x1, y2 - y1
    area = width * height
    table = torch.stack([x1, y1, x2, y2, area])
    solid = ((torch.minimum(width, height) > 0) & (area < math.inf)).nonzero()[:, 0]
    table = table.index_select(1, solid)
    threshold = _rounded_down(iou_threshold, table.dtype)
    keep = torch.ones_like(by_score, dtype=torch.bool)
    if groups is None:
        keep[solid] = _survivors(table, threshold)
    else:
        keep[solid] = _survivors_by_group(table, groups.index_select(0, by_score.index_select(0, solid)), threshold)
    return by_score[keep]


@_nms.register_fake
def _(boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _rounded_down(threshold: float, dtype: torch.dtype) -> float:
    """The largest number of `dtype` up to `threshold`: the same IoUs exceed it. A comparison alone would round to the nearest."""
    rounded = torch.tensor(threshold, dtype=dtype)
    return (rounded if rounded.item() <= threshold else rounded.nextafter(torch.zeros_like(rounded))).item()


def _survivors(table: Tensor, threshold: float) -> Tensor:
    """[N] bool: which boxes of `table`, all of one group, stay."""
    keep = torch.zeros(table.shape[1], dtype=torch.bool, device=table.device)
    alive = torch.arange(table.shape[1], device=table.device)
    size, stays, crowded, sweep_below = _FIRST_BLOCK, 1.0, True, math.inf
    while count := len(alive):
        if not crowded and 2 * _BLOCK < count < sweep_below:
            suppressions = _suppressions(table, None, threshold, max_pairs=count * max(100, stays * count / 32), max_edges=8 * count)
            if suppressions is not None:
                keep[alive] = _settle_graph(*suppressions, count)
                break
            sweep_below = count // 2                                        # counting takes time too: again when half are gone
        kept = _settle_block(table[:, :size], threshold)
        keep[alive.index_select(0, kept)] = True
        left = _not_overlapped(table[:, size:], table.index_select(1, kept), threshold) + size
        taken = max(count - size, 0) - len(left)
        crowded = taken > len(kept) * math.sqrt(count) / 20                 # a block costs kept * count; a sweep about count * taken / kept
        stays = len(kept) / size
        alive, table = alive.index_select(0, left), table.index_select(1, left)
        size = min(2 * size, _BLOCK)
    return keep


def _survivors_by_group(table: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """[N] bool: which boxes of `table` stay, each in its group of `groups` [N]."""
    keep = torch.zeros_like(groups, dtype=torch.bool)
    alive = groups.argsort(stable=True)                                     # by group, and best first in each
    table, groups = table.index_select(1, alive), groups.index_select(0, alive)
    crowded = True
    while crowded and len(alive):                                           # a block is the best box of each group
        groups = F.pad((groups[1:] != groups[:-1]).cumsum(0), (1, 0))       # numbered from 0
        sizes = groups.bincount()
        firsts = sizes.cumsum(0) - sizes
        keep.index_fill_(0, alive.index_select(0, firsts), True)
        best = firsts.index_select(0, groups)                               # position of the best box of each box's group
        settled = _paired_iou(table, table.index_select(1, best)) > threshold
        taken = int(settled.index_fill_(0, firsts, False).sum())
        left = (~settled.index_fill_(0, firsts, True)).nonzero()[:, 0]
        crowded = 32 * taken > len(alive)
        alive, table, groups = alive.index_select(0, left), table.index_select(1, left), groups.index_select(0, left)
    count = len(alive)
    suppressions = _suppressions(table, groups, threshold, max_pairs=100 * count, max_edges=8 * count) if count else None
    if suppressions is not None:
        keep[alive] = _settle_graph(*suppressions, count)
        return keep
    sizes = groups.bincount()                           # still crowded: large groups one by one, the pairs of small ones cannot be many
    for members, boxes in zip(alive.split(sizes.tolist()), table.split(sizes.tolist(), 1), strict=True):
        if len(members) > _BLOCK // 2:
            keep[members] = _survivors(boxes, threshold)
    members = (sizes <= _BLOCK // 2).index_select(0, groups).nonzero()[:, 0]
    if len(members):
        suppressions = _suppressions(table.index_select(1, members), groups.index_select(0, members), threshold, math.inf, math.inf)
        keep[alive.index_select(0, members)] = _settle_graph(*suppressions, len(members))
    return keep


def _settle_block(table: Tensor, threshold: float) -> Tensor:
    """[K] ranks of the boxes of a small `table` that stay, one box after the other."""
    count = table.shape[1]
    overlaps = _iou(table, table, table.new_empty(3, count, count)).cpu().numpy() > threshold
    suppressed, kept = np.zeros(count, dtype=bool), []
    for rank, row in enumerate(overlaps):
        if not suppressed[rank]:
            kept.append(rank)
            suppressed |= row
    return torch.tensor(kept, device=table.device)


def _not_overlapped(table: Tensor, kept: Tensor, threshold: float) -> Tensor:
    """[L] ranks of the boxes of `table` that no box of the table `kept` suppresses."""
    rows, count = kept.shape[1], table.shape[1]
    best = table.new_empty(count)
    step = _PAIRS // rows
    work = table.new_empty(3, rows * min(step, count))
    for start in range(0, count, step):
        columns = table[:, start:start + step]
        iou = _iou(kept, columns, work[:, :rows * columns.shape[1]].view(3, rows, -1))
        torch.amax(iou, 0, out=best[start:start + step])                    # comparing the largest: a matrix of bools is slow to make
    return (best <= threshold).nonzero()[:, 0]


def _iou(table: Tensor, others: Tensor, work: Tensor) -> Tensor:
    """[R, C] IoU of each box of `table` with each of `others`, in `work` [3, R, C]: with fresh memory it takes twice as long.

    Negative where boxes lie apart vertically: their height, which needs no clamping for that, is below 0.
    """
    x1, y1, x2, y2, area = table[:, :, None]
    u1, v1, u2, v2, others_area = others
    intersection, size, least = work
    torch.minimum(x2, u2, out=intersection).sub_(torch.maximum(x1, u1, out=least)).relu_()
    torch.minimum(y2, v2, out=size).sub_(torch.maximum(y1, v1, out=least))
    intersection.mul_(size)
    union = torch.add(area, others_area, out=size).sub_(intersection)
    return intersection.div_(union)


def _suppressions(table: Tensor, groups: Tensor | None, threshold: float, max_pairs: float,
                  max_edges: float) -> tuple[Tensor, Tensor] | None:
    """Pairs (better, worse) of ranks whose boxes overlap too much; None if there are more, or more pairs to measure.

    Two boxes that overlap by more than t overlap by more than t of the wider one's width, so the right one starts within (1 - t) of the
    left one's width; likewise vertically. From each box a look to the right in its own strip, and to both sides in those strips below
    where a box that it can overlap may start, finds each pair once.
    """
    slack = 1 - threshold + 1e-5                                            # for rounding; the exact test below decides
    x, y, right, bottom = table[:4].double()
    width, height = right - x, bottom - y
    x, y = x - x.min(), y - y.min()
    strip_height = torch.maximum(height.mean() * slack, y.max() / len(y))
    strip = y.div(strip_height).floor_()
    last_strip = torch.add(y, height, alpha=slack).mul_(1 + 1e-12).div_(strip_height).floor_()
    strips = (last_strip - strip).int() + 1                                 # that each box looks at
    if groups is not None:
        strip += groups * (last_strip.max() + 1)
    length = x.max() + 2 * width.max() + strip_height                       # no look reaches from one strip into the next
    place, by_place = torch.add(x, strip * length).sort()                   # along all strips, laid end to end
    table, width, strips = table.index_select(1, by_place), width.index_select(0, by_place), strips.index_select(0, by_place)

    looker = torch.repeat_interleave(strips)                                # [Q] for each look the position of the box that looks
    down = torch.arange(len(looker), device=looker.device, dtype=torch.int32) - (strips.cumsum(0) - strips).index_select(0, looker)
    here = place.index_select(0, looker) + down * length
    rounding = place[-1] * 1e-15
    ahead = width * slack + rounding
    behind = torch.minimum(width / max(threshold, 1e-6), width.max()) * slack + rounding       # the other box is at most 1 / t as wide
    first = torch.searchsorted(place, here - behind.index_select(0, looker), out_int32=True)
    first = torch.where(down == 0, looker + 1, first)
    end = torch.searchsorted(place, here + ahead.index_select(0, looker), right=True, out_int32=True)
    counts = end - first
    ends = counts.cumsum(0)
    if ends[-1] > max_pairs:
        return None
    parts = (ends - 1).clamp_(min=0).div_(_PAIRS, rounding_mode="floor").bincount().tolist()
    pairs, edges = [], 0
    for part in zip(looker.split(parts), first.split(parts), counts.split(parts), strict=True):
        pairs.append(_overlapping(table, *part, threshold))
        edges += pairs[-1].shape[1]
        if edges > max_edges:
            return None
    one, other = by_place.index_select(0, torch.cat(pairs, 1).flatten()).view(2, -1)
    return torch.minimum(one, other), torch.maximum(one, other)


def _overlapping(table: Tensor, looker: Tensor, first: Tensor, counts: Tensor, threshold: float) -> Tensor:
    """[2, P] pairs that overlap by more than `threshold`: each `looker` [Q] with some of `counts` [Q] boxes from `first` [Q] on."""
    look = torch.repeat_interleave(counts)
    offset = first - (counts.cumsum(0, dtype=torch.int32) - counts)
    other = torch.arange(len(look), device=look.device, dtype=torch.int32).add_(offset.index_select(0, look))
    top, bottom = (side.index_select(0, looker).index_select(0, look) for side in (table[1], table[3]))
    other_top, other_bottom = table[1].index_select(0, other), table[3].index_select(0, other)
    hull = torch.maximum(bottom, other_bottom).sub_(torch.minimum(top, other_top))
    shared = torch.minimum(bottom, other_bottom, out=bottom).sub_(torch.maximum(top, other_top, out=top))
    near = (shared >= hull.mul_(threshold * (1 - 1e-5))).nonzero()[:, 0]    # vertically they overlap enough: few do
    one, other = looker.index_select(0, look.index_select(0, near)), other.index_select(0, near)
    overlap = (_paired_iou(table.index_select(1, one), table.index_select(1, other)) > threshold).nonzero()[:, 0]
    return torch.stack([one.index_select(0, overlap), other.index_select(0, overlap)])


def _paired_iou(table: Tensor, others: Tensor) -> Tensor:
    """[P] IoU of box p of `table` with box p of `others`."""
    size = (torch.minimum(table[2:4], others[2:4]) - torch.maximum(table[:2], others[:2])).relu_()
    intersection = size[0] * size[1]
    return intersection / (table[4] + others[4] - intersection)


def _settle_graph(better: Tensor, worse: Tensor, count: int) -> Tensor:
    """[count] bool: a box stays unless a better one that stays suppresses it.

    In rounds: boxes that nothing undecided suppresses stay, and theirs go. Long chains need many rounds, each as costly as its edges; once
    a round no longer halves them, the rest is settled one by one.
    """
    keep = torch.ones(count, dtype=torch.bool, device=better.device)
    before = math.inf
    while _FEW_EDGES < len(better) <= before / 2:
        before = len(better)
        threatened = torch.zeros_like(keep).index_fill_(0, worse, True)
        certain = (~threatened.index_select(0, better)).nonzero()[:, 0]
        keep.index_fill_(0, worse.index_select(0, certain), False)
        undecided = (keep.index_select(0, better) & keep.index_select(0, worse)).nonzero()[:, 0]
        better, worse = better.index_select(0, undecided), worse.index_select(0, undecided)
    better, order = better.sort()
    gone = bytearray(count)
    for one, other in zip(better.tolist(), worse.index_select(0, order).tolist(), strict=True):
        if not gone[one]:
            gone[other] = True
    return keep & ~torch.frombuffer(gone, dtype=torch.bool).to(keep.device)
