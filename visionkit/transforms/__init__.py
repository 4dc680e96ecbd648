"""Image and annotation in and out: loading, geometry, colour, packing. mmcv's transforms are reachable by name too."""
import mmcv.transforms  # noqa: F401  (registers them in mmengine's root registry, our registry's parent)

from visionkit.transforms.geometry import RandomFlip, Resize
from visionkit.transforms.loading import BrokenImageError, LoadAnnotations, LoadImageFromFile
from visionkit.transforms.packing import PackSample
from visionkit.transforms.pipeline import build_pipeline

__all__ = ["BrokenImageError", "LoadAnnotations", "LoadImageFromFile", "PackSample", "RandomFlip", "Resize", "build_pipeline"]
