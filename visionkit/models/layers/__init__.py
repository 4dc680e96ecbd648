"""Building blocks that several architectures share."""
from visionkit.models.layers.mlp import MLP

__all__ = ["MLP"]
