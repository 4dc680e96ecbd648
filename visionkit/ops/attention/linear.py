"""Attention whose cost grows with the number of tokens, not its square: the keys and values are summed up before a query reads them.

Linear attention: Katharopoulos et al. 2020, arXiv:2006.16236. Efficient attention: Shen et al. 2021, arXiv:1812.01243.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.ops.attention.inputs import check_heads_first, check_lengths, check_packed, in_autocast_type, without_autocast
from visionkit.registry import OPS

# B images, H heads, N queries, S keys, D channels of queries and keys, M of values

_EPS = 1e-6                                                  # added to the denominator, as the authors' code does


class LinearAttentionState(NamedTuple):
    """All that a query needs of the keys and values before it, however many there were; float32, or float64 for such inputs."""
    kv: Tensor                                               # [B, H, D, M], sum of feature(k) v^T
    k: Tensor                                                # [B, H, D], sum of feature(k)


def linear_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, valid: Tensor | None = None,
                     normalise: bool = True, chunk: int | None = None, state: LinearAttentionState | None = None,
                     return_state: bool = False) -> Tensor | tuple[Tensor, LinearAttentionState]:
    """Attention with feature(q) . feature(k) in place of exp(q . k), where feature(x) = elu(x) + 1 (arXiv:2006.16236, eq. 5 to 7).

    No scale is applied: the features are of the queries and keys as they come. The attention matrix has a rank of D at most.

    Args:
        query: [B, H, N, D].
        key: [B, H, S, D]; S = N where `causal`.
        value: [B, H, S, M].
        causal: a query sees no later key (eq. 9 to 12), by chunks: within one, masked scores; before it, the sums of all chunks.
        valid: [B, S] bool, false for keys that count for nothing, such as padding, whatever they and their values hold.
        normalise: divide by feature(q) . sum of feature(k), plus 1e-6; else the numerator is the result.
        chunk: tokens; the larger of 64 and D by default, so that the sums take no more room than the values. Any makes the same.
        state: sums of keys and values that come before; all queries see them.
        return_state: see below.

    Returns:
        [B, H, N, M] in the type of the inputs; sums are made in float32, or float64 for inputs of that type. With `return_state` also the
        sums of `state` and all keys, with which the next tokens, or `linear_attention_step`, go on.

    Raises:
        ValueError: arguments that do not fit together.
    """
    query, key, value = in_autocast_type(query, key, value)
    check_heads_first(query, key, value, grouped=False)
    _check_valid(valid, key)
    if causal and query.shape[2] != key.shape[2]:
        raise ValueError(f"causal attention needs a key for each query, got {query.shape[2]} queries and {key.shape[2]} keys; put the keys "
                         f"before into state")
    chunk = max(64, query.shape[3]) if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk is a number of tokens, got {chunk}")
    if state is not None:
        _check_state(state, key, value)
    with without_autocast(query.device):                                    # which would make products of float32 in half precision
        if valid is not None:                                               # features of 0; a product with 0 would leave NaN and infinity
            hidden = ~valid[:, None, :, None]
            key, value = key.masked_fill(hidden, -torch.inf), value.masked_fill(hidden, 0)
        q, k, v = _features(query), _features(key), _wide(value)
        if causal and query.shape[2] > chunk:
            numerator, denominator, state = _by_chunks(q, k, v, chunk, state)
        else:
            numerator, denominator, state = _at_once(q, k, v, causal, state)
        output = numerator / (denominator + _EPS) if normalise else numerator
    return (output.to(query.dtype), state) if return_state else output.to(query.dtype)


def linear_attention_step(query: Tensor, key: Tensor, value: Tensor, state: LinearAttentionState | None = None, *,
                          normalise: bool = True) -> tuple[Tensor, LinearAttentionState]:
    """One token of causal `linear_attention` as a step of a recurrent network, with as much work for the last token as for the first
    (arXiv:2006.16236, eq. 16 to 20).

    Args:
        query: [B, H, D].
        key: [B, H, D].
        value: [B, H, M].
        state: what the step before returned; None at the first token.
        normalise: see `linear_attention`.

    Returns:
        [B, H, M] in the type of the inputs, and the state for the next step.

    Raises:
        ValueError: shapes that do not fit together.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 3:
            raise ValueError(f"{name} must be one token, [B, H, channels], got {list(tensor.shape)}")
    output, state = linear_attention(*(tensor[:, :, None] for tensor in (query, key, value)), causal=True, normalise=normalise, state=state,
                                     return_state=True)
    return output[:, :, 0], state


