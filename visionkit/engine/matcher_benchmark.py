"""How long Hungarian matching takes beside the form of the DETR repository: one matrix of costs for all queries and objects of a batch."""
from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from visionkit.engine.memory import keep_freed_memory
from visionkit.engine.op_benchmark import in_turns
from visionkit.models.targets import HungarianMatcher, SetTarget
from visionkit.ops import cxcywh_to_xyxy

_CLASSES = 92
# images, queries, and the least and most objects of an image
CASES = ((16, 900, 50, 50), (16, 900, 1, 50), (16, 900, 1, 1), (16, 100, 1, 50), (8, 300, 20, 20), (4, 100, 7, 7), (2, 900, 0, 3),
         (2, 100, 7, 7), (2, 100, 1, 1), (1, 900, 50, 50), (1, 300, 50, 50), (1, 100, 3, 3), (1, 100, 1, 1))


@dataclass
class Matching:
    """Ours beside the cross product; medians."""
    images: int
    queries: int
    objects: str                                             # of an image
    ours_seconds: float
    peer_seconds: float
    times_faster: float                                      # median over timings that followed each other
    same: bool                                               # the same indices


def measure_matching(cases: Sequence[tuple[int, int, int, int]] = CASES, repeats: int = 9) -> Iterator[Matching]:
    """Time both on the same random predictions, in turns."""
    keep_freed_memory()
    matcher = HungarianMatcher()
    for images, queries, least, most in cases:
        batch = _batch(images, queries, least, most)
        same = all(torch.equal(ours, theirs) for pair, other in zip(matcher(*batch), match_by_cross_product(*batch), strict=True)
                   for ours, theirs in zip(pair, other, strict=True))
        turns = in_turns([functools.partial(matcher, *batch), functools.partial(match_by_cross_product, *batch)], repeats)
        ours, theirs = map(statistics.median, zip(*turns, strict=True))
        yield Matching(images, queries, f"{least}" if least == most else f"{least} to {most}", ours, theirs,
                       statistics.median(peer / mine for mine, peer in turns), same)


@torch.no_grad()
def match_by_cross_product(logits: Tensor, boxes: Tensor, targets: Sequence[SetTarget]) -> list[tuple[Tensor, Tensor]]:
    """Costs of all queries of the batch with all objects of the batch, of which each image then takes its own share."""
    from torchvision.ops import generalized_box_iou

    labels, objects = (torch.cat(field) for field in zip(*targets, strict=True))
    p, flat = logits.flatten(0, 1).softmax(-1), boxes.flatten(0, 1)
    cost = 5 * torch.cdist(flat, objects, p=1) - p[:, labels] - 2 * generalized_box_iou(cxcywh_to_xyxy(flat), cxcywh_to_xyxy(objects))
    shares = cost.view(len(logits), logits.shape[1], -1).cpu().split([len(target.labels) for target in targets], -1)
    solved = [linear_sum_assignment(share[index]) for index, share in enumerate(shares)]
    return [(torch.as_tensor(queries), torch.as_tensor(matched)) for queries, matched in solved]


def _batch(images: int, queries: int, least: int, most: int) -> tuple[Tensor, Tensor, list[SetTarget]]:
    generator = torch.Generator().manual_seed(0)

    def boxes(*shape: int) -> Tensor:
        return torch.cat([torch.rand(*shape, 2, generator=generator), torch.rand(*shape, 2, generator=generator) * 0.5], -1)

    counts = torch.randint(least, most + 1, (images,), generator=generator).tolist()
    targets = [SetTarget(torch.randint(0, _CLASSES - 1, (count,), generator=generator), boxes(count)) for count in counts]
    return torch.randn(images, queries, _CLASSES, generator=generator) * 2, boxes(images, queries), targets
