"""Attention within each of several sequences that stand in one tensor, with flash-attn's interface."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# T query and S key tokens of all sequences, H heads of D channels, H_kv heads of keys and values


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int | None = None,
                     max_seqlen_k: int | None = None, dropout_p: float = 0.0, softmax_scale: float | None = None,
                     causal: bool = False) -> Tensor:
    """Queries [T, H, D] of each sequence read keys and values [S, H_kv, D] of the same sequence; [T, H, D]."""
    outputs = []
    for queries, keys, values in zip(_split(q, cu_seqlens_q), _split(k, cu_seqlens_k), _split(v, cu_seqlens_k), strict=True):
        heads_first = (tensor.transpose(0, 1)[None] for tensor in (queries, keys, values))
        outputs.append(F.scaled_dot_product_attention(*heads_first, dropout_p=dropout_p, scale=softmax_scale)[0].transpose(0, 1))
    return torch.cat(outputs)


def _split(tokens: Tensor, borders: Tensor) -> tuple[Tensor, ...]:
    return tokens.split(borders.diff().tolist())
