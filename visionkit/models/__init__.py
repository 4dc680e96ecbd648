"""Architectures and their parts."""
from visionkit.models import backbones, classifiers, detectors, heads, losses, necks, self_supervised, targets
from visionkit.models.base import ImagePreprocessor, Model

__all__ = ["ImagePreprocessor", "Model", "backbones", "classifiers", "detectors", "heads", "losses", "necks", "self_supervised", "targets"]
