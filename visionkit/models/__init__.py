"""Architectures and their parts."""
from visionkit.models import backbones, detectors, heads, losses, necks, targets
from visionkit.models.base import ImagePreprocessor, Model

__all__ = ["ImagePreprocessor", "Model", "backbones", "detectors", "heads", "losses", "necks", "targets"]
