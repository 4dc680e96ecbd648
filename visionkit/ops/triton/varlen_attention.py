"""`varlen_attention` on CUDA, by the kernels in `attention.py`."""
from __future__ import annotations

import math

import torch
from torch import Tensor

from visionkit.ops.triton.attention import Settings, attend, attend_backward


def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seed: Tensor | None, max_seqlen_q: int,
            max_seqlen_k: int, scale: float, dropout_p: float, left: int, right: int) -> tuple[Tensor, Tensor]:
    """As `visionkit::varlen_attention`; rows that the borders or `max_seqlen_q` leave out are as those that see no key."""
    output = q.new_zeros(*q.shape[:2], v.shape[2])
    logsumexp = q.new_full((q.shape[1], q.shape[0]), math.inf, dtype=torch.float32)
    settings = Settings(seed, scale, dropout_p, left, right, borders_q=cu_seqlens_q.contiguous(), borders_k=cu_seqlens_k.contiguous())
    attend(*map(_heads_first, (q, k, v, output)), logsumexp[None], settings, len(cu_seqlens_q) - 1, max_seqlen_q)
    return output, logsumexp


def backward(grad: Tensor, grad_logsumexp: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
             output: Tensor, logsumexp: Tensor, seed: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, scale: float, dropout_p: float,
             left: int, right: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `visionkit::varlen_attention_backward`."""
    gradients = tuple(torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v))   # of what is left out
    settings = Settings(seed, scale, dropout_p, left, right, borders_q=cu_seqlens_q.contiguous(), borders_k=cu_seqlens_k.contiguous())
    attend_backward(_heads_first(grad), -grad_logsumexp.contiguous()[None], *map(_heads_first, (q, k, v, output)), logsumexp[None],
                    *map(_heads_first, gradients), settings, len(cu_seqlens_q) - 1, max_seqlen_q, max_seqlen_k)
    return gradients


def _heads_first(tensor: Tensor) -> Tensor:
    """[T, H, D] as [1, H, T, D], a view."""
    return tensor.transpose(0, 1)[None]
