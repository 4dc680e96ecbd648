"""What set prediction learns from: the objects of an image, in no order."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from visionkit.ops import xyxy_to_cxcywh
from visionkit.structures import Sample


class SetTarget(NamedTuple):
    """The objects of one image."""
    labels: Tensor      # [N] int64
    boxes: Tensor       # [N, 4] as (cx, cy, w, h), fractions of the network input without its padding


def set_targets(samples: Sequence[Sample]) -> list[SetTarget]:
    """The objects of each image; crowd regions, which are `ignored_instances`, are no part of the set."""
    targets = []
    for sample in samples:
        boxes, (height, width) = sample.gt_instances.bboxes, sample.img_shape
        targets.append(SetTarget(sample.gt_instances.labels, xyxy_to_cxcywh(boxes / boxes.new_tensor([width, height, width, height]))))
    return targets
