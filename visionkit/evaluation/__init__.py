"""Metrics: predictions and ground truth in, numbers out."""
from visionkit.evaluation.coco_ap import CocoMetric
from visionkit.evaluation.detection import DetectionMetric
from visionkit.evaluation.panoptic_quality import PanopticQuality
from visionkit.evaluation.voc_ap import VOCMetric

__all__ = ["CocoMetric", "DetectionMetric", "PanopticQuality", "VOCMetric"]
