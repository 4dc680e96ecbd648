"""Data sets, and the samplers that say which image comes next."""
from visionkit.datasets.base import Dataset
from visionkit.datasets.cifar import CIFAR
from visionkit.datasets.coco import CocoDataset
from visionkit.datasets.coco_panoptic import CocoInstancesAsPanoptic, CocoPanopticDataset
from visionkit.datasets.detection import DetectionDataset
from visionkit.datasets.image_folder import ImageFolder
from visionkit.datasets.lengths import ImageTokens, OwnLength
from visionkit.datasets.packed_batches import PackedBatchSampler
from visionkit.datasets.packing import Balanced, BestFit, NextFit, Pack, Packer, pack_all
from visionkit.datasets.report import DatasetReport
from visionkit.datasets.roots import resolve
from visionkit.datasets.sampler import Draw, DrawSampler, InfiniteDrawSampler, seeded
from visionkit.datasets.shapes import ShapesDataset
from visionkit.datasets.throughput import images_per_second
from visionkit.datasets.voc import VOCDataset
from visionkit.datasets.workers import worker_init

__all__ = ["CIFAR", "Balanced", "BestFit", "CocoDataset", "CocoInstancesAsPanoptic", "CocoPanopticDataset", "Dataset", "DatasetReport",
           "DetectionDataset", "Draw", "DrawSampler", "ImageFolder", "ImageTokens", "InfiniteDrawSampler", "NextFit", "OwnLength", "Pack",
           "PackedBatchSampler", "Packer", "ShapesDataset", "VOCDataset", "images_per_second", "pack_all", "resolve", "seeded",
           "worker_init"]
