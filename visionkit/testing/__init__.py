"""Contract checks that a plugin's own tests call: each raises an AssertionError that says which promise is broken and how."""
from visionkit.testing.backbone import check_backbone, check_token_backbone
from visionkit.testing.model import check_model
from visionkit.testing.op import check_op
from visionkit.testing.transform import check_transform, example_results

__all__ = ["check_backbone", "check_model", "check_op", "check_token_backbone", "check_transform", "example_results"]
