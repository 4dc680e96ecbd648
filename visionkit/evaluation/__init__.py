"""Metrics: predictions and ground truth in, numbers out."""
from visionkit.evaluation.accuracy import Accuracy
from visionkit.evaluation.coco_ap import CocoMetric
from visionkit.evaluation.detection import DetectionMetric
from visionkit.evaluation.image_metric import ImageMetric
from visionkit.evaluation.knn_probe import KNNProbe
from visionkit.evaluation.linear_probe import LinearProbe
from visionkit.evaluation.panoptic_quality import PanopticQuality
from visionkit.evaluation.pretext_accuracy import PretextAccuracy
from visionkit.evaluation.probe import ProbeMetric
from visionkit.evaluation.probe_comparison import ProbeComparison
from visionkit.evaluation.voc_ap import VOCMetric

__all__ = ["Accuracy", "CocoMetric", "DetectionMetric", "ImageMetric", "KNNProbe", "LinearProbe", "PanopticQuality", "PretextAccuracy",
           "ProbeComparison", "ProbeMetric", "VOCMetric"]
