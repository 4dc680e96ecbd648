"""What travels between rooms: image batches, panoptic maps and samples, each with a law it keeps."""
from visionkit.structures.image_batch import ImageBatch
from visionkit.structures.panoptic_map import PanopticMap, Segment
from visionkit.structures.sample import InstanceData, Sample

__all__ = ["ImageBatch", "InstanceData", "PanopticMap", "Sample", "Segment"]
