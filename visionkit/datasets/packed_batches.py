"""Batches of as many samples as fill a number of tokens, instead of a number of samples."""
from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, islice
from numbers import Integral
from typing import Any, NamedTuple

from mmengine.logging import print_log
from torch.utils.data import Sampler

from visionkit.datasets.packing import Pack, Packer, pack_all
from visionkit.datasets.sampler import Draw, DrawSampler, InfiniteDrawSampler, draw_seed
from visionkit.registry import LENGTHS, PACKERS, SAMPLERS, ConfigError

ASKED_TOGETHER = 1024                                        # draws whose lengths are asked for at once


class Place(NamedTuple):
    """What stands for a sample in a pack: where it was drawn."""
    epoch: int                                               # of the sampler: the number of its pass over the data
    position: int                                            # in the order of that epoch
    index: int                                               # in the data set


class Planned(NamedTuple):
    """What a batch was meant to hold."""
    samples: int
    tokens: int
    packs: int


@SAMPLERS.register_module()
class PackedBatchSampler(Sampler[list[Draw]]):
    """Batches of one or more packs of at most `max_tokens` tokens, around a `DrawSampler` or an `InfiniteDrawSampler`.

    Every process packs the same global order, which needs lengths but no images; of w processes, process r takes packs r, r + w, r + 2w,
    ... So the packs of a step depend neither on the number of processes nor on that of workers, and all have equally many batches.

    With a `DrawSampler` each pass over the data is packed by itself, what is open being closed at its end. A pass in another order gives
    a few packs more or fewer, but schedules count on epochs of one length; so an epoch has as many batches as the first pass needs, and
    goes on where the one before ended. Nothing is left out or repeated for it: over a training each pass still has every sample once.
    With an `InfiniteDrawSampler`, passes follow each other without closing anything.

    Where a run resumes, the packs before are made again from the lengths, so that packs that were open are not lost.

    Args:
        sampler: gives the order; the Runner gives it.
        max_tokens: of a pack.
        packer: `next_fit`, `best_fit` or `balanced`, or a packer's config with settings of its own.
        length: how long a sample is: a name or a config such as `dict(type="ImageTokens")`, or a callable (data set, draw); by default
            the data set's own method `sample_length(index)`.
        batch_size: packs a batch in this process; the loader's setting.
        filter_overlong: leave out samples that are longer than `max_tokens`; otherwise each is a pack of its own, which is above the limit.

    Raises:
        ConfigError: another kind of sampler, no samples, or none that is short enough; a setting of the wrong kind.
    """

    def __init__(self, sampler: DrawSampler | InfiniteDrawSampler, max_tokens: int, packer: str | Mapping[str, Any] = "best_fit",
                 length: str | Mapping[str, Any] | Callable[[Any, Draw], int] | None = None, batch_size: int = 1,
                 filter_overlong: bool = False) -> None:
        if not isinstance(sampler, (DrawSampler, InfiniteDrawSampler)):
            raise ConfigError(f"packs are made from the order of a DrawSampler or an InfiniteDrawSampler; the loader's sampler is a "
                              f"{type(sampler).__name__}")
        if not len(sampler.dataset):
            raise ConfigError("the data set is empty, so there is nothing to pack")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"the loader's batch_size is how many packs a batch holds, 1 or more; got {batch_size!r}")
        if not getattr(sampler, "round_up", True) and sampler.world_size > 1:
            raise ConfigError("packs are dealt out evenly, and round_up=False of the loader's sampler asks for the opposite; leave it out")
        if not isinstance(max_tokens, int) or isinstance(max_tokens, bool):
            raise ConfigError(f"max_tokens is how many tokens a pack holds at most, a whole number; got {max_tokens!r}", ("max_tokens",))
        if not isinstance(packer, (str, Mapping)):
            raise ConfigError(f"a packer is the name of one, such as 'best_fit', or its config; got {packer!r}", ("packer",))
        if isinstance(packer, Mapping) and "max_tokens" in packer:
            raise ConfigError("the limit stands once, in the batch sampler's own max_tokens; leave it out here", ("packer", "max_tokens"))
        length = {"type": length} if isinstance(length, str) else length
        self.sampler, self.batch_size, self.max_tokens, self.filter_overlong = sampler, batch_size, max_tokens, filter_overlong
        self.packer = {"type": packer} if isinstance(packer, str) else packer
        if not isinstance(filter_overlong, bool):
            raise ConfigError(f"filter_overlong is True or False, got {filter_overlong!r}", ("filter_overlong",))
        made = self._packer()                                # a wrong setting shows now
        if not isinstance(made, Packer):
            raise ConfigError(f"a packer derives from visionkit.datasets.Packer, and {type(made).__name__} does not", ("packer",))
        self.length = LENGTHS.make(length or {"type": "OwnLength"}, at="length")
        named = dict(length) if isinstance(length, Mapping) else type(self.length).__name__
        self.recipe = repr((max_tokens, dict(self.packer), named, filter_overlong))      # what packs depend on, beside the order
        self.handed_out: deque[Planned] = deque(maxlen=4096)  # batches that the loader has asked for, for a hook to take
        self._lengths: list[int] | None = None              # of each sample, where they do not depend on the draw
        self._len: int | None = None
        self._skip = 0
        self._parked: tuple[int, Iterator[Pack]] | None = None   # the number of a pack and the packs from there on

    def resume_at(self, batches: int) -> None:
        """Leave out the first `batches` batches of this process in the next iteration, and only in that one. Loads nothing."""
        if batches < 0:
            raise ValueError(f"a sampler resumes at a batch from 0 on, got {batches}")
        self._skip = batches

    def __len__(self) -> int:
        """Batches an epoch, resumed or not: as many as the first pass over the data needs."""
        if self._len is None:
            packs = [(len(pack), pack.tokens) for pack in self.packs()]
            self._len = math.ceil(len(packs) / (self.batch_size * self.sampler.world_size))
            self._tell_overlong(len(self.sampler.dataset) - sum(samples for samples, _ in packs),
                                [tokens for _, tokens in packs if tokens > self.max_tokens])
        return self._len

    def __iter__(self) -> Iterator[list[Draw]]:
        # a generator, so that nothing happens before the first batch is asked for: torch's loader makes two iterators and uses one
        skip, self._skip = self._skip, 0
        self.handed_out.clear()
        if isinstance(self.sampler, InfiniteDrawSampler):
            yield from self._batches(skip, None)
        else:
            yield from self._batches(self.sampler.epoch * len(self) + skip, max(0, len(self) - skip))

    def _batches(self, first: int, number: int | None) -> Iterator[list[Draw]]:
        step = self.batch_size * self.sampler.world_size     # packs that all processes take together
        packs = self._packs_from(first * step)
        for _ in range(number) if number is not None else count():
            mine = list(islice(packs, step))[self.sampler.rank::self.sampler.world_size]
            self.handed_out.append(Planned(sum(map(len, mine)), sum(pack.tokens for pack in mine), len(mine)))
            yield [self._draw(place) for pack in mine for place in pack.items]
        self._parked = ((first + number) * step, packs)      # an epoch goes on where the last one ended, without packing it again

    def _packs_from(self, first: int) -> Iterator[Pack]:
        parked, self._parked = self._parked, None            # it belongs to one iteration only
        if parked is not None and parked[0] == first:
            return parked[1]
        return islice(self.packs(epochs=None), first, None)

    def packs(self, first_epoch: int = 0, epochs: int | None = 1) -> Iterator[Pack]:
        """The packs of all processes, in order; each item is a `Place`. At the end of each epoch of a `DrawSampler`, and at the very end,
        what is open is closed.

        Args:
            first_epoch: of the sampler.
            epochs: how many; None: without an end.
        """
        packer = self._packer()
        for epoch in count(first_epoch) if epochs is None else range(first_epoch, first_epoch + epochs):
            last = epochs is not None and epoch == first_epoch + epochs - 1
            any_fits = False
            for pack in pack_all(self._samples(epoch), packer, self.filter_overlong, flush=last or isinstance(self.sampler, DrawSampler)):
                any_fits = True
                yield pack
            if not any_fits and not packer.open:             # else this would look for a first pack for ever
                raise ConfigError(f"no sample has {self.max_tokens} tokens or less, so filter_overlong leaves nothing; raise max_tokens, "
                                  f"or make the images smaller", ("max_tokens",))

    def _samples(self, epoch: int) -> Iterator[tuple[Place, int]]:
        places = [Place(epoch, position, index) for position, index in enumerate(self.sampler.order(epoch).tolist())]
        lengths = self.lengths()
        if lengths is not None:
            yield from ((place, lengths[place.index]) for place in places)
            return
        for start in range(0, len(places), ASKED_TOGETHER):
            some = places[start:start + ASKED_TOGETHER]
            yield from zip(some, self._ask([self._draw(place) for place in some]), strict=True)

    def lengths(self) -> list[int] | None:
        """Of each sample, in tokens; None where they depend on the draw."""
        if self._lengths is None and not getattr(self.length, "varies", lambda dataset: True)(self.sampler.dataset):
            self._lengths = self._ask(range(len(self.sampler.dataset)))
        return self._lengths

    def _ask(self, draws: Sequence[int]) -> list[int]:
        dataset = self.sampler.dataset
        if hasattr(self.length, "of_draws"):
            lengths = self.length.of_draws(dataset, draws)
        else:
            lengths = [self.length(dataset, draw) for draw in draws]
        for draw, length in zip(draws, lengths, strict=True):
            if not isinstance(length, Integral) or length < 1:
                raise ValueError(f"{type(self.length).__name__} gives sample {int(draw)} a length of {length}; a sample has 1 token or "
                                 f"more, a whole number")
        return [int(length) for length in lengths]

    def _draw(self, place: Place) -> Draw:
        return Draw(place.index, draw_seed(self.sampler.seed, place.epoch, place.position))

    def _packer(self) -> Any:
        return PACKERS.make(self.packer, at="packer", max_tokens=self.max_tokens)

    def _tell_overlong(self, left_out: int, alone: list[int]) -> None:
        if left_out or alone:
            print_log(f"{left_out or len(alone)} of {len(self.sampler.dataset)} samples are above max_tokens={self.max_tokens}: "
                      + ("they are left out" if left_out else f"each is a pack of its own, above the limit, of up to {max(alone)}"),
                      logger="current", level=logging.WARNING)
