"""Puzzles made of images, the questions of models that learn without labels: drawn from whole batches, on the model's device.

They get images as the model's `ImagePreprocessor` hands them on, normalised. In train mode they draw from torch's own generator; in eval
mode the same at every call, so that validation is the same every time: what an image is asked depends on its place in the batch.
"""
from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.registry import TRANSFORMS, ConfigError
from visionkit.structures import ImageList

# B images of C channels and H x W pixels, S x S where they are square; P pixels the side of a patch or tile, N patches an image,
# T puzzles an image, K permutations

_CELLS = 9                                                   # 3 x 3, in raster order
_GREY = (0.299, 0.587, 0.114)                                # luma of R, G, B
_GREEN_AGAINST_MAGENTA = (-1.0, 2.0, -1.0)                   # along which lenses shift colours apart
_FLAT = 1e-5                                                 # a standard deviation below is rounding


class Rotations(NamedTuple):
    """Every image in four positions."""
    views: Tensor | ImageList   # [B, 4, C, S, S] or B * 4 images, turned by 0, 90, 180 and 270 degrees counter-clockwise
    labels: Tensor              # [B, 4] int64, 0 to 3


class Patches(NamedTuple):
    """Nine patches of every image."""
    patches: Tensor     # [B, 9, C, P, P] in raster order, the centre is number 4
    offsets: Tensor     # [B, 9, 2] int64, (y, x) of their top left corners, pixels


class Tiles(NamedTuple):
    """Nine tiles of every image, and the orders they are asked in."""
    tiles: Tensor       # [B, 9, C, P, P] in raster order, none moved
    orders: Tensor      # [B, T, 9] int64: of puzzle t, place i holds tile orders[b, t, i]
    labels: Tensor      # [B, T] int64, below K: the number of that order
    offsets: Tensor     # [B, 9, 2] int64, (y, x) of their top left corners, pixels


class Spread(NamedTuple):
    """Of some numbers."""
    least: float
    mean: float


