"""Features to predictions: heads that two or more architectures share."""
from visionkit.models.heads.classification import ClassificationHead
from visionkit.models.heads.jigsaw import JigsawHead
from visionkit.models.heads.relative_patch import RelativePatchHead
from visionkit.models.heads.roi_box import RoIBoxHead
from visionkit.models.heads.roi_head import RoIHead
from visionkit.models.heads.roi_pooling import DeformableRoIPooling, PyramidRoIAlign
from visionkit.models.heads.rotation import RotationHead
from visionkit.models.heads.rpn import RPN

__all__ = ["RPN", "ClassificationHead", "DeformableRoIPooling", "JigsawHead", "PyramidRoIAlign", "RelativePatchHead", "RoIBoxHead",
           "RoIHead", "RotationHead"]
