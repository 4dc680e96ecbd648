"""Sizes of images for models that take each image as it is, cut into patches."""
from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
from mmcv.transforms import BaseTransform
from PIL import Image

from visionkit.registry import TRANSFORMS
from visionkit.transforms.geometry import Resize

LONGEST_SIDE = 512                                           # patches, of MoonViT; a side has fewer


@TRANSFORMS.register_module()
class ResizeToTokenLimit(BaseTransform):
    """Scale an image down, with its boxes and masks, where it has more patches than allowed (Kimi-VL, arXiv:2504.07491).

    Only whole patches count, before the image is padded, and both sides are scaled by the same factor and rounded down; padding may then
    bring a few patches more. Pixels are resampled as Pillow's bicubic filter does; smaller images stay as they are.

    Args:
        patch_size: pixels.
        limit: the most patches, 4096 in Kimi-VL-A3B.

    Raises:
        ValueError: a side still has 512 patches or more.
    """

    def __init__(self, patch_size: int = 14, limit: int = 4096) -> None:
        if patch_size < 1 or limit < 1:
            raise ValueError(f"patch_size and limit are 1 or more, got {patch_size=}, {limit=}")
        self.patch_size = patch_size
        self.limit = limit

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The height and width that an image of so many pixels gets."""
        patches = (width // self.patch_size) * (height // self.patch_size)
        if patches > self.limit:
            scale = math.sqrt(self.limit / patches)
            height, width = int(height * scale), int(width * scale)
        if max(height, width) >= LONGEST_SIDE * self.patch_size:
            raise ValueError(f"an image of {height}x{width} pixels has a side of {max(height, width) // self.patch_size} patches, and "
                             f"there are positions for fewer than {LONGEST_SIDE}; crop it, or scale it down before")
        return height, width

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        before = results["img"].shape[:2]
        height, width = self.size(*before)
        if (height, width) == before:
            return results
        results["img"] = np.array(Image.fromarray(results["img"]).resize((width, height), Image.Resampling.BICUBIC))
        results["img_shape"] = (height, width)
        scale = (width / before[1], height / before[0])
        factor = results.get("scale_factor", (1.0, 1.0))
        results["scale_factor"] = (factor[0] * scale[0], factor[1] * scale[1])
        if results.get("gt_bboxes") is not None:
            results["gt_bboxes"] = results["gt_bboxes"] * np.float32(scale * 2)
        if results.get("gt_masks") is not None:
            masks = [cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST) for mask in results["gt_masks"]]
            results["gt_masks"] = np.array(masks, np.uint8).reshape(-1, height, width)
        return results

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """`size`, under the name that every transform has for it."""
        return self.size(height, width)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(patch_size={self.patch_size}, limit={self.limit})"


@TRANSFORMS.register_module()
class RandomNativeResize(BaseTransform):
    """Scale an image to a random height and a random width, with no regard to its shape; both are multiples of what a token covers.

    Args:
        multiple: pixels.
        low: the least height and width, a multiple of `multiple`.
        high: the largest, likewise.
        interpolation: as `Resize` has it.
    """
    random_size = True

    def __init__(self, multiple: int = 28, low: int = 56, high: int = 112, interpolation: str = "bilinear") -> None:
        if multiple < 1 or low % multiple or high % multiple or not 0 < low <= high:
            raise ValueError(f"low and high are multiples of multiple, low above 0 and high not below it; got {multiple=}, {low=}, {high=}")
        Resize(scale=(low, low), interpolation=interpolation)            # which knows the interpolations
        self.multiple, self.low, self.high, self.interpolation = multiple, low, high, interpolation

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        height, width = self.output_size(*results["img"].shape[:2])
        return Resize(scale=(width, height), interpolation=self.interpolation).transform(results)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the result, whatever the image was; draws it."""
        rows, columns = np.random.randint(self.low // self.multiple, self.high // self.multiple + 1, 2)
        return int(rows) * self.multiple, int(columns) * self.multiple

    def __repr__(self) -> str:
        return (f"{type(self).__name__}(multiple={self.multiple}, low={self.low}, high={self.high}, "
                f"interpolation={self.interpolation!r})")
