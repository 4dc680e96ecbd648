"""Filling packs of at most so many tokens with whole samples of different lengths, as they come."""
from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from visionkit.registry import PACKERS


@dataclass
class Pack:
    """Samples that go through the model together; `items` is whatever stands for them, `lengths` their tokens."""
    items: list[Any] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    tokens: int = 0                                          # the sum of the lengths

    def add(self, item: Any, length: int) -> None:
        """Put a sample in."""
        self.items.append(item)
        self.lengths.append(length)
        self.tokens += length

    def take(self, place: int) -> tuple[Any, int]:
        """Take the sample at `place` out; it and its length."""
        length = self.lengths.pop(place)
        self.tokens -= length
        return self.items.pop(place), length

    def __len__(self) -> int:
        """How many samples."""
        return len(self.items)


class Packer(ABC):
    """Takes one sample after the other and gives back packs that are done; a sample is in exactly one pack, and no pack is above the limit.

    What is open lies in `open`, in the order in which the packs were opened, unless a subclass says otherwise.

    Args:
        max_tokens: of a pack.
    """

    def __init__(self, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens is how many tokens a pack holds at most, 1 or more; got {max_tokens}")
        self.max_tokens = max_tokens
        self.open: list[Pack] = []

    def add(self, item: Any, length: int) -> list[Pack]:
        """Put a sample into a pack, and return the packs that are done by that.

        Raises:
            ValueError: the sample has no tokens or more than a pack holds; `pack_all` knows what to do with those.
        """
        if not 0 < length <= self.max_tokens:
            raise ValueError(f"a sample of a pack has 1 to max_tokens={self.max_tokens} tokens, got {length}")
        return self._add(item, length)

    @abstractmethod
    def _add(self, item: Any, length: int) -> list[Pack]:
        """`add`, for a length that fits."""

    def flush(self) -> list[Pack]:
        """Every pack that is still open; the packer is empty afterwards."""
        done, self.open = self.open, []
        return done

    def state_dict(self) -> dict[str, Any]:
        """What is open, in plain lists."""
        return {"open": [[list(pack.items), list(pack.lengths)] for pack in self.open]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.open = [Pack(list(items), list(lengths), sum(lengths)) for items, lengths in state["open"]]

    def _tightest(self, length: int) -> Pack | None:
        """The fullest open pack with room for `length`; of equal ones the first."""
        room, tightest = self.max_tokens - length, None
        for pack in self.open:
            if pack.tokens <= room and (tightest is None or pack.tokens > tightest.tokens):
                tightest = pack
        return tightest


@PACKERS.register_module(["next_fit", "NextFit"])
class NextFit(Packer):
    """One open pack: a sample that does not fit closes it and begins the next. Samples stay in their order.

    Args:
        max_tokens: of a pack.
    """

    def _add(self, item: Any, length: int) -> list[Pack]:
        done = self.flush() if self.open and self.open[0].tokens + length > self.max_tokens else []
        if not self.open:
            self.open = [Pack()]
        self.open[0].add(item, length)
        return done


@PACKERS.register_module(["best_fit", "BestFit"])
class BestFit(Packer):
    """A few open packs: a sample goes where the least room is left that it fits in. A pack is done when a further sample has filled it to
    the threshold, or when one fits nowhere: then the fullest makes place for it.

    Args:
        max_tokens: of a pack.
        num_open_buckets: packs that are open at most.
        fill_threshold: the part of `max_tokens` from which on a pack is full.
    """

    def __init__(self, max_tokens: int, num_open_buckets: int = 4, fill_threshold: float = 0.95) -> None:
        super().__init__(max_tokens)
        if num_open_buckets < 1 or not 0 < fill_threshold <= 1:
            raise ValueError(f"num_open_buckets is 1 or more and fill_threshold above 0 and at most 1; got {num_open_buckets=}, "
                             f"{fill_threshold=}")
        self.num_open_buckets, self.fill_threshold = num_open_buckets, fill_threshold
        self.full = int(max_tokens * fill_threshold)         # tokens

    def _add(self, item: Any, length: int) -> list[Pack]:
        pack = self._tightest(length)
        if pack is not None:
            pack.add(item, length)
            if pack.tokens < self.full:
                return []
            self.open = [other for other in self.open if other is not pack]
            return [pack]
        fresh = Pack([item], [length], length)
        if len(self.open) < self.num_open_buckets:
            self.open.append(fresh)
            return []
        place = max(range(len(self.open)), key=lambda i: self.open[i].tokens)
        done, self.open[place] = self.open[place], fresh
        return [done]


@PACKERS.register_module(["balanced", "Balanced"])
class Balanced(Packer):
    """Several open packs that are kept about as full as each other, for steps and processes that take equally long. A sample goes where the
    least room is left that it fits in; when it fits nowhere, samples move between the longest and the shortest pack until that no longer
    helps, and the oldest is done. Before all that are open are given out, they are evened out in the same way.

    Args:
        max_tokens: of a pack.
        num_buckets: packs that are open at most.
        max_swap_iters: moves and exchanges of samples, each time packs are done.
        min_gain: an exchange of two samples must narrow the gap between two packs by more tokens than these; a gap of so many is left.
    """

    def __init__(self, max_tokens: int, num_buckets: int = 8, max_swap_iters: int = 200, min_gain: int = 1) -> None:
        super().__init__(max_tokens)
        if num_buckets < 1 or max_swap_iters < 0 or min_gain < 0:
            raise ValueError(f"num_buckets is 1 or more, max_swap_iters and min_gain 0 or more; got {num_buckets=}, {max_swap_iters=}, "
                             f"{min_gain=}")
        self.num_buckets, self.max_swap_iters, self.min_gain = num_buckets, max_swap_iters, min_gain

    def _add(self, item: Any, length: int) -> list[Pack]:
        pack = self._tightest(length)
        if pack is not None:
            pack.add(item, length)
            return []
        done = []
        if len(self.open) == self.num_buckets:
            self._balance()
            done = [self.open.pop(0)]
        self.open.append(Pack([item], [length], length))
        return done

    def flush(self) -> list[Pack]:
        self._balance()
        return super().flush()

    def _balance(self) -> None:
        for _ in range(self.max_swap_iters if self.open else 0):
            longest, shortest = max(self.open, key=lambda pack: pack.tokens), min(self.open, key=lambda pack: pack.tokens)
            if longest.tokens - shortest.tokens <= self.min_gain:
                return
            if not (self._move(longest, shortest) or self._exchange(longest, shortest)):
                return

    def _move(self, longest: Pack, shortest: Pack) -> bool:
        """Give the shortest pack the sample that narrows the gap most. A length x makes |gap - 2x| of it, so it must be below the gap, and
        what receives it stays below the longest."""
        gap = longest.tokens - shortest.tokens
        places = [place for place, length in enumerate(longest.lengths) if length < gap]
        if not places:
            return False
        shortest.add(*longest.take(min(places, key=lambda place: abs(gap - 2 * longest.lengths[place]))))
        return True

    def _exchange(self, longest: Pack, shortest: Pack) -> bool:
        """Exchange the two samples whose lengths differ by the nearest to half of the gap, each taking the other's place in its pack; of
        equal pairs the one that comes first in the longest pack, then in the shortest."""
        gap = longest.tokens - shortest.tokens
        givers = sorted(range(len(longest)), key=longest.lengths.__getitem__)    # of equally long ones the first stays first
        lengths = [longest.lengths[place] for place in givers]
        pairs = []                                           # (the gap that would be left, place in the longest, place in the shortest)
        for other, length in enumerate(shortest.lengths):
            above = bisect_left(lengths, length + gap / 2)
            below = bisect_left(lengths, lengths[above - 1]) if above else above
            pairs += [(abs(gap - 2 * (lengths[i] - length)), givers[i], other) for i in (below, above) if i < len(lengths)]
        left, mine, other = min(pairs)
        if left + self.min_gain >= gap:
            return False
        for ours, theirs in ((longest.items, shortest.items), (longest.lengths, shortest.lengths)):
            ours[mine], theirs[other] = theirs[other], ours[mine]
        longest.tokens, shortest.tokens = sum(longest.lengths), sum(shortest.lengths)
        return True


def pack_all(samples: Iterable[tuple[Any, int]], packer: Packer, filter_overlong: bool = False, *, flush: bool = True) -> Iterator[Pack]:
    """Pack a stream of samples, those included that are longer than a pack.

    Args:
        samples: (item, length) of each; lengths of 1 or more.
        packer: what is open in it already is filled up.
        filter_overlong: leave out what is longer than `packer.max_tokens`; otherwise it is a pack of its own, after those that are open.
        flush: give out at the end what is still open.
    """
    for item, length in samples:
        if length <= packer.max_tokens:
            yield from packer.add(item, length)
        elif not filter_overlong:
            yield from packer.flush()
            yield Pack([item], [length], length)
    if flush:
        yield from packer.flush()
