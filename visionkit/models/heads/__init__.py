"""Features to predictions: heads that two or more architectures share."""
from visionkit.models.heads.roi_box import RoIBoxHead
from visionkit.models.heads.rpn import RPN

__all__ = ["RPN", "RoIBoxHead"]
