"""Models that learn from images without labels: puzzles made of the images, and what belongs together; one method a file."""
from visionkit.models.self_supervised.cpc import CPC
from visionkit.models.self_supervised.deep_infomax import DeepInfoMax
from visionkit.models.self_supervised.jigsaw import Jigsaw
from visionkit.models.self_supervised.relative_patch import RelativePatch
from visionkit.models.self_supervised.rotation import Rotation

__all__ = ["CPC", "DeepInfoMax", "Jigsaw", "RelativePatch", "Rotation"]
