"""Attention with the whole matrix, as the formula says it; each option a line."""
import math

import torch


def visible(queries, keys, causal=False, window=(-1, -1)):
    """[N, M] bool."""
    i, j = torch.arange(queries)[:, None] + (0 if causal == "top_left" else keys - queries), torch.arange(keys)
    left, right = (window[0] if window[0] >= 0 else queries + keys), (window[1] if window[1] >= 0 else queries + keys)
    seen = (j >= i - left) & (j <= i + right)
    if causal:
        seen &= j <= i
    return seen


def dense_scores(query, key, *, causal=False, window=(-1, -1), scale=None, softcap=0.0, alibi_slopes=None, block_mask=None, block_size=64):
    """[B, H, N, M], minus infinity where a query does not see a key."""
    (queries, channels), keys = query.shape[2:], key.shape[2]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = torch.einsum("bhnd,bhmd->bhnm", query, key) * (channels**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        offset = 0 if causal == "top_left" else keys - queries
        distance = (torch.arange(queries)[:, None] + offset - torch.arange(keys)).abs()
        scores = scores - alibi_slopes.expand(query.shape[:2])[:, :, None, None] * distance
    seen = visible(queries, keys, causal, window)
    if block_mask is not None:
        seen &= block_mask.repeat_interleave(block_size, 0)[:queries].repeat_interleave(block_size, 1)[:, :keys]
    return scores.masked_fill(~seen, -math.inf)


def dense_attention(query, key, value, **options):
    """[B, H, N, D_v], 0 where a query sees no key."""
    scores = dense_scores(query, key, **options)
    blind = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    return weights @ value.repeat_interleave(query.shape[1] // key.shape[1], 1)


def tokens(images=2, heads=4, key_heads=2, queries=19, keys=23, channels=6, value_channels=5, dtype=torch.float64, seed=0):
    """Random query, key and value, heads first, that require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads, queries, channels), (key_heads, keys, channels), (key_heads, keys, value_channels)
    return [torch.randn(images, *shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def with_gradients(function, inputs, seed=1):
    """The result and the gradients of all inputs, for random gradients of the result."""
    output = function(*inputs)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def largest_difference(results, expected):
    return max(((one.double() - other.double()).abs().max().item() if one.numel() else 0.0)
               for one, other in zip(results, expected, strict=True))
