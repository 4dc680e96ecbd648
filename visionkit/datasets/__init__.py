"""Data sets, and the samplers that say which image comes next."""
from visionkit.datasets.base import Dataset
from visionkit.datasets.coco import CocoDataset
from visionkit.datasets.detection import DetectionDataset
from visionkit.datasets.sampler import Draw, DrawSampler, InfiniteDrawSampler
from visionkit.datasets.shapes import ShapesDataset

__all__ = ["CocoDataset", "Dataset", "DetectionDataset", "Draw", "DrawSampler", "InfiniteDrawSampler", "ShapesDataset"]
