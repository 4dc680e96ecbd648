"""Object detectors, one architecture a file."""
from visionkit.models.detectors.faster_rcnn import FasterRCNN

__all__ = ["FasterRCNN"]
