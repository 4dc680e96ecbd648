"""`flash_attention` on CUDA, by the kernels in `attention.py`."""
from __future__ import annotations

import torch
from torch import Tensor

from visionkit.ops.triton.attention import Settings, attend, attend_backward


def forward(query: Tensor, key: Tensor, value: Tensor, seed: Tensor | None, alibi_slopes: Tensor | None, block_mask: Tensor | None,
            scale: float, dropout_p: float, left: int, right: int, top_left: bool, softcap: float,
            block_size: int) -> tuple[Tensor, Tensor]:
    """As `visionkit::flash_attention`."""
    output = query.new_empty(*query.shape[:3], value.shape[3])
    logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
    settings = Settings(seed, scale, dropout_p, left, right, top_left, softcap, _slopes(alibi_slopes, query), _contiguous(block_mask),
                        block_size)
    attend(query, key, value, output, logsumexp, settings, query.shape[0], query.shape[2])
    return output, logsumexp


def backward(grad: Tensor, grad_logsumexp: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor,
             seed: Tensor | None, alibi_slopes: Tensor | None, block_mask: Tensor | None, scale: float, dropout_p: float, left: int,
             right: int, top_left: bool, softcap: float, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `visionkit::flash_attention_backward`."""
    gradients = tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value))
    settings = Settings(seed, scale, dropout_p, left, right, top_left, softcap, _slopes(alibi_slopes, query), _contiguous(block_mask),
                        block_size)
    attend_backward(grad, -grad_logsumexp.contiguous(), query, key, value, output, logsumexp, *gradients, settings, query.shape[0],
                    query.shape[2], key.shape[2])
    return gradients


def _slopes(alibi_slopes: Tensor | None, query: Tensor) -> Tensor | None:
    return None if alibi_slopes is None else alibi_slopes.float().expand(query.shape[:2]).contiguous()


def _contiguous(block_mask: Tensor | None) -> Tensor | None:
    return None if block_mask is None else block_mask.contiguous()
