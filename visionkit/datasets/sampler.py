"""Which image comes next, and with which random seed: both a pure function of (seed, epoch, position)."""
from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Sized

import numpy as np
import torch
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import Sampler

from visionkit.registry import SAMPLERS

_SPARE: list[np.random.MT19937] = []                         # as many as there are blocks within blocks


class Draw(int):
    """An index into a data set that carries the seed of its augmentation.

    `draw - n` and `draw % n` keep the seed, so that it survives mmengine's ConcatDataset and RepeatDataset.
    """
    seed: int

    def __new__(cls, index: int, seed: int) -> Draw:
        draw = super().__new__(cls, index)
        draw.seed = seed
        return draw

    def __reduce__(self) -> tuple[type[Draw], tuple[int, int]]:
        return Draw, (int(self), self.seed)

    def __sub__(self, other: int) -> Draw:
        return Draw(int(self) - other, self.seed)

    def __mod__(self, other: int) -> Draw:
        return Draw(int(self) % other, self.seed)

    def __repr__(self) -> str:
        return f"Draw({int(self)}, seed={self.seed})"


def draw_seed(seed: int, epoch: int, position: int) -> int:
    """The seed, below 2**32, of the draw at `position` in the global order of an epoch."""
    return int(np.random.SeedSequence((seed, epoch, position)).generate_state(1)[0])


class _Order(Sampler[Draw]):
    """What both samplers share: an epoch's global order, this process's share of it, and where to resume."""

    def __init__(self, dataset: Sized, shuffle: bool, seed: int | None) -> None:
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = sync_random_seed() if seed is None else seed
        self.rank, self.world_size = get_dist_info()
        self._skip = 0

    def resume_at(self, draws: int) -> None:
        """Leave out the first `draws` of this process's draws in the next iteration, and only in that one. Loads nothing."""
        if draws < 0:
            raise ValueError(f"a sampler resumes at a draw from 0 on, got {draws}")
        self._skip = draws

    def order(self, epoch: int) -> np.ndarray:
        """Every index once, in the order of `epoch`, the same in every process."""
        if not self.shuffle:
            return np.arange(len(self.dataset))
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset))

    def _take_skip(self) -> int:
        skip, self._skip = self._skip, 0
        return skip


@SAMPLERS.register_module()
class DrawSampler(_Order):
    """The draws of one epoch. Process r of w takes every w-th of the global order, starting at r, so that the images of a step
    do not depend on the number of processes.

    Args:
        dataset: what is drawn from; the Runner gives it.
        shuffle: a new order every epoch; without it the data set's own order.
        seed: of order and augmentation; the Runner gives its own. None: one drawn for all processes.
        round_up: repeat the first images of the order, so that every process has the same number of draws.
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int | None = None, round_up: bool = True) -> None:
        super().__init__(dataset, shuffle, seed)
        self.round_up = round_up
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; mmengine's epoch loop calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Draw]:
        order = self.order(self.epoch)
        if self.round_up and len(order):
            order = np.resize(order, math.ceil(len(order) / self.world_size) * self.world_size)
        positions = range(self.rank, len(order), self.world_size)[self._take_skip():]
        return (Draw(order[p], draw_seed(self.seed, self.epoch, p)) for p in positions)

    def __len__(self) -> int:
        """The number of this process's draws in a whole epoch, resumed or not."""
        if self.round_up:
            return math.ceil(len(self.dataset) / self.world_size)
        return len(range(self.rank, len(self.dataset), self.world_size))


@SAMPLERS.register_module()
class InfiniteDrawSampler(_Order):
    """Epoch after epoch of draws without an end, for training by iterations. Every iteration starts at draw 0 unless `resume_at`
    was called before.

    Args:
        dataset: what is drawn from; the Runner gives it.
        shuffle: a new order every epoch; without it the data set's own order.
        seed: of order and augmentation; the Runner gives its own. None: one drawn for all processes.
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int | None = None) -> None:
        super().__init__(dataset, shuffle, seed)

    def __iter__(self) -> Iterator[Draw]:
        return self._draws(self.rank + self._take_skip() * self.world_size)

    def _draws(self, position: int) -> Iterator[Draw]:
        size = len(self.dataset)
        epoch, position = divmod(position, size)
        while True:
            order = self.order(epoch)
            while position < size:
                yield Draw(order[position], draw_seed(self.seed, epoch, position))
                position += self.world_size
            epochs, position = divmod(position, size)
            epoch += epochs

    def __len__(self) -> int:
        """The number of images in the data set."""
        return len(self.dataset)


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed `random`, numpy and torch for the length of the block, and restore them afterwards; None leaves them alone."""
    if seed is None:
        yield
        return
    with generators_kept():
        seed_generators(seed)
        yield


def seed_generators(seed: int) -> None:
    """Seed `random`, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)                # torch.manual_seed would also reset every GPU


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Restore `random`, numpy and torch after the block.

    In it numpy's functions use another generator, since to read and write the state of their own takes thirty times as long, a fifth of
    the time of a small image. What its legacy functions keep in reserve, every second normal, is not restored but dropped.
    """
    states = random.getstate(), torch.get_rng_state()
    own = np.random.get_bit_generator()
    np.random.set_bit_generator(_SPARE.pop() if _SPARE else np.random.MT19937(0))
    try:
        yield
    finally:
        _SPARE.append(np.random.get_bit_generator())
        np.random.set_bit_generator(own)
        random.setstate(states[0])
        torch.set_rng_state(states[1])