@TRANSFORMS.register_module()
class FourRotations(nn.Module):
    """Each image turned by 0, 90, 180 and 270 degrees (Gidaris et al. 2018, arXiv:1803.07728, sec. 2.2).

    Pixels are moved, never interpolated, so no trace of the turning gives the answer away; and all four views of an image are in the
    batch, so no answer is more frequent than another. The views lie in memory as the images do. Only the shape of images that are not
    square changes with a quarter turn: it tells nothing where heights and widths are alike in distribution (`RandomNativeResize`).
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, images: Tensor | ImageList) -> Rotations:
        """[B, C, S, S], or images of their own sizes and shapes, to four views of each.

        Raises:
            ConfigError: the images are in one tensor, and are not square.
        """
        if isinstance(images, ImageList):
            turned = (image.rot90(turns, (1, 2)) for image in images.images for turns in range(4))
            return Rotations(ImageList(tuple(turned)), torch.arange(4, device=images.device).expand(len(images), 4))
        height, width = images.shape[2:]
        if height != width:
            side = min(height, width)
            raise ConfigError(f"FourRotations turns square images only, got {height}x{width} pixels; put dict(type='RandomCrop', "
                              f"size=({side}, {side})) or dict(type='Resize', scale=({side}, {side})) before PackSample into the pipeline")
        turned = images.transpose(2, 3)
        views = _four(images)
        views[:, 0] = images
        views[:, 1] = turned.flip(2)
        views[:, 2] = images.flip(2, 3)
        views[:, 3] = turned.flip(3)
        return Rotations(views, torch.arange(4, device=images.device).expand(len(images), 4))


@TRANSFORMS.register_module()
class PatchGrid(nn.Module):
    """Nine patches in a grid, of which one can tell where a neighbour lies from the centre (Doersch et al. 2015, arXiv:1505.05192).

    What would give the answer away without a look at the object is kept out (sec. 3.1 there): the gap, against lines that go on from patch
    to patch; the jitter, against counting pixels; colour, against chromatic aberration, by which a patch knows where in the picture it
    was; resampling, against knowing a patch by its sharpness. The grid stands at a random place of the image. Images come normalised:
    projecting is the paper's where the preprocessor's `std` is the same for all channels. Subtracting the mean is left to it too.

    Args:
        patch: P, pixels.
        gap: between neighbouring patches before they are moved, pixels.
        jitter: the most a patch is moved in each direction, pixels; `gap - 2 * jitter` is left between two patches at least.
        color: `drop`: of each patch a random channel stays, the others become noise with a hundredth of its standard deviation.
            `project`: every pixel loses its part along green against magenta, (-1, 2, -1). None: colours stay.
        resampled: the part of the patches that is shrunk and enlarged again, chosen anew for each batch.
        least_pixels: the fewest pixels, of P * P, that a patch is shrunk to.

    Attributes:
        least_gap: pixels that always lie between two patches.
        least_side: of the images, pixels.
    """

    def __init__(self, patch: int = 96, gap: int = 48, jitter: int = 7, color: str | None = "drop", resampled: float = 1 / 3,
                 least_pixels: int = 100) -> None:
        super().__init__()
        if patch < 1 or jitter < 0 or gap <= 2 * jitter:
            raise ValueError(f"neighbouring patches come up to twice the jitter closer, so gap must be more than {2 * jitter} for "
                             f"jitter={jitter}, both in pixels, with patch at least 1; got {patch=}, {gap=}, {jitter=}")
        if color not in (None, "drop", "project"):
            raise ValueError(f"color must be 'drop', 'project' or None, got {color!r}")
        if not 0 <= resampled <= 1 or not 1 <= least_pixels <= patch**2:
            raise ValueError(f"resampled is a part, 0 to 1, and least_pixels lies within 1 and patch * patch = {patch**2}; got "
                             f"{resampled=}, {least_pixels=}")
        self.patch = patch
        self.gap = gap
        self.jitter = jitter
        self.color = color
        self.resampled = resampled
        self.least_gap = gap - 2 * jitter
        self.least_side = 3 * patch + 2 * gap + 2 * jitter
        self.register_buffer("blur", _shrink_and_enlarge(patch, math.ceil(least_pixels**0.5)), persistent=False)     # [sides, P, P]

    def forward(self, images: Tensor) -> Patches:
        """[B, 3, H, W] to nine patches an image.

        Raises:
            ConfigError: the images are smaller than the grid, or not of three channels where colour is changed.
        """
        generator = _generator(self, images)
        offsets = self.draw_offsets(images, generator)
        patches = cut_out(images, offsets, self.patch)
        if self.color is not None and images.shape[1] != 3:
            raise ConfigError(f"color={self.color!r} needs images of three channels, got {images.shape[1]}; set color=None")
        if self.color == "drop":
            patches = drop_channels(patches, generator)
        elif self.color == "project":
            patches = project_colors(patches)
        return Patches(self._resample(patches, generator), offsets)

    def draw_offsets(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[B, 9, 2] int64: (y, x) of the top left corner of each patch, pixels."""
        batch, _, height, width = images.shape
        if min(height, width) < self.least_side:
            raise ConfigError(f"three patches of {self.patch} pixels with gaps of {self.gap}, moved by up to {self.jitter}, need images of "
                              f"at least {self.least_side}x{self.least_side} pixels, got {height}x{width}; resize to more, or set a "
                              f"smaller patch or gap")
        draw = functools.partial(torch.randint, generator=generator, device=images.device)
        corner = torch.stack([draw(0, side - self.least_side + 1, (batch,)) for side in (height, width)], -1)    # [B, 2]
        moved = draw(0, 2 * self.jitter + 1, (batch, _CELLS, 2))
        return corner[:, None] + _cells(images.device) * (self.patch + self.gap) + moved

    def gaps(self, offsets: Tensor) -> Spread:
        """Pixels between neighbouring patches: the fewest and the mean, of drawn `offsets` [B, 9, 2].

        Patches that neighbour each other across a corner are apart both ways, because each row and each column is.
        """
        grid = offsets.view(-1, 3, 3, 2)
        between = torch.cat([(grid[:, 1:, :, 0] - grid[:, :-1, :, 0]).flatten(), (grid[:, :, 1:, 1] - grid[:, :, :-1, 1]).flatten()])
        between = (between - self.patch).double()
        return Spread(between.min().item(), between.mean().item())

    def _resample(self, patches: Tensor, generator: torch.Generator | None) -> Tensor:
        """A part of the patches with fewer pixels in effect: both ways a product with a matrix that shrinks and enlarges."""
        flat = patches.flatten(0, 1)                                                                             # [B * 9, C, P, P]
        count = round(self.resampled * len(flat))
        if not count:
            return patches
        chosen = torch.randperm(len(flat), generator=generator, device=flat.device)[:count]
        side = torch.randint(len(self.blur), (count,), generator=generator, device=flat.device)
        with torch.autocast(flat.device.type, enabled=False):                                                    # data, not features
            blur = self.blur[side, None].to(flat.dtype)                                                          # [count, 1, P, P]
            flat[chosen] = blur @ flat[chosen] @ blur.mT
        return patches


