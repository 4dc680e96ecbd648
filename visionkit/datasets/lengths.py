"""How long a sample is, in tokens, told without loading it."""
from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from visionkit.datasets.sampler import Draw
from visionkit.registry import LENGTHS, ConfigError

# A length is called with a data set and a draw and returns a whole number of 1 or more. Its `varies(dataset)` says whether that depends on
# the draw's seed, as where a transform draws the size of the image; where it does not, each sample is asked for once. A length without
# `varies` is asked for every draw.


@LENGTHS.register_module()
class ImageTokens:
    """The tokens of an image in a vision transformer that takes images in their own size, such as MoonViT (arXiv:2504.07491, sec. 2.1):
    height and width are filled up to whole groups of `merge` x `merge` patches.

    The size is that which leaves the data set's pipeline (`Dataset.output_size`).

    Args:
        patch_size: the side of a patch, pixels.
        merge: patches along the side of a group that becomes one token behind the transformer; 1: they are not merged.
        max_patches: an image of more whole patches is made smaller by the model: both sides by the square root of the ratio. None: it is
            taken as it is, or a transform of the pipeline does so.
        merged: count groups, the tokens of a language model, instead of patches, those of the vision transformer.
    """

    def __init__(self, patch_size: int = 14, merge: int = 2, max_patches: int | None = None, merged: bool = False) -> None:
        if patch_size < 1 or merge < 1 or (max_patches is not None and max_patches < 1):
            raise ValueError(f"patch_size, merge and max_patches are 1 or more, got {patch_size=}, {merge=}, {max_patches=}")
        self.patch_size, self.merge, self.max_patches, self.merged = patch_size, merge, max_patches, merged

    def varies(self, dataset: Any) -> bool:
        """Whether a transform draws the size of the image."""
        return any(leaf.random_size for leaf in leaves(dataset) if hasattr(leaf, "random_size"))

    def __call__(self, dataset: Any, draw: int) -> int:
        leaf, index = find_leaf(dataset, draw)
        if not hasattr(leaf, "output_size"):
            raise ConfigError(f"{type(leaf).__name__} does not tell the size of an image without loading it; give it a method "
                              f"output_size(index) that returns (height, width), or choose another length", ("type",))
        if not isinstance(index, Draw) and leaf.random_size:
            raise ConfigError(f"the size of an image is drawn with the seed of its draw, which {type(dataset).__name__} drops; use a "
                              f"wrapper that keeps it, such as ConcatDataset or RepeatDataset", ("type",))
        return self.of_size(*leaf.output_size(index))

    def of_size(self, height: int, width: int) -> int:
        """The tokens of an image of so many pixels."""
        patches = (height // self.patch_size) * (width // self.patch_size)
        if self.max_patches is not None and patches > self.max_patches:
            scale = math.sqrt(self.max_patches / patches)
            height, width = int(height * scale), int(width * scale)
        groups = math.prod(-(-side // (self.patch_size * self.merge)) for side in (height, width))
        return groups if self.merged else groups * self.merge**2


@LENGTHS.register_module()
class OwnLength:
    """What the data set says itself: its method `sample_length(index)`.

    Args:
        varies: whether it depends on the seed that a draw carries.
    """

    def __init__(self, varies: bool = False) -> None:
        self._varies = varies

    def varies(self, dataset: Any) -> bool:
        """What the constructor was told."""
        return self._varies

    def __call__(self, dataset: Any, draw: int) -> int:
        leaf, index = find_leaf(dataset, draw)
        if not hasattr(leaf, "sample_length"):
            raise ConfigError(f"{type(leaf).__name__} has no method sample_length(index); for images choose dict(type='ImageTokens')")
        return leaf.sample_length(index)


def leaves(dataset: Any) -> Iterator[Any]:
    """The data sets within wrappers such as ConcatDataset."""
    if hasattr(dataset, "datasets"):
        for part in dataset.datasets:
            yield from leaves(part)
    elif hasattr(dataset, "dataset"):
        yield from leaves(dataset.dataset)
    else:
        yield dataset


def find_leaf(dataset: Any, index: int) -> tuple[Any, int]:
    """The data set within mmengine's wrappers that holds sample `index`, and its number there; a draw keeps its seed where they let it."""
    while hasattr(dataset, "_get_ori_dataset_idx"):
        place = dataset._get_ori_dataset_idx(index)
        dataset, index = (dataset.datasets[place[0]], place[1]) if isinstance(place, tuple) else (dataset.dataset, place)
    return dataset, index
