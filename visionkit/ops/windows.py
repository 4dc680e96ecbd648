"""Windows: the pixels that the samples of a bin touch, each once, however many samples touch it.

Samples of a bin lie on a grid, so what they read is a window of rows times a window of columns, and so are the weights. Where samples are
closer than pixels, reading each pixel of the window once takes a fraction of the reads: 4x4 samples within two pixels have 64 corners, and
touch nine pixels at most. Bins differ in size, so windows lie end to end in one vector: window i is [start[i], start[i] + count[i]).
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# n bins, m samples, N entries of all windows of an axis, M reads of all bins


class AxisWindows(NamedTuple):
    """The pixels that samples touch along one axis."""

    start: Tensor       # [n] of each bin's window among all entries
    count: Tensor       # [n] its length
    bin: Tensor         # [N] whose window it is
    pixel: Tensor       # [N]
    low: Tensor         # [m] entry of the pixel at or before each sample
    high: Tensor        # [m] entry of the pixel after it, the same at the border

    def spread(self, low: Tensor, high: Tensor) -> Tensor:
        """[N], what the samples of each bin add up to if each gives `low` [m] and `high` [m] to the pixels beside it."""
        return low.new_zeros(len(self.pixel)).index_add_(0, self.low, low).index_add_(0, self.high, high)

    def without_gaps(self) -> AxisWindows:
        """These windows without the pixels that no sample touches; there are such where samples are further apart than pixels."""
        touched = torch.zeros_like(self.pixel, dtype=torch.bool)
        touched.index_fill_(0, self.low.long(), True).index_fill_(0, self.high.long(), True)
        kept = touched.nonzero()[:, 0]
        number = touched.cumsum(0, dtype=self.pixel.dtype) - 1
        start = number.index_select(0, self.start)                          # the first and the last pixel of a window are touched
        count = number.index_select(0, self.start + self.count - 1) - start + 1
        return AxisWindows(start, count, self.bin.index_select(0, kept), self.pixel.index_select(0, kept),
                           number.index_select(0, self.low), number.index_select(0, self.high))


def axis_windows(low: Tensor, high: Tensor, samples: Tensor) -> AxisWindows:
    """Windows of bins whose samples lie end to end.

    Args:
        low, high: [m] int32 or int64, the pixels beside each sample; within a bin they ascend.
        samples: [n] of each bin, at least one; their sum is m.
    """
    last = samples.cumsum(0, dtype=low.dtype) - 1
    first_pixel = low.index_select(0, last - (samples - 1))
    count = high.index_select(0, last) - first_pixel + 1
    start = count.cumsum(0, dtype=low.dtype) - count
    bin, pixel = runs(first_pixel, count)
    to_entry = (start - first_pixel).repeat_interleave(samples, output_size=len(low))
    return AxisWindows(start, count, bin, pixel, low + to_entry, high + to_entry)


class Crossing(NamedTuple):
    """Reads of bins: every entry of a bin's window of rows with every one of its window of columns."""

    y: Tensor           # [M] entry among the windows along y
    x: Tensor           # [M] entry among the windows along x
    bag: Tensor         # [M] bin that it belongs to, ascending
    starts: Tensor      # [n] first of each bin's


def cross(start_y: Tensor, count_y: Tensor, start_x: Tensor, count_x: Tensor) -> Crossing:
    """Cross the windows that begin at `start` and are `count` entries long, [n] each."""
    bag, y = runs(start_y, count_y)
    row, x = runs(start_x.index_select(0, bag), count_x.index_select(0, bag))
    reads = count_y * count_x
    return Crossing(y.index_select(0, row), x, bag.index_select(0, row), reads.cumsum(0, dtype=reads.dtype) - reads)


def runs(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Consecutive integers, `count[i]` of them from `start[i]`, end to end: which run each belongs to, and the integers."""
    owner = torch.repeat_interleave(count)
    begin = count.cumsum(0, dtype=count.dtype) - count
    return owner, torch.arange(len(owner), device=count.device, dtype=count.dtype).add_((start - begin).index_select(0, owner))
