"""What travels between rooms: image batches, packed sequences, panoptic maps and samples, each with a law it keeps."""
from visionkit.structures.image_batch import ImageBatch
from visionkit.structures.image_list import ImageList
from visionkit.structures.packed_sequence import PackedSequence
from visionkit.structures.panoptic_map import PanopticMap, Segment
from visionkit.structures.sample import InstanceData, Sample

__all__ = ["ImageBatch", "ImageList", "InstanceData", "PackedSequence", "PanopticMap", "Sample", "Segment"]