@TRANSFORMS.register_module()
class JigsawTiles(nn.Module):
    """Nine tiles whose order is to be found (Noroozi and Favaro 2016, arXiv:1603.09246).

    The tiles come in their own order, with the orders that are asked: a siamese trunk sees each tile once and its *embeddings* are put
    in the T orders of the image, which is the same computation as T shuffled pictures, at the cost of one.

    Kept out, as in the paper, are: lines and hues that go on from tile to tile, by a random place of each tile in its cell; what neighbours
    have in common in brightness and contrast, by normalising each channel of each tile by its own mean and standard deviation; chromatic
    aberration, by images without colour. Images come normalised; what is grey is the weighted mean of normalised channels.

    Args:
        tile: P, pixels; a cell is a third of the image and must be larger.
        num_permutations: K, of the 9! there are, chosen to differ much, see `distant_permutations`.
        per_image: T.
        grey: the part of the images, on average, that loses its colour.
        seed: of the choice of permutations. They are part of the state dict: a checkpoint brings its own.
    """

    def __init__(self, tile: int = 64, num_permutations: int = 1000, per_image: int = 8, grey: float = 0.3, seed: int = 0) -> None:
        super().__init__()
        if min(tile, per_image) < 1 or not 0 <= grey <= 1:
            raise ValueError(f"tile and per_image must be positive, grey is a part, 0 to 1; got {tile=}, {per_image=}, {grey=}")
        self.tile = tile
        self.per_image = per_image
        self.grey = grey
        self.register_buffer("permutations", distant_permutations(num_permutations, seed))                       # [K, 9] int64

    def forward(self, images: Tensor) -> Tiles:
        """[B, 3, H, W] to nine tiles and T orders an image.

        Raises:
            ConfigError: a third of the images is not larger than a tile, or they do not have three channels.
        """
        batch, channels, height, width = images.shape
        cell = torch.tensor([height // 3, width // 3])
        if cell.min() <= self.tile:
            raise ConfigError(f"a tile of {self.tile} pixels needs room to move in its cell, a third of the image, so images of at least "
                              f"{3 * self.tile + 3}x{3 * self.tile + 3}, got {height}x{width}; resize to more, or set a smaller tile")
        if self.grey and channels != 3:
            raise ConfigError(f"grey={self.grey} needs images of three channels, got {channels}; set grey=0")
        generator = _generator(self, images)
        draw = functools.partial(torch.randint, generator=generator, device=images.device)
        moved = torch.stack([draw(0, side - self.tile + 1, (batch, _CELLS)) for side in cell.tolist()], -1)        # [B, 9, 2]
        offsets = _cells(images.device) * cell.to(images.device) + moved
        tiles = cut_out(images, offsets, self.tile)
        if self.grey:
            luma = (tiles * tiles.new_tensor(_GREY).view(3, 1, 1)).sum(2, keepdim=True)
            colorless = torch.rand(batch, generator=generator, device=images.device) < self.grey
            tiles = torch.where(colorless.view(-1, 1, 1, 1, 1), luma, tiles)
        labels = draw(0, len(self.permutations), (batch, self.per_image))
        return Tiles(standardise(tiles), self.permutations[labels], labels, offsets)


def cut_out(images: Tensor, offsets: Tensor, side: int) -> Tensor:
    """Square windows of a batch, all in one indexing.

    Args:
        images: [B, C, H, W].
        offsets: [B, N, 2] int64, (y, x) of the top left corner of each window, pixels; the windows lie within the image.
        side: P, pixels.

    Returns:
        [B, N, C, P, P], which lie in memory as the images do.
    """
    of = torch.arange(len(images), device=images.device)[:, None]
    y, x = offsets.unbind(-1)
    windows = images.unfold(2, side, 1).unfold(3, side, 1)                       # [B, C, H - P + 1, W - P + 1, P, P], all there are: a view
    return windows[of, :, y, x]


def drop_channels(patches: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Of each patch [B, N, 3, P, P] a random channel stays; noise about 0 with a hundredth of its deviation replaces the others."""
    batch, count = patches.shape[:2]
    kept = torch.randint(3, (batch, count, 1, 1, 1), generator=generator, device=patches.device)
    std = patches.std((-2, -1), keepdim=True, correction=0).gather(2, kept)                                      # [B, N, 1, 1, 1]
    noise = torch.empty_like(patches).normal_(generator=generator) * (std / 100)
    return torch.where(torch.arange(3, device=patches.device).view(3, 1, 1) == kept, patches, noise)


def project_colors(patches: Tensor) -> Tensor:
    """Every colour v of [..., 3, h, w] without its part along a, green against magenta: v - (v.a) a / (a.a)."""
    a = patches.new_tensor(_GREEN_AGAINST_MAGENTA).view(3, 1, 1)
    along = (patches * a).sum(-3, keepdim=True)
    return patches - along * (a / a.square().sum())


def standardise(tiles: Tensor) -> Tensor:
    """Each channel of each tile [..., h, w] with mean 0 and standard deviation 1; a channel without contrast becomes 0."""
    std, mean = torch.std_mean(tiles, (-2, -1), keepdim=True, correction=0)
    return torch.where(std > _FLAT, (tiles - mean) / std.clamp(min=_FLAT), 0.0)


def distant_permutations(count: int, seed: int = 0) -> Tensor:
    """[K, 9] int64: different orders of nine tiles, each of which disagrees with all before it in as many places as can be.

    Greedy as in the paper (alg. 1), by the least Hamming distance to those chosen: the first is random, then always the
    first of the farthest, in a random order of all 9!. One seed gives one set, with any version of numpy.

    Raises:
        ValueError: fewer than 2, or more than there are.
    """
    if not 2 <= count <= math.factorial(_CELLS):
        raise ValueError(f"num_permutations must be 2 to 9! = {math.factorial(_CELLS)}, got {count}")
    return torch.from_numpy(_distant_permutations(count, seed).astype(np.int64))


@functools.lru_cache(maxsize=8)
def _distant_permutations(count: int, seed: int) -> np.ndarray:
    candidates = _all_permutations()
    candidates = candidates[np.random.RandomState(seed).permutation(len(candidates))]
    places = np.ascontiguousarray(candidates.T)                                  # [9, 9!]
    chosen, distance = [0], np.full(len(candidates), _CELLS, np.uint8)           # to the nearest of the chosen
    while len(chosen) < count:
        apart = np.zeros_like(distance)
        for place, tile in zip(places, candidates[chosen[-1]], strict=True):
            apart += (place != tile).view(np.uint8)
        np.minimum(distance, apart, out=distance)
        chosen.append(int(distance.argmax()))
    return candidates[chosen]


@functools.cache
def _all_permutations() -> np.ndarray:
    return np.array(list(itertools.permutations(range(_CELLS))), np.uint8)       # [9!, 9], in order


def hamming_distances(permutations: Tensor) -> Spread:
    """In how many places two of [K, 9] disagree: the least and the mean, over all pairs."""
    apart = (permutations[:, None] != permutations).sum(-1)
    pairs = apart[~torch.eye(len(apart), dtype=torch.bool, device=apart.device)].double()
    return Spread(pairs.min().item(), pairs.mean().item())


def _cells(device: torch.device) -> Tensor:
    """[9, 2]: row and column of each cell."""
    cells = torch.arange(_CELLS, device=device)
    return torch.stack([cells // 3, cells % 3], -1)


def _four(images: Tensor) -> Tensor:
    """[B, 4, C, S, S] to be filled; as [B * 4, C, S, S] it lies in memory as `images` does."""
    batch, channels, height, width = images.shape
    if images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous():
        return images.new_empty(batch, 4, height, width, channels).movedim(-1, 2)
    return images.new_empty(batch, 4, channels, height, width)


def _generator(puzzle: nn.Module, images: Tensor) -> torch.Generator | None:
    """Torch's own in train mode; in eval mode a new one that always starts the same."""
    return None if puzzle.training else torch.Generator(images.device).manual_seed(0)


def _shrink_and_enlarge(side: int, least: int) -> Tensor:
    """[side - least + 1, side, side]: matrices that shrink `side` pixels to `least`, `least` + 1, ..., `side` and enlarge them again."""
    one = torch.eye(side).view(1, 1, side, side)

    def rows(image: Tensor, count: int) -> Tensor:
        return F.interpolate(image, (count, side), mode="bilinear", antialias=True, align_corners=False)

    return torch.cat([rows(rows(one, count), side)[0] for count in range(least, side + 1)])
