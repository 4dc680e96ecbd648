"""Sizes of images for models that take each image as it is, cut into patches."""
from __future__ import annotations

import math
from typing import Any

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
        merge: patches along a side of a token, to whose multiple the preprocessor will pad.

    Raises:
        ValueError: a side would still have 512 patches or more, padding included, or the image has no three channels of uint8.
    """

    def __init__(self, patch_size: int = 14, limit: int = 4096, merge: int = 2) -> None:
        if min(patch_size, limit, merge) < 1:
            raise ValueError(f"patch_size, limit and merge are 1 or more, got {patch_size=}, {limit=}, {merge=}")
        self.patch_size = patch_size
        self.limit = limit
        self.merge = merge

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The height and width that an image of so many pixels gets."""
        patches = (width // self.patch_size) * (height // self.patch_size)
        if patches > self.limit:
            scale = math.sqrt(self.limit / patches)
            height, width = max(int(height * scale), 1), max(int(width * scale), 1)
        longest = -(-max(height, width) // (self.patch_size * self.merge)) * self.merge                  # patches, padding included
        if longest >= LONGEST_SIDE:
            raise ValueError(f"an image of {height}x{width} pixels has a side of {longest} patches, and "
                             f"there are positions for fewer than {LONGEST_SIDE}; crop it, or scale it down before")
        return height, width

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        before = results["img"].shape[:2]
        height, width = self.size(*before)
        if (height, width) == before:
            return results
        image = results["img"]
        if image.dtype != np.uint8 or image.shape[2:] != (3,):
            raise ValueError(f"ResizeToTokenLimit takes images [h, w, 3] of uint8, got {list(image.shape)} of {image.dtype}; put it right "
                             f"after LoadImageFromFile")
        results = Resize(scale=(width, height)).transform(results)          # all that goes along with the image
        results["img"] = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
        return results

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """`size`, under the name that every transform has for it."""
        return self.size(height, width)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(patch_size={self.patch_size}, limit={self.limit}, merge={self.merge})"


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
