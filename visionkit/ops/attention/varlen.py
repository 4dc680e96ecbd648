"""Attention within each of several sequences that stand in one tensor, with flash-attn's interface."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visionkit.ops import tiers
from visionkit.ops.attention import sdpa
from visionkit.ops.attention.dropout import draw_seed
from visionkit.ops.attention.flash import (
    Dropout,
    Scores,
    attend,
    attend_backward,
    fits_kernels,
    flash_attention,
    group_heads,
    no_second_derivative,
)
from visionkit.ops.attention.inputs import band, check_dropout, check_lengths, check_packed, in_autocast_type
from visionkit.ops.attention.sdpa import banded_sdpa, kept_by_sdpa
from visionkit.ops.tiers import kernels

# T query and S key tokens of all sequences, H heads of D channels, H_kv heads of keys and values, of D and D_v channels


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int | None = None,
                     max_seqlen_k: int | None = None, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
                     window_size: tuple[int, int] = (-1, -1), *, lengths_q: Sequence[int] | None = None,
                     lengths_k: Sequence[int] | None = None) -> Tensor:
    """Softmax attention of the queries of each sequence on the keys of the same one.

    On a GPU a Triton kernel, or flash-attn where it is installed, takes all sequences at once; elsewhere each is a call of PyTorch's
    `scaled_dot_product_attention`, on views. A query that sees no key reads 0.

    Borders on a GPU are not read, so only lengths in Python are checked there: without them, tokens that `cu_seqlens` or a `max_seqlen`
    leave out read 0 and have a gradient of 0 in the Triton kernels, without an error.

    Args:
        q: [T, H, D], the sequences one after the other.
        k: [S, H_kv, D]; H is a multiple of H_kv, and query head h reads key head h // (H / H_kv).
        v: [S, H_kv, D_v].
        cu_seqlens_q: int32 [n + 1], where each sequence of queries begins, and where the last one ends; a sequence may be empty.
        cu_seqlens_k: the same of the keys.
        max_seqlen_q: the longest sequence, or more; kernels wait for the device to learn it where it is not given.
        max_seqlen_k: the same of the keys.
        dropout_p: of the attention weights.
        softmax_scale: of the scores, D^-0.5 by default.
        causal: a query sees no later key; the last query of a sequence is aligned with its last key (bottom right).
        window_size: (left, right), how many keys a query sees on either side of the one it is aligned with; -1 for all.
        lengths_q: those of the sequences, as Python numbers, such as `PackedSequence.lengths`, so that nothing need be read off
            `cu_seqlens_q`, which waits for the device.
        lengths_k: the same of the keys; `lengths_q` by default where both have the same `cu_seqlens`, the very tensor.

    Returns:
        [T, H, D_v] in the type of the inputs.

    Raises:
        ValueError: arguments that do not fit together.
        RuntimeError: a second derivative is asked for, of a kernel on a GPU or in a compiled program.
    """
    q, k, v = in_autocast_type(q, k, v)
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    check_dropout(dropout_p)
    left, right, top_left = band(causal, window_size)
    if top_left:
        raise ValueError("varlen_attention aligns the last query of a sequence with its last key, got causal='top_left'; pass True, or "
                         "call attention for each sequence")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if lengths_k is None and cu_seqlens_k is cu_seqlens_q:
        lengths_k = lengths_q
    chosen = tiers.tier("varlen_attention", q.device, q.dtype).name
    if not fits_kernels(q, v):
        chosen = "portable"
    by_sequence = chosen == "portable" and not torch.compiler.is_compiling() and not q.is_meta
    if by_sequence:
        lengths_q, lengths_k = _lengths(cu_seqlens_q, cu_seqlens_k, lengths_q, lengths_k)
    check_lengths("q", lengths_q, q, cu_seqlens_q, max_seqlen_q)
    check_lengths("k", lengths_k, k, cu_seqlens_k, max_seqlen_k)
    if by_sequence:
        return _by_sequence(q, k, v, lengths_q, lengths_k, dropout_p, scale, left, right)
    max_seqlen_q = _longest(q, cu_seqlens_q, lengths_q, max_seqlen_q)
    max_seqlen_k = _longest(k, cu_seqlens_k, lengths_k, max_seqlen_k)
    if chosen == "flash_attn" and v.shape[2] == q.shape[2]:
        from flash_attn import flash_attn_varlen_func
        return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, scale,
                                      causal=bool(causal), window_size=(left, right))
    seed = draw_seed(q.device) if dropout_p else None
    return torch.ops.visionkit.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, seed, max_seqlen_q, max_seqlen_k, scale, dropout_p,
                                                left, right)[0]


def _lengths(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, lengths_q: Sequence[int] | None,
             lengths_k: Sequence[int] | None) -> tuple[list[int], list[int]]:
    of_queries = cu_seqlens_q.diff().tolist() if lengths_q is None else list(lengths_q)
    if lengths_k is None and cu_seqlens_k is cu_seqlens_q:
        return of_queries, of_queries
    return of_queries, cu_seqlens_k.diff().tolist() if lengths_k is None else list(lengths_k)


def _longest(tokens: Tensor, cu_seqlens: Tensor, lengths: Sequence[int] | None, longest: int | None) -> int:
    if longest is not None:
        return longest
    if lengths is not None:
        return max(lengths, default=0)
    if cu_seqlens.is_meta:                                   # which hold no numbers
        return len(tokens)
    return int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0


def _by_sequence(q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int], dropout_p: float, scale: float, left: int,
                 right: int) -> Tensor:
    """A call of SDPA for each sequence: on a CPU faster than a padded batch, a mask of all, or nested tensors. Long ones of which it would
    keep a large matrix go to tiles, as in `attention`."""
    heads_first = (tensor.transpose(0, 1).split(lengths, 1) for tensor, lengths in ((q, lengths_q), (k, lengths_k), (v, lengths_k)))
    outputs = []
    for sequence in zip(*heads_first, strict=True):
        query, key, value = (tensor[None] for tensor in sequence)
        if kept_by_sdpa(query, key, value, left, right, dropout_p=dropout_p)[0] > sdpa.LARGEST_MATRIX:
            output = flash_attention(query, key, value, scale=scale, window=(left, right), dropout_p=dropout_p)
        else:
            output = banded_sdpa(query, key, value, left, right, dropout_p=dropout_p, scale=scale)
        outputs.append(output[0].transpose(0, 1))
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat(outputs) if outputs else q.new_zeros(0, q.shape[1], v.shape[2])


@torch.library.custom_op("visionkit::varlen_attention", mutates_args=())
def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seed: Tensor | None, max_seqlen_q: int,
                      max_seqlen_k: int, scale: float, dropout_p: float, left: int, right: int) -> tuple[Tensor, Tensor]:
    if fits_kernels(q, v) and (triton := kernels("varlen_attention", q)):
        return triton.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, seed, max_seqlen_q, max_seqlen_k, scale, dropout_p, left, right)
    output, logsumexp = _results(q, v)
    sequences = _sequences(q, k, cu_seqlens_q, cu_seqlens_k, seed, scale, dropout_p, left, right)
    grouped = [_grouped(tensor, k.shape[1]) for tensor in (q, output)]
    for of_q, of_k, scores, dropout in sequences:
        query, out = (tensor[..., of_q, :] for tensor in grouped)
        key, value = (tensor[of_k].transpose(0, 1)[None] for tensor in (k, v))
        attend(query, key, value, scores, dropout, out, group_heads(logsumexp[None, :, of_q], k.shape[1]))
    return output, logsumexp


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[1], q.shape[0], dtype=wide)


def _grouped(tensor: Tensor, key_heads: int) -> Tensor:
    """[T, H, D] as [1, K, G, T, D], a view."""
    return group_heads(tensor.transpose(0, 1)[None], key_heads)


def _sequences(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seed: Tensor | None, scale: float, dropout_p: float,
               left: int, right: int) -> list[tuple[slice, slice, Scores, Dropout | None]]:
    """Of each sequence: its queries, its keys, its scores and dropout."""
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    check_lengths("q", lengths_q, q, cu_seqlens_q)
    check_lengths("k", lengths_k, k, cu_seqlens_k)
    first_rows = (torch.arange(q.shape[1], device=q.device) * len(q)).view(1, k.shape[1], -1)
    sequences, start_q, start_k = [], 0, 0
    for queries, keys in zip(lengths_q, lengths_k, strict=True):
        dropout = None if seed is None else Dropout(seed, dropout_p, first_rows + start_q)
        sequences.append((slice(start_q, start_q + queries), slice(start_k, start_k + keys),
                          Scores(scale, left, right, keys - queries), dropout))
        start_q, start_k = start_q + queries, start_k + keys
    return sequences


@_varlen_attention.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, seed, max_seqlen_q, max_seqlen_k, scale, dropout_p, left, right):
    return _results(q, v)


@torch.library.custom_op("visionkit::varlen_attention_backward", mutates_args=())
def _varlen_attention_backward(grad: Tensor, grad_logsumexp: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor,
                               cu_seqlens_k: Tensor, output: Tensor, logsumexp: Tensor, seed: Tensor | None, max_seqlen_q: int,
                               max_seqlen_k: int, scale: float, dropout_p: float, left: int,
                               right: int) -> tuple[Tensor, Tensor, Tensor]:
    if fits_kernels(q, v) and (triton := kernels("varlen_attention", q)):
        return triton.backward(grad, grad_logsumexp, q, k, v, cu_seqlens_q, cu_seqlens_k, output, logsumexp, seed, max_seqlen_q,
                               max_seqlen_k, scale, dropout_p, left, right)
    grad_q = torch.zeros_like(q, dtype=logsumexp.dtype, memory_format=torch.contiguous_format)
    grad_k, grad_v = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (k, v))
    of_queries = [_grouped(tensor, k.shape[1]) for tensor in (grad, q, output, grad_q)]
    of_rows = [group_heads(tensor[None], k.shape[1]) for tensor in (grad_logsumexp, logsumexp)]
    for of_q, of_k, scores, dropout in _sequences(q, k, cu_seqlens_q, cu_seqlens_k, seed, scale, dropout_p, left, right):
        gradient, query, out, grad_query = (tensor[..., of_q, :] for tensor in of_queries)
        grad_lse, lse = (tensor[..., of_q] for tensor in of_rows)
        key, value, grad_key, grad_value = (tensor[of_k].transpose(0, 1)[None] for tensor in (k, v, grad_k, grad_v))
        attend_backward(gradient, grad_lse, query, key, value, scores, dropout, out, lse, grad_query, grad_key, grad_value)
    return grad_q.to(q.dtype), grad_k, grad_v


@_varlen_attention_backward.register_fake
def _(grad, grad_logsumexp, q, k, v, cu_seqlens_q, cu_seqlens_k, output, logsumexp, seed, max_seqlen_q, max_seqlen_k, scale, dropout_p,
      left, right):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v))


def _save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, seed, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_k, *output, seed)


def _backward(ctx, grad: Tensor, grad_logsumexp: Tensor) -> tuple:
    gradients = torch.ops.visionkit.varlen_attention_backward(grad, grad_logsumexp, *ctx.saved_tensors, *ctx.settings)
    return *gradients, *[None] * 9


_varlen_attention.register_autograd(_backward, setup_context=_save_for_backward)
_varlen_attention_backward.register_autograd(no_second_derivative)
