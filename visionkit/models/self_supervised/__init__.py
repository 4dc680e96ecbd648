"""Models that learn from images without labels: puzzles made of the images, and what belongs together; one method a file."""
from visionkit.models.self_supervised.cpc import CPC
from visionkit.models.self_supervised.deep_infomax import DeepInfoMax

__all__ = ["CPC", "DeepInfoMax"]
