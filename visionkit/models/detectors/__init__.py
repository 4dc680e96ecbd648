"""Object detectors, one architecture a file."""
from visionkit.models.detectors.deformable_detr import DeformableDETR
from visionkit.models.detectors.detr import DETR
from visionkit.models.detectors.detr_panoptic import DetrPanoptic
from visionkit.models.detectors.faster_rcnn import FasterRCNN
from visionkit.models.detectors.packed_detr import PackedDETR
from visionkit.models.detectors.r_fcn import RFCN

__all__ = ["DETR", "RFCN", "DeformableDETR", "DetrPanoptic", "FasterRCNN", "PackedDETR"]
