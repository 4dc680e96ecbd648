"""The weighted gather: each output row is a weighted sum of a few rows of a table. Every sampling op here is one.

Feature maps in channels-last memory are a table [pixels, C]; bilinear interpolation is a bag of four rows, a RoIAlign cell of 2x2 samples
one of sixteen. `F.embedding_bag` is that sum, threaded and vectorised, inside stock PyTorch. Its transpose, for gradients, is the same sum
again: sort the reads by the row they read, and bag the cells that read each row. No atomics, so it gives the same bits every time.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# T table rows, C channels, n bags, K reads a bag

_CACHE_BYTES = 1 << 20      # what stays in a core's own cache


def as_table(input: Tensor) -> Tensor:
    """Maps [B, C, H, W] as a table [B * H * W, C], float32 at least; without a copy where they lie channels-last in float32 or float64."""
    working = torch.promote_types(input.dtype, torch.float32)                # bfloat16 and float16 accumulate in float32
    rows = input.permute(0, 2, 3, 1)
    maps_in_cache = min(_CACHE_BYTES // max(input[:1].nbytes, 1), len(input))
    if rows.is_contiguous() or maps_in_cache < 4 or input.device.type != "cpu":
        return rows.to(working).contiguous().view(-1, input.shape[1])
    # Where the maps are many and small, as in a gradient of RoIs, each read of a transpose waits for memory. Copied to the cache first, in
    # order, it takes half the time.
    staging = input.new_empty(maps_in_cache, *input.shape[1:])
    table = torch.empty(rows.shape, dtype=working)
    for part, target in zip(input.split(maps_in_cache), table.split(maps_in_cache), strict=True):
        target.copy_(staging[:len(part)].copy_(part).permute(0, 2, 3, 1))
    return table.view(-1, input.shape[1])


def index_dtype(rows: int) -> torch.dtype:
    """Type for indices into a table of `rows` rows: 32 bits where they fit, half the bytes to compute and to sort."""
    return torch.int32 if rows < 2**31 else torch.int64


def gather(table: Tensor, reads: Tensor, weights: Tensor, starts: Tensor | None = None) -> Tensor:
    """Weighted sums [n, C] of rows of `table` [T, C]: row reads[i, k] times weights[i, k], over k.

    Args:
        table: [T, C], float32 or float64; a table whose rows do not lie one after the other is ten times as slow.
        reads: [n, K] int32 or int64, in [0, T); or [M], those of bag i from starts[i] on.
        weights: [n, K] or [M], in the type of `table`.
        starts: [n] where bags are of different sizes.
    """
    return F.embedding_bag(reads, table, starts, mode="sum", per_sample_weights=weights)


def gather_transposed(cells: Tensor, reads: Tensor, weights: Tensor, rows: int, bag: Tensor | None = None) -> Tensor:
    """Gradient [rows, C] of the table of `gather`, from the gradient `cells` [n, C] of its result.

    Args:
        cells: [n, C].
        reads, weights: as given to `gather`.
        rows: T of the table.
        bag: [M], the bag of each read, where bags are of different sizes.
    """
    if cells.shape[1] == 1 and bag is not None:                             # too little in a row to be worth a sort
        return cells.new_zeros(rows).index_add_(0, reads, cells[:, 0].index_select(0, bag).mul_(weights))[:, None]
    by_row = reads.flatten().argsort(stable=True)
    starts = F.pad(torch.bincount(reads.flatten(), minlength=rows).cumsum(0, dtype=reads.dtype), (1, 0))[:-1]
    cell = by_row.to(reads.dtype).div_(reads.shape[1], rounding_mode="floor") if bag is None else bag.index_select(0, by_row)
    return F.embedding_bag(cell, cells, starts, mode="sum", per_sample_weights=weights.flatten().index_select(0, by_row))


def gather_weights_gradient(cells: Tensor, table: Tensor, reads: Tensor, bag: Tensor | None = None) -> Tensor:
    """Gradient of the weights of `gather`, in their shape: the dot product of a bag's gradient [n, C] and each row that it read."""
    if bag is None:
        bag = torch.arange(len(reads), device=reads.device, dtype=reads.dtype).repeat_interleave(reads.shape[1])
    starts = bag.new_zeros(len(cells))                                       # not looked at where the bag of each read is known
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(cells, table, reads.flatten(), starts, bag, 0, -1).view(reads.shape)
