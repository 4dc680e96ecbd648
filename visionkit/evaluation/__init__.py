"""Metrics: predictions and ground truth in, numbers out."""
from visionkit.evaluation.coco_ap import CocoMetric

__all__ = ["CocoMetric"]
