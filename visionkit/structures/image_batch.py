"""Images of different sizes in one tensor."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# B images, H and W of the batch, h and w of one image


@dataclass(frozen=True)
class ImageBatch:
    """Images of different sizes, padded at the right and bottom into one tensor.

    Law: every size lies within the tensor, and there is one size an image.

    Args:
        tensor: [B, 3, H, W], normalised values.
        sizes: the (h, w) of each image without its padding, pixels.

    Raises:
        ValueError: the law is broken.
    """
    tensor: Tensor
    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple((int(h), int(w)) for h, w in self.sizes))
        batch, _, height, width = self.tensor.shape
        if len(self.sizes) != batch:
            raise ValueError(f"an image batch needs one size an image, got {len(self.sizes)} sizes for {batch} images")
        for index, (h, w) in enumerate(self.sizes):
            if not (0 < h <= height and 0 < w <= width):
                raise ValueError(f"image {index} is said to be {h}x{w} in a batch of {height}x{width}")

    @classmethod
    def stack(cls, images: Sequence[Tensor], *, divisor: int = 1, value: float = 0.0) -> ImageBatch:
        """Pad images to a common size.

        Args:
            images: each [3, h, w].
            divisor: height and width of the batch become multiples of it.
            value: what the padding holds.

        Raises:
            ValueError: no images.
        """
        if not images:
            raise ValueError("an image batch needs at least one image, got none")
        sizes = tuple((image.shape[-2], image.shape[-1]) for image in images)
        height = -(-max(h for h, _ in sizes) // divisor) * divisor
        width = -(-max(w for _, w in sizes) // divisor) * divisor
        padded = [F.pad(image, (0, width - w, 0, height - h), value=value) for image, (h, w) in zip(images, sizes, strict=True)]
        return cls(torch.stack(padded), sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, images: slice) -> ImageBatch:
        """Some of the images, in the same canvas."""
        return ImageBatch(self.tensor[images], self.sizes[images])

    def to(self, dtype: torch.dtype) -> ImageBatch:
        """The same images in another dtype."""
        return ImageBatch(self.tensor.to(dtype), self.sizes)

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @property
    def padded(self) -> bool:
        """Whether any image is smaller than the tensor."""
        return any(size != tuple(self.tensor.shape[2:]) for size in self.sizes)

    def valid(self) -> Tensor:
        """[B, H, W] bool, true on the image, false on its padding."""
        batch, _, height, width = self.tensor.shape
        sizes = torch.tensor(self.sizes, device=self.device).view(batch, 2, 1, 1)
        rows = torch.arange(height, device=self.device).view(1, height, 1)
        columns = torch.arange(width, device=self.device).view(1, 1, width)
        return (rows < sizes[:, 0]) & (columns < sizes[:, 1])
