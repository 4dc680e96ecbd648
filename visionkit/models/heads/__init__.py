"""Features to predictions: heads that two or more architectures share."""
from visionkit.models.heads.classification import ClassificationHead
from visionkit.models.heads.roi_box import RoIBoxHead
from visionkit.models.heads.roi_head import RoIHead
from visionkit.models.heads.roi_pooling import DeformableRoIPooling, PyramidRoIAlign
from visionkit.models.heads.rpn import RPN

__all__ = ["RPN", "ClassificationHead", "DeformableRoIPooling", "PyramidRoIAlign", "RoIBoxHead", "RoIHead"]
