"""What models that solve puzzles share: whole images to make the puzzles of, embeddings of pieces, and answers beside the right ones."""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.registry import ConfigError
from visionkit.structures import ImageBatch, ImageList, InstanceData, Sample

# B images, T puzzles an image, K answers to choose from; N pieces of an image, P pixels the side of one


class Answers(NamedTuple):
    """What a model says of each puzzle, and what is right."""
    logits: Tensor      # [B, T, K]
    labels: Tensor      # [B, T] int64

    @torch.no_grad()
    def accuracy(self) -> Tensor:
        """The part of the puzzles that are solved, a scalar."""
        return (self.logits.argmax(-1) == self.labels).float().mean()

    def into(self, samples: list[Sample]) -> list[Sample]:
        """`samples` with probabilities [T, K] and labels [T] as their `pretext`."""
        for sample, scores, labels in zip(samples, self.logits.softmax(-1), self.labels, strict=True):
            sample.pretext = InstanceData(scores=scores, labels=labels)
        return samples


def puzzle_of(puzzle: nn.Module, images: Tensor | ImageList, *fields: str) -> Any:
    """What a puzzle makes of images, which has these fields.

    Raises:
        ConfigError: it makes something else: it is a puzzle for another model.
    """
    made = puzzle(images)
    if not all(hasattr(made, field) for field in fields):
        has = ", ".join(getattr(made, "_fields", ())) or f"a {type(made).__name__}"
        raise ConfigError(f"this model wants {' and '.join(fields)} of its puzzle, and {type(puzzle).__name__} makes {has}; it is a puzzle "
                          f"for another model", ("model", "puzzle"))
    return made


def whole_images(images: ImageBatch) -> Tensor:
    """[B, 3, H, W] of a batch without padding, whose place in a view or patch would give the answer away.

    Raises:
        ConfigError: an image is padded.
    """
    if images.padded:
        height, width = images.tensor.shape[2:]
        smaller = next(size for size in images.sizes if size != (height, width))
        raise ConfigError(f"padding gives the answer of a puzzle away, and an image of {smaller[0]}x{smaller[1]} is padded to "
                          f"{height}x{width}; end the pipeline with a crop or resize that makes all images one size, and set "
                          f"data_preprocessor=dict(type='ImagePreprocessor', pad_divisor=1)")
    return images.tensor


def whole_list(images: ImageList) -> ImageList:
    """Images of their own sizes, none of which is padded.

    Raises:
        ConfigError: an image is padded.
    """
    for image, size in zip(images.images, images.sizes, strict=True):
        if size != tuple(image.shape[1:]):
            raise ConfigError(f"padding gives the answer of a puzzle away, and an image of {size[0]}x{size[1]} is padded to "
                              f"{image.shape[1]}x{image.shape[2]}; end the pipeline with a resize to multiples of the preprocessor's "
                              f"`multiple`, such as dict(type='RandomNativeResize')")
    return images


def check_pool(pool: int) -> int:
    """How many cells, each way, the map of a piece has for the head.

    Raises:
        ValueError: it is no whole number from 1 on.
    """
    if not isinstance(pool, int) or pool < 1:
        raise ValueError(f"pool is how many cells the map of a piece has each way, 1 or more; got {pool!r}")
    return pool


def embed_pieces(backbone: nn.Module, pieces: Tensor, pool: int) -> Tensor:
    """[B, N, 3, P, P], each through the backbone by itself, to [B, N, C * pool^2]: the last map's means over pool x pool cells."""
    maps = backbone(pieces.flatten(0, 1))[-1]                                            # [B * N, C, h, w]
    if pool > min(maps.shape[-2:]):
        raise ConfigError(f"the last map of a piece of {' x '.join(map(str, pieces.shape[-2:]))} pixels has "
                          f"{' x '.join(map(str, maps.shape[-2:]))} locations, and {pool} x {pool} cells would only repeat them; "
                          f"set pool to {min(maps.shape[-2:])} or less", ("model", "pool"))
    return F.adaptive_avg_pool2d(maps, pool).flatten(1).unflatten(0, pieces.shape[:2])
