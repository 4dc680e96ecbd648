"""How long a sample is, in tokens, told without loading it."""
from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from visionkit.datasets.sampler import Draw
from visionkit.registry import LENGTHS, ConfigError

# A length is called with a data set and a draw and returns a whole number of 1 or more. Its `varies(dataset)` says whether that depends on
# the draw's seed, as where a transform draws the size of the image; where it does not, each sample is asked for once. A length without
# `varies` is asked for every draw. It may have `of_draws(dataset, draws)`, which returns the lengths of several.


@LENGTHS.register_module()
class ImageTokens:
    """The tokens of an image in a vision transformer that takes images in their own size, such as MoonViT (arXiv:2504.07491, sec. 2.1):
    height and width are filled up to whole groups of `merge` x `merge` patches.

    The size is that which leaves the data set's pipeline (`Dataset.output_sizes`).

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
        return any(getattr(leaf, "random_size", False) for leaf in leaves(dataset))

    def __call__(self, dataset: Any, draw: int) -> int:
        return self.of_draws(dataset, [draw])[0]

    def of_draws(self, dataset: Any, draws: Iterable[int]) -> list[int]:
        """The length of each of several draws, which takes less time than one by one."""
        lengths: dict[int, int] = {}                         # by the place among the draws
        by_leaf: dict[int, list[tuple[int, Any, int]]] = defaultdict(list)
        for place, draw in enumerate(draws):
            leaf, index = find_leaf(dataset, draw)
            by_leaf[id(leaf)].append((place, leaf, index))
        for found in by_leaf.values():
            places, (leaf, *_), indices = zip(*found, strict=True)
            self._check(dataset, leaf, indices[0])
            lengths.update(zip(places, (self.of_size(*size) for size in leaf.output_sizes(indices)), strict=True))
        return [lengths[place] for place in range(len(lengths))]

    def _check(self, dataset: Any, leaf: Any, index: int) -> None:
        if not hasattr(leaf, "output_sizes"):
            raise ConfigError(f"{type(leaf).__name__} does not tell the size of an image without loading it; give it a method "
                              f"output_sizes(indices) that returns the (height, width) of each, or choose another length", ("type",))
        if not isinstance(index, Draw) and getattr(leaf, "random_size", False):
            raise ConfigError(f"the size of an image is drawn with the seed of its draw, which {type(dataset).__name__} drops; use a "
                              f"wrapper that keeps it, such as ConcatDataset or RepeatDataset", ("type",))

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
