"""Networks that learn from images without labels."""
from visionkit.models.self_supervised.deep_infomax import DeepInfoMax

__all__ = ["DeepInfoMax"]
