"""Dropout of attention weights that a backward pass, a tile or another kernel can draw again: a function of the seed and the place."""
from __future__ import annotations

import torch
from torch import Tensor

_UINT32 = 0xFFFFFFFF
LEVELS = 1 << 24                                             # a probability is a whole number of these parts, in every kernel


def draw_seed(device: torch.device) -> Tensor:
    """[] int64 from PyTorch's generator of `device`, so that `torch.manual_seed` and checkpointing hold for it; does not wait for it."""
    return torch.randint(1 << 62, (), device=device)


def threshold(dropout_p: float) -> int:
    """The level below which a weight is dropped."""
    return round(dropout_p * LEVELS)


def kept(seed: Tensor, rows: Tensor, columns: Tensor, dropout_p: float) -> Tensor:
    """Which attention weights stay, with probability 1 - dropout_p each.

    Args:
        seed: [] int64.
        rows: [...] int64, a number for each query of each head and image: its place in the log-sum-exp.
        columns: [C] int64, the keys, counted from the first one of their image or sequence.

    Returns:
        [..., C] bool.
    """
    row = _mix(_mix((rows & _UINT32) ^ (seed & _UINT32)) ^ (seed >> 32))
    return (_mix(row[..., None] ^ _mix(columns)) >> 8) >= threshold(dropout_p)


def _mix(x: Tensor) -> Tensor:
    """A permutation of 32-bit numbers, held in int64, of which each output bit depends on each input bit (Wellons 2018, "lowbias32")."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _UINT32
    x = x ^ (x >> 15)
    x = (x * (0x846CA68B - (1 << 32))) & _UINT32              # the same last 32 bits, and no overflow
    return x ^ (x >> 16)
