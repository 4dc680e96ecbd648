"""From ground truth to training target: anchors, matching, sampling, box coding."""
from visionkit.models.targets.anchors import AnchorGrid
from visionkit.models.targets.box_coder import BoxCoder
from visionkit.models.targets.hungarian_matcher import HungarianMatcher
from visionkit.models.targets.iou_matcher import IGNORED, NEGATIVE, IoUMatcher
from visionkit.models.targets.samplers import AllSampler, BalancedSampler
from visionkit.models.targets.set_target import SetTarget, set_targets

__all__ = [
    "IGNORED",
    "NEGATIVE",
    "AllSampler",
    "AnchorGrid",
    "BalancedSampler",
    "BoxCoder",
    "HungarianMatcher",
    "IoUMatcher",
    "SetTarget",
    "set_targets",
]
