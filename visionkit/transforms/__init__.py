"""Image and annotation in and out: loading, geometry, colour, packing. mmcv's transforms are reachable by name too."""
from visionkit.transforms.albumentations import Albumentations
from visionkit.transforms.color import PhotoMetricDistortion
from visionkit.transforms.geometry import RandomCrop, RandomFlip, RandomResizedCrop, RandomShift, Resize, TestTimeAug
from visionkit.transforms.loading import BrokenImageError, LoadAnnotations, LoadImageFromFile, decode_image, read_size
from visionkit.transforms.native_resolution import RandomNativeResize, ResizeToTokenLimit
from visionkit.transforms.overlapping_crops import OverlappingCrops
from visionkit.transforms.packing import PackSample
from visionkit.transforms.panoptic import BoxesFromMasks, LoadPanopticAnnotations
from visionkit.transforms.pipeline import build_pipeline, output_size, random_size
from visionkit.transforms.pretext import FourRotations, JigsawTiles, PatchGrid

__all__ = [
    "Albumentations",
    "BoxesFromMasks",
    "BrokenImageError",
    "FourRotations",
    "JigsawTiles",
    "LoadAnnotations",
    "LoadImageFromFile",
    "LoadPanopticAnnotations",
    "OverlappingCrops",
    "PackSample",
    "PatchGrid",
    "PhotoMetricDistortion",
    "RandomCrop",
    "RandomFlip",
    "RandomNativeResize",
    "RandomResizedCrop",
    "RandomShift",
    "Resize",
    "ResizeToTokenLimit",
    "TestTimeAug",
    "build_pipeline",
    "decode_image",
    "output_size",
    "random_size",
    "read_size",
]