def varlen_linear_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, causal: bool = False,
                            normalise: bool = True, chunk: int | None = None, lengths_q: Sequence[int] | None = None,
                            lengths_k: Sequence[int] | None = None) -> Tensor:
    """`linear_attention` within each of several sequences that stand in one tensor: the sums begin anew with each.

    Args:
        q: [T, H, D], the sequences one after the other.
        k: [S, H, D].
        v: [S, H, M].
        cu_seqlens_q: int32 [n + 1], where each sequence of queries begins, and where the last one ends.
        cu_seqlens_k: the same of the keys.
        causal: see `linear_attention`, and for `normalise` and `chunk`.
        lengths_q: those of the sequences as Python numbers, so that nothing need be read off `cu_seqlens_q`, which waits for the device.
        lengths_k: the same of the keys; `lengths_q` by default where both have the same `cu_seqlens`, the very tensor.

    Returns:
        [T, H, M] in the type of the inputs.

    Raises:
        ValueError: arguments that do not fit together.
    """
    q, k, v = in_autocast_type(q, k, v)
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, grouped=False)
    if lengths_k is None and cu_seqlens_k is cu_seqlens_q:
        lengths_k = lengths_q
    lengths_q = cu_seqlens_q.diff().tolist() if lengths_q is None else list(lengths_q)
    lengths_k = cu_seqlens_k.diff().tolist() if lengths_k is None else list(lengths_k)
    check_lengths("q", lengths_q, q, cu_seqlens_q)
    check_lengths("k", lengths_k, k, cu_seqlens_k)
    heads_first = (tensor.transpose(0, 1).split(lengths, 1) for tensor, lengths in ((q, lengths_q), (k, lengths_k), (v, lengths_k)))
    outputs = [linear_attention(query[None], key[None], value[None], causal=causal, normalise=normalise, chunk=chunk)[0].transpose(0, 1)
               for query, key, value in zip(*heads_first, strict=True)]
    return torch.cat(outputs) if outputs else q.new_zeros(0, q.shape[1], v.shape[2])


