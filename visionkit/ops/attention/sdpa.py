"""PyTorch's own attention, told of a band of visible keys in the cheapest way that it understands."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_MATRIX = 256 << 20                                   # bytes of scores and of a mask that PyTorch's attention may keep


def banded_sdpa(query: Tensor, key: Tensor, value: Tensor, left: int, right: int, *, top_left: bool = False, dropout_p: float = 0.0,
                scale: float | None = None) -> Tensor:
    """`F.scaled_dot_product_attention` where a query sees `left` and `right` keys beside the one it is aligned with, -1 for all.

    Args:
        query: [B, H, N, D].
        key: [B, H_kv, M, D].
        value: [B, H_kv, M, D_v].
        top_left: the first query is aligned with the first key, instead of the last with the last.

    Returns:
        [B, H, N, D_v], 0 for queries that see no key.
    """
    queries, keys = query.shape[2], key.shape[2]
    offset = 0 if top_left else keys - queries
    left, right = _where_they_hide(queries, keys, left, right, offset)
    if left < 0 and right == 0 and offset < 0:               # the first queries see nothing; the others are aligned with the keys
        seeing = banded_sdpa(query[:, :, -offset:], key, value, left, right, dropout_p=dropout_p, scale=scale)
        return F.pad(seeing, (0, 0, -offset, 0))
    mask = None
    causal = left < 0 and right == 0 and offset == 0         # PyTorch's alignment
    if not causal and (left >= 0 or right >= 0):
        mask = visible(queries, keys, left, right, offset, query.device)
    return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, causal, scale=scale,
                                          enable_gqa=query.shape[1] != key.shape[1])


def as_sdpa_knows(queries: int, keys: int, left: int, right: int, top_left: bool) -> bool:
    """Whether PyTorch's attention needs no mask for this band."""
    offset = 0 if top_left else keys - queries
    left, right = _where_they_hide(queries, keys, left, right, offset)
    return left < 0 and (right < 0 or (right == 0 and offset <= 0))


def kept_by_sdpa(query: Tensor, key: Tensor, value: Tensor, left: int, right: int, *, top_left: bool = False,
                 dropout_p: float = 0.0) -> tuple[int, str]:
    """Bytes that grow with queries x keys in `banded_sdpa`, and what they hold: a mask, which is copied into numbers to add, and all scores
    where the kernel for CPUs does not know what is asked."""
    queries, keys = query.shape[2], key.shape[2]
    size, reasons = 0, []
    if not as_sdpa_knows(queries, keys, left, right, top_left):
        size += queries * keys * (1 + query.element_size())
        reasons.append("a mask for this causal or window")
    if query.device.type == "cpu" and (dropout_p or query.shape[3] != value.shape[3]):
        size += query.shape[0] * query.shape[1] * queries * keys * query.element_size()
        reasons.append(f"all scores for {'dropout' if dropout_p else 'values of another width than keys'}")
    return size, " and ".join(reasons)


def _where_they_hide(queries: int, keys: int, left: int, right: int, offset: int) -> tuple[int, int]:
    """`left` and `right`, -1 where no key is hidden by them."""
    if offset + right >= keys - 1:                           # the first query sees to the last key
        right = -1
    if queries - 1 + offset - left <= 0:                     # the last query sees to the first key
        left = -1
    return left, right


def visible(queries: int, keys: int, left: int, right: int, offset: int, device: torch.device) -> Tensor:
    """Which keys each query sees, [N, M] bool: those from i + offset - left to i + offset + right."""
    row, column = torch.arange(queries, device=device)[:, None] + offset, torch.arange(keys, device=device)
    if left < 0:
        return column <= row + right if right >= 0 else torch.ones(queries, keys, dtype=torch.bool, device=device)
    seen = column >= row - left
    return seen & (column <= row + right) if right >= 0 else seen
