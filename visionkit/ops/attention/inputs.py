"""What all forms of attention check of their queries, keys and values, and how they read `causal` and `window`."""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate

import torch
from torch import Tensor


def check_heads_first(query: Tensor, key: Tensor, value: Tensor, *, grouped: bool = True) -> None:
    """Raise a ValueError unless these are [B, H, N, D], [B, H_kv, M, D] and [B, H_kv, M, D_v], alike in type and device."""
    for name, tensor, letters in (("query", query, "B, H, N, D"), ("key", key, "B, H_kv, M, D"), ("value", value, "B, H_kv, M, D_v")):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [{letters}], heads before tokens, got {list(tensor.shape)}")
    _check_alike(query, key, value)
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"query [B, H, N, D] and key [B, H_kv, M, D] must have the same B and D, got {list(query.shape)} and "
                         f"{list(key.shape)}")
    if not query.shape[3]:
        raise ValueError(f"queries and keys must have at least one channel, got {list(query.shape)} and {list(key.shape)}")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"key and value must be the same tokens of the same heads, got {list(key.shape)} and {list(value.shape)}")
    _check_groups(query.shape[1], key.shape[1], grouped)


def check_packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, grouped: bool = True) -> None:
    """Raise a ValueError unless these are [T, H, D], [S, H_kv, D] and [S, H_kv, D_v] with the borders of as many sequences."""
    for name, tensor, letters in (("q", q, "T, H, D"), ("k", k, "S, H_kv, D"), ("v", v, "S, H_kv, D_v")):
        if tensor.ndim != 3:
            raise ValueError(f"{name} must be [{letters}], the sequences one after the other, got {list(tensor.shape)}")
    _check_alike(q, k, v)
    if q.shape[2] != k.shape[2] or k.shape[:2] != v.shape[:2]:
        raise ValueError(f"q [T, H, D] and k [S, H_kv, D] must have the same D, k and v [S, H_kv, D_v] the same tokens and heads, got "
                         f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}")
    if not q.shape[2]:
        raise ValueError(f"q and k must have at least one channel, got {list(q.shape)} and {list(k.shape)}")
    _check_groups(q.shape[1], k.shape[1], grouped)
    for name, borders in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(borders, Tensor):
            raise ValueError(f"{name} must be a tensor of int32, [0, ..., number of tokens], got a {type(borders).__name__}")
        if borders.dtype != torch.int32 or borders.ndim != 1 or not len(borders):
            raise ValueError(f"{name} must be one row of int32, [0, ..., number of tokens], got {borders.dtype} {list(borders.shape)}")
        if borders.device != q.device:
            raise ValueError(f"q is on {q.device}, {name} on {borders.device}; move one")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(f"queries and keys must be as many sequences, got {len(cu_seqlens_q) - 1} and {len(cu_seqlens_k) - 1}")


def check_lengths(name: str, lengths: Sequence[int] | None, tensor: Tensor, cu_seqlens: Tensor, longest: int | None = None) -> None:
    """Raise a ValueError unless sequences of these lengths fill the tokens `name`, [T, ...], and are those of `cu_seqlens`, which is
    compared on the CPU only; nor where `longest` falls short of one. Without lengths nothing is checked."""
    if lengths is None:
        return
    if sum(lengths) != len(tensor) or min(lengths, default=0) < 0:
        raise ValueError(f"sequences of the lengths {list(lengths)} do not fill the {len(tensor)} tokens of {name}; cu_seqlens must begin "
                         f"with 0, never fall and end with the number of tokens")
    if len(lengths) != len(cu_seqlens) - 1:
        raise ValueError(f"lengths_{name} and cu_seqlens_{name} must be as many sequences, got {len(lengths)} and {len(cu_seqlens) - 1}")
    if longest is not None and longest < max(lengths, default=0):
        raise ValueError(f"max_seqlen_{name} must be {max(lengths)}, the longest sequence of {name}, or more, got {longest}")
    if cu_seqlens.device.type != "cpu" or type(cu_seqlens) is not Tensor or torch.compiler.is_compiling():     # numbers that are not here
        return
    borders = list(accumulate(lengths, initial=0))
    if not torch.equal(cu_seqlens, torch.tensor(borders, dtype=cu_seqlens.dtype)):
        raise ValueError(f"cu_seqlens_{name} must be {borders} for sequences of the lengths {list(lengths)}, got {cu_seqlens.tolist()}; "
                         f"leave lengths_{name} out where they are of others")


def _check_alike(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("keys", key), ("values", value)):
        if tensor.device != query.device:
            raise ValueError(f"the queries are on {query.device}, the {name} on {tensor.device}; move one")
        if tensor.dtype != query.dtype:
            raise ValueError(f"the queries are {query.dtype}, the {name} {tensor.dtype}; cast one, or use torch.autocast")
    if not query.is_floating_point():
        raise ValueError(f"attention is for floating tensors, got {query.dtype}")


def _check_groups(heads: int, key_heads: int, grouped: bool) -> None:
    if grouped and (not key_heads or heads % key_heads):
        raise ValueError(f"the number of query heads must be a multiple of the number of key heads, got {heads} and {key_heads}")
    if not grouped and heads != key_heads:
        raise ValueError(f"queries and keys must have as many heads, got {heads} and {key_heads}; repeat_interleave those of the keys")


def check_dropout(dropout_p: float) -> None:
    """Raise a ValueError unless this is a probability below 1."""
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")


def check_softcap(softcap: float) -> None:
    """Raise a ValueError unless this is positive, or 0 for none."""
    if not softcap >= 0:
        raise ValueError(f"softcap must be positive, or 0 for none, got {softcap}")


def in_autocast_type(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, which does not know our ops: the tensors in its type, as it hands them to PyTorch's own attention."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Products of float32 stay in float32; nothing to do where a kind of device, such as meta, has no autocast, or it is not on."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def band(causal: bool | str, window: tuple[int, int] | None) -> tuple[int, int, bool]:
    """How many keys a query sees to the left and to the right of the one that it is aligned with, -1 for all; and whether the first query
    is aligned with the first key (top left), or the last with the last (bottom right, as in flash-attn)."""
    if causal not in (False, True, "bottom_right", "top_left"):
        raise ValueError(f"causal must be False, True, 'bottom_right' (which is what True means) or 'top_left', got {causal!r}")
    window = (-1, -1) if window is None else window
    if not isinstance(window, Sequence) or len(window) != 2 or not all(isinstance(keys, int) and keys >= -1 for keys in window):
        raise ValueError(f"window is (keys to the left, keys to the right), -1 for all, got {window!r}; (3, 3) is three on either side")
    left, right = window
    return left, 0 if causal else right, causal == "top_left"
