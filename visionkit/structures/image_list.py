"""Images of different sizes, each in a tensor of its own."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# h and w of one image


@dataclass(frozen=True, eq=False)
class ImageList:
    """A batch without a canvas: each image keeps its own size, and nothing is computed on what lies between them.

    Law: there is at least one image; all are [3, h, w] of one dtype on one device; there is one size an image, and it lies within it.

    Args:
        images: each [3, h, w], normalised values.
        sizes: the (h, w) of each image without what it was padded with at its right and bottom, pixels; by default all of it.

    Raises:
        ValueError: the law is broken.
    """
    images: tuple[Tensor, ...]
    sizes: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(self.images))
        whole = tuple((image.shape[-2], image.shape[-1]) for image in self.images)
        object.__setattr__(self, "sizes", tuple((int(h), int(w)) for h, w in self.sizes) or whole)
        if not self.images:
            raise ValueError("an image list needs at least one image, got none")
        if len(self.sizes) != len(self.images):
            raise ValueError(f"an image list needs one size an image, got {len(self.sizes)} sizes for {len(self.images)} images")
        first = self.images[0]
        for index, (image, (h, w)) in enumerate(zip(self.images, self.sizes, strict=True)):
            if image.ndim != 3 or image.shape[0] != 3:
                raise ValueError(f"image {index} must be [3, h, w], got {list(image.shape)}")
            if (image.dtype, image.device) != (first.dtype, first.device):
                raise ValueError(f"image {index} is {image.dtype} on {image.device}, image 0 {first.dtype} on {first.device}; make them "
                                 f"alike")
            if not (0 < h <= image.shape[1] and 0 < w <= image.shape[2]):
                raise ValueError(f"image {index} is said to be {h}x{w} in a tensor of {image.shape[1]}x{image.shape[2]}")

    @classmethod
    def pad(cls, images: Sequence[Tensor], *, divisor: int, value: float = 0.0) -> ImageList:
        """Bring the height and width of each image to a multiple of `divisor`, at its right and bottom, with `value`.

        Raises:
            ValueError: no images, or they are not alike.
        """
        sizes = tuple((image.shape[-2], image.shape[-1]) for image in images)
        padded = [F.pad(image, (0, -w % divisor, 0, -h % divisor), value=value) for image, (h, w) in zip(images, sizes, strict=True)]
        return cls(tuple(padded), sizes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, images: slice) -> ImageList:
        """Some of the images."""
        return ImageList(self.images[images], self.sizes[images])

    def to(self, dtype: torch.dtype) -> ImageList:
        """The same images in another dtype."""
        return ImageList(tuple(image.to(dtype) for image in self.images), self.sizes)

    @property
    def device(self) -> torch.device:
        return self.images[0].device
