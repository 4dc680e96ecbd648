"""What travels between rooms: image batches and samples, each with a law it keeps."""
from visionkit.structures.image_batch import ImageBatch
from visionkit.structures.sample import InstanceData, Sample

__all__ = ["ImageBatch", "InstanceData", "Sample"]