def efficient_attention(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """softmax(query) (softmax(key)^T value): over the channels of a query, over the tokens of the keys (arXiv:1812.01243, eq. 4 and 7).

    What a query gives to all keys sums up to 1, so nothing need be divided.

    Args:
        query: [B, H, N, D].
        key: [B, H, S, D].
        value: [B, H, S, M].
        valid: [B, S] bool, false for keys that count for nothing, such as padding, whatever they and their values hold.
        causal: refused.

    Returns:
        [B, H, N, M] in the type of the inputs; 0 where no key is valid.

    Raises:
        ValueError: `causal` is asked for, or arguments do not fit together.
    """
    if causal:
        raise ValueError("efficient_attention cannot be causal: its softmax over the tokens has seen later keys before a mask could hide "
                         "them; use linear_attention(causal=True)")
    query, key, value = in_autocast_type(query, key, value)
    check_heads_first(query, key, value, grouped=False)
    _check_valid(valid, key)
    with without_autocast(query.device):
        k, v = _wide(key), _wide(value)
        if valid is not None:
            hidden = ~valid[:, None, :, None]
            v = v.masked_fill(hidden, 0)
            k = k.masked_fill(hidden, torch.finfo(k.dtype).min)             # minus infinity would make NaN of a row without valid keys
        shares = k.softmax(2)
        if valid is not None:
            shares = shares.masked_fill(hidden, 0)
        output = _wide(query).softmax(3) @ (shares.transpose(2, 3) @ v)
    return output.to(query.dtype)


@OPS.register_module()
class LinearAttention(nn.Module):
    """`linear_attention` as a module without weights; projections belong to the layer that uses it."""

    def __init__(self, causal: bool = False, normalise: bool = True, chunk: int | None = None) -> None:
        super().__init__()
        self.causal, self.normalise, self.chunk = causal, normalise, chunk

    def forward(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None = None) -> Tensor:
        return linear_attention(query, key, value, causal=self.causal, valid=valid, normalise=self.normalise, chunk=self.chunk)


@OPS.register_module()
class EfficientAttention(nn.Module):
    """`efficient_attention` as a module without weights; projections belong to the layer that uses it."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None = None) -> Tensor:
        return efficient_attention(query, key, value, valid)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _features(tensor: Tensor) -> Tensor:
    """elu(x) + 1: exp(x) below 0, x + 1 above. Computed as the name says, it takes longer, and is 0 below x = -17 in float32."""
    x = _wide(tensor)
    return _EluPlusOne.apply(x) if x.requires_grad and torch.is_grad_enabled() else _elu_plus_one(x)


def _elu_plus_one(x: Tensor) -> Tensor:
    return x.clamp(max=0).exp_().add_(x.clamp(min=0))


class _EluPlusOne(torch.autograd.Function):
    """With nothing kept for the backward pass but the result, which is its own slope below 1; above, the slope is 1."""
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _elu_plus_one(x)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        features, = ctx.saved_tensors
        return grad * features.clamp(max=1)


def _at_once(q: Tensor, k: Tensor, v: Tensor, causal: bool,
             state: LinearAttentionState | None) -> tuple[Tensor, Tensor, LinearAttentionState]:
    """Numerator [B, H, N, M], denominator [B, H, N, 1] and the sums; the work of causal attention grows with the square of N."""
    after = LinearAttentionState(k.transpose(2, 3) @ v, k.sum(2))
    if state is not None:
        after = LinearAttentionState(after.kv + state.kv, after.k + state.k)
    if not causal:
        return q @ after.kv, q @ after.k[..., None], after
    scores = (q @ k.transpose(2, 3)).tril()
    numerator, denominator = scores @ v, scores.sum(3, keepdim=True)
    if state is not None:
        numerator, denominator = numerator + q @ state.kv, denominator + q @ state.k[..., None]
    return numerator, denominator, after


def _by_chunks(q: Tensor, k: Tensor, v: Tensor, chunk: int,
               state: LinearAttentionState | None) -> tuple[Tensor, Tensor, LinearAttentionState]:
    """As `_at_once`, causal: each chunk reads the sums of those before it, of which there are N / chunk."""
    tokens = q.shape[2]
    rest = -tokens % chunk                                                  # zeros fill the last chunk up and leave the sums as they are
    q, k, v = (F.pad(tensor, (0, 0, 0, rest)).unflatten(2, (-1, chunk)) for tensor in (q, k, v))               # [B, H, n, chunk, channels]
    kv, sums = k.transpose(3, 4) @ v, k.sum(3)
    if state is not None:                                                   # as of a chunk before the first
        kv, sums = torch.cat([state.kv[:, :, None], kv], 2), torch.cat([state.k[:, :, None], sums], 2)
    else:
        kv, sums = F.pad(kv, (0, 0, 0, 0, 1, 0)), F.pad(sums, (0, 0, 1, 0))
    kv, sums = kv.cumsum(2), sums.cumsum(2)
    scores = (q @ k.transpose(3, 4)).tril()
    numerator = scores @ v + q @ kv[:, :, :-1]
    denominator = scores.sum(4, keepdim=True) + q @ sums[:, :, :-1, :, None]
    after = LinearAttentionState(kv[:, :, -1], sums[:, :, -1])
    return numerator.flatten(2, 3)[:, :, :tokens], denominator.flatten(2, 3)[:, :, :tokens], after


def _check_valid(valid: Tensor | None, key: Tensor) -> None:
    if valid is not None and (valid.dtype != torch.bool or valid.shape != (key.shape[0], key.shape[2])):
        raise ValueError(f"valid must be bool [B, S] = {[key.shape[0], key.shape[2]]}, one for each key (linear attention has no matrix to "
                         f"mask), got {valid.dtype} {list(valid.shape)}")


def _check_state(state: LinearAttentionState, key: Tensor, value: Tensor) -> None:
    expected = (*key.shape[:2], key.shape[3], value.shape[3])
    if state.kv.shape != expected or state.k.shape != expected[:3]:
        raise ValueError(f"state must hold sums of the shapes {list(expected)} and {list(expected[:3])}, got {list(state.kv.shape)} and "
                         f"{list(state.k.shape)}")
