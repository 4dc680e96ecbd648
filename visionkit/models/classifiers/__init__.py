"""Classifiers of whole images."""
from visionkit.models.classifiers.image_classifier import ImageClassifier

__all__ = ["ImageClassifier"]
