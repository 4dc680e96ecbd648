"""FlashAttention: exact softmax attention without the matrix of scores.

Scores are made tile by tile; a running maximum and a running sum rescale what was added up before (online softmax). The backward pass makes
them again from the log-sum-exp of each row. Dao et al. 2022, arXiv:2205.14135; the order of loops is that of Dao 2023, arXiv:2307.08691.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visionkit.ops.attention.dropout import draw_seed, kept
from visionkit.ops.attention.inputs import band, check_dropout, check_heads_first, check_softcap, in_autocast_type, without_autocast
from visionkit.ops.tiers import kernels
from visionkit.registry import OPS

# B images, H heads of queries, K = H_kv heads of keys, G = H / K query heads that share one, N queries, M keys, D and D_v channels

_TILE = (128, 512)                                           # queries, keys; of the portable form, any will do
MAX_KERNEL_CHANNELS = 256                                    # a row of more does not fit the Triton kernels


def flash_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool | str = False, scale: float | None = None,
                    window: tuple[int, int] | None = None, dropout_p: float = 0.0, softcap: float = 0.0,
                    alibi_slopes: Tensor | None = None, block_mask: Tensor | None = None, block_size: int = 64,
                    return_logsumexp: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query key^T) value, keeping no more for the backward pass than its arguments, its result and a number a row.

    A query that sees no key reads 0. Sums are made in float32, or in float64 for inputs of that type.

    Args:
        query: [B, H, N, D], PyTorch's layout; flash-attn's [B, N, H, D] cannot be told from it, so `transpose(1, 2)` such tensors.
        key: [B, H_kv, M, D]; H is a multiple of H_kv, and query head h reads key head h // (H / H_kv).
        value: [B, H_kv, M, D_v].
        causal: a query sees no later key. "bottom_right", which is what True means, aligns the last query with the last key, as flash-attn
            does; "top_left" the first with the first, as PyTorch's `is_causal` does.
        scale: of the scores, D^-0.5 by default.
        window: (left, right), how many keys a query sees on either side of the one it is aligned with; -1 for all. Aligned as `causal`
            says, at the bottom right by default.
        dropout_p: of the attention weights. The mask is the same for every kernel and tile, given the state of PyTorch's generator.
        softcap: c > 0 turns a score s into c tanh(s / c).
        alibi_slopes: float32 [H] or [B, H], what a score loses per key of distance (Press et al. 2022, arXiv:2108.12409); constants.
        block_mask: bool [ceil(N / block_size), ceil(M / block_size)], false where no query of a block sees a key of a block: these are
            passed over (block-sparse attention, arXiv:2205.14135, sec. 3.3).
        block_size: of `block_mask`.
        return_logsumexp: see below.

    Returns:
        [B, H, N, D_v] in the type of the inputs. With `return_logsumexp` also the logarithm of each row's sum of exponentials, [B, H, N] in
        float32 (float64 for such inputs), infinite where a query sees no key; it has a gradient.

    Raises:
        ValueError: arguments that do not fit together.
        RuntimeError: a second derivative is asked for.
    """
    query, key, value = in_autocast_type(query, key, value)
    check_heads_first(query, key, value)
    check_dropout(dropout_p)
    left, right, top_left = band(causal, window)
    _check_extras(query, key, softcap, alibi_slopes, block_mask, block_size)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    seed = draw_seed(query.device) if dropout_p else None
    output, logsumexp = torch.ops.visionkit.flash_attention(query, key, value, seed, alibi_slopes, block_mask, scale, dropout_p, left,
                                                            right, top_left, softcap, block_size)
    return (output, logsumexp) if return_logsumexp else output


def _check_extras(query: Tensor, key: Tensor, softcap: float, alibi_slopes: Tensor | None, block_mask: Tensor | None,
                  block_size: int) -> None:
    images, heads, queries, _ = query.shape
    check_softcap(softcap)
    if alibi_slopes is not None and alibi_slopes.shape not in ((heads,), (images, heads)):
        raise ValueError(f"alibi_slopes must be [H] = [{heads}] or [B, H] = [{images}, {heads}], got {list(alibi_slopes.shape)}")
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise ValueError("alibi_slopes are constants, without a gradient; detach() them")
    if block_size < 1:
        raise ValueError(f"block_size must be positive, got {block_size}")
    blocks = tuple(-(-tokens // block_size) for tokens in (queries, key.shape[2]))
    if block_mask is not None and (block_mask.shape != blocks or block_mask.dtype != torch.bool):
        raise ValueError(f"block_mask must be bool {list(blocks)} for {queries} queries and {key.shape[2]} keys in blocks of {block_size}, "
                         f"got {block_mask.dtype} {list(block_mask.shape)}")
    for name, tensor in (("alibi_slopes", alibi_slopes), ("block_mask", block_mask)):
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"query is on {query.device}, {name} on {tensor.device}; move one")


@OPS.register_module()
class FlashAttention(nn.Module):
    """`flash_attention` as a module without weights; projections belong to the layer that uses it. No dropout in evaluation."""

    def __init__(self, causal: bool | str = False, scale: float | None = None, window: tuple[int, int] | None = None,
                 dropout_p: float = 0.0, softcap: float = 0.0) -> None:
        super().__init__()
        band(causal, window)
        check_dropout(dropout_p)
        check_softcap(softcap)
        self.causal, self.scale, self.window, self.dropout_p, self.softcap = causal, scale, window, dropout_p, softcap

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flash_attention(query, key, value, causal=self.causal, scale=self.scale, window=self.window,
                               dropout_p=self.dropout_p if self.training else 0.0, softcap=self.softcap)


@dataclass(frozen=True)
class Scores:
    """The scores of a tile, and which tiles hold any.

    A query i sees the keys from i + offset - left to i + offset + right; -1 is no limit.
    """
    scale: float
    left: int
    right: int
    offset: int
    softcap: float = 0.0
    slopes: Tensor | None = None                             # [B or 1, K, G]
    block_mask: Tensor | None = None
    block_size: int = 64

    def tiles_of_keys(self, rows: range, keys: int) -> Iterator[range]:
        """Tiles of the keys that any of these queries sees."""
        first = max(0, rows.start + self.offset - self.left) if self.left >= 0 else 0
        end = min(keys, rows.stop + self.offset + self.right) if self.right >= 0 else keys
        return (columns for columns in tiles(first, end, _TILE[1]) if self._any_block(rows, columns))

    def tiles_of_queries(self, columns: range, queries: int) -> Iterator[range]:
        """Tiles of the queries that see any of these keys."""
        first = max(0, columns.start - self.offset - self.right) if self.right >= 0 else 0
        end = min(queries, columns.stop - self.offset + self.left) if self.left >= 0 else queries
        return (rows for rows in tiles(first, end, _TILE[0]) if self._any_block(rows, columns))

    def __call__(self, query: Tensor, key: Tensor, rows: range, columns: range) -> tuple[Tensor, Tensor | None]:
        """[B, K, G, rows, columns] scores, minus infinity where a query does not see a key; and what a softcap makes of their slopes."""
        scores, slope = _product(query, key.transpose(-1, -2)).mul_(self.scale), None
        if self.softcap:
            bent = scores.div_(self.softcap).tanh_()
            scores, slope = bent * self.softcap, 1 - bent.square()
        row = torch.arange(rows.start, rows.stop, device=query.device)[:, None] + self.offset
        column = torch.arange(columns.start, columns.stop, device=query.device)
        if self.slopes is not None:
            scores -= self.slopes[..., None, None] * (row - column).abs()
        # Only tiles at the edge of the band need a mask.
        if self.right >= 0 and columns.stop - 1 > rows.start + self.offset + self.right:
            scores.masked_fill_(column > row + self.right, -math.inf)
        if self.left >= 0 and columns.start < rows.stop - 1 + self.offset - self.left:
            scores.masked_fill_(column < row - self.left, -math.inf)
        if self.block_mask is not None:
            blocks = self.block_mask[(row - self.offset) // self.block_size, column // self.block_size]
            scores.masked_fill_(~blocks, -math.inf)
        return scores, slope

    def _any_block(self, rows: range, columns: range) -> bool:
        if self.block_mask is None:
            return True
        spans = (slice(span.start // self.block_size, (span.stop - 1) // self.block_size + 1) for span in (rows, columns))
        return bool(self.block_mask[tuple(spans)].any())


@dataclass(frozen=True)
class Dropout:
    """The dropout of a tile: `first_rows` [B, K, G] is the number that query 0 of each head has."""
    seed: Tensor
    dropout_p: float
    first_rows: Tensor

    def __call__(self, weights: Tensor, rows: range, columns: range) -> Tensor:
        """`weights` [B, K, G, rows, columns], some of them 0 and the others larger."""
        row = self.first_rows[..., None] + torch.arange(rows.start, rows.stop, device=weights.device)
        column = torch.arange(columns.start, columns.stop, device=weights.device)
        return torch.where(kept(self.seed, row, column, self.dropout_p), weights / (1 - self.dropout_p), 0)


def tiles(first: int, end: int, size: int) -> Iterator[range]:
    """From `first` to `end` in steps of `size`, the last one shorter."""
    return (range(start, min(start + size, end)) for start in range(first, end, size))


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """[B, K, G, R, X] times [B, K, X, Y]: the heads of a group are further rows of one product."""
    groups, count = rows.shape[2:4]
    return (rows.flatten(2, 3) @ matrix).unflatten(2, (groups, count))


def _without_autocast(function: Callable[..., None]) -> Callable[..., None]:
    """`function`, its products in the type of their factors: autocast reaches into an op and would make them in half precision."""
    @functools.wraps(function)
    def run(tensor: Tensor, *arguments) -> None:
        with without_autocast(tensor.device):
            function(tensor, *arguments)
    return run


@_without_autocast
def attend(query: Tensor, key: Tensor, value: Tensor, scores: Scores, dropout: Dropout | None, output: Tensor, logsumexp: Tensor) -> None:
    """The forward pass: fill in `output` [B, K, G, N, D_v] and `logsumexp` [B, K, G, N] for query [B, K, G, N, D] and keys [B, K, M, D]."""
    wide = logsumexp.dtype
    for rows in tiles(0, query.shape[3], _TILE[0]):
        part = slice(rows.start, rows.stop)
        queries = query[..., part, :].to(wide)
        highest = logsumexp.new_full((*logsumexp.shape[:3], len(rows), 1), -math.inf)
        total = torch.zeros_like(highest)
        summed = logsumexp.new_zeros(*logsumexp.shape[:3], len(rows), value.shape[-1])
        for columns in scores.tiles_of_keys(rows, key.shape[2]):
            keys, values = (tensor[:, :, columns.start:columns.stop].to(wide) for tensor in (key, value))
            tile, _ = scores(queries, keys, rows, columns)
            higher = torch.maximum(highest, tile.amax(-1, keepdim=True))
            level = higher.masked_fill(higher == -math.inf, 0)                # nothing seen so far: the exponentials are to be 0, not NaN
            weights, shrink = tile.sub_(level).exp_(), (highest - level).exp_()
            total = total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
            if dropout is not None:                                         # of the normalised weights: the sum is that of all
                weights = dropout(weights, rows, columns)
            summed = summed.mul_(shrink).add_(_product(weights, values))
            highest = higher
        seen = total != 0                                                   # true of what is not a number, too, which is to be seen
        output[..., part, :] = torch.where(seen, summed / total, 0)
        logsumexp[..., part] = torch.where(seen, highest + total.log(), math.inf)[..., 0]


@_without_autocast
def attend_backward(grad: Tensor, grad_logsumexp: Tensor, query: Tensor, key: Tensor, value: Tensor, scores: Scores,
                    dropout: Dropout | None, output: Tensor, logsumexp: Tensor, grad_query: Tensor, grad_key: Tensor,
                    grad_value: Tensor) -> None:
    """The backward pass: fill in the gradients, shaped as in `attend`; `grad_query` comes with zeros, in float32 or float64.

    With weights P, their gradient dP and D = rowsum(grad * output), the scores' gradient is P * (dP - D) (arXiv:2307.08691, sec. 2.2).
    """
    wide = logsumexp.dtype
    delta = torch.empty_like(logsumexp)
    for rows in tiles(0, query.shape[3], _TILE[0]):
        part = slice(rows.start, rows.stop)
        delta[..., part] = (grad[..., part, :].to(wide) * output[..., part, :]).sum(-1)
    delta -= grad_logsumexp                                                 # d logsumexp / d score is the weight, too
    for columns in tiles(0, key.shape[2], _TILE[1]):
        keys, values = (tensor[:, :, columns.start:columns.stop].to(wide) for tensor in (key, value))
        of_keys, of_values = torch.zeros_like(keys), torch.zeros_like(values)
        for rows in scores.tiles_of_queries(columns, query.shape[3]):
            part = slice(rows.start, rows.stop)
            queries, grads = query[..., part, :].to(wide), grad[..., part, :].to(wide)
            tile, slope = scores(queries, keys, rows, columns)
            weights = tile.sub_(logsumexp[..., part, None]).exp_()
            of_weights = _product(grads, values.transpose(-1, -2))
            used = weights
            if dropout is not None:
                used, of_weights = dropout(weights, rows, columns), dropout(of_weights, rows, columns)
            of_values += used.flatten(2, 3).transpose(-1, -2) @ grads.flatten(2, 3)
            of_scores = of_weights.sub_(delta[..., part, None]).mul_(weights).mul_(scores.scale)
            if slope is not None:
                of_scores.mul_(slope)
            of_keys += of_scores.flatten(2, 3).transpose(-1, -2) @ queries.flatten(2, 3)
            grad_query[..., part, :] += _product(of_scores, keys)
        grad_key[:, :, columns.start:columns.stop] = of_keys
        grad_value[:, :, columns.start:columns.stop] = of_values


def _scores(query: Tensor, key: Tensor, alibi_slopes: Tensor | None, block_mask: Tensor | None, scale: float, left: int, right: int,
            top_left: bool, softcap: float, block_size: int) -> Scores:
    slopes = None
    if alibi_slopes is not None:
        slopes = alibi_slopes.expand(query.shape[0], -1).unflatten(1, (key.shape[1], -1))
    return Scores(scale, left, right, 0 if top_left else key.shape[2] - query.shape[2], softcap, slopes, block_mask, block_size)


def _dropout(query: Tensor, key: Tensor, seed: Tensor | None, dropout_p: float) -> Dropout | None:
    if seed is None:
        return None
    images, heads, queries, _ = query.shape
    first_rows = torch.arange(images * heads, device=query.device) * queries
    return Dropout(seed, dropout_p, first_rows.view(images, key.shape[1], heads // key.shape[1]))


def group_heads(tensor: Tensor, key_heads: int) -> Tensor:
    """[B, H, ...] as [B, K, G, ...], a view."""
    return tensor.unflatten(1, (key_heads, tensor.shape[1] // key_heads))


@torch.library.custom_op("visionkit::flash_attention", mutates_args=())
def _flash_attention(query: Tensor, key: Tensor, value: Tensor, seed: Tensor | None, alibi_slopes: Tensor | None, block_mask: Tensor | None,
                     scale: float, dropout_p: float, left: int, right: int, top_left: bool, softcap: float,
                     block_size: int) -> tuple[Tensor, Tensor]:
    arguments = query, key, value, seed, alibi_slopes, block_mask, scale, dropout_p, left, right, top_left, softcap, block_size
    if fits_kernels(query, value, block_mask, block_size) and (triton := kernels("flash_attention", query)):
        return triton.forward(*arguments)
    output, logsumexp = _results(query, value)
    scores = _scores(query, key, alibi_slopes, block_mask, scale, left, right, top_left, softcap, block_size)
    attend(group_heads(query, key.shape[1]), key, value, scores, _dropout(query, key, seed, dropout_p),
           group_heads(output, key.shape[1]), group_heads(logsumexp, key.shape[1]))
    return output, logsumexp


def fits_kernels(query: Tensor, value: Tensor, block_mask: Tensor | None = None, block_size: int = 64) -> bool:
    """Whether rows are short enough for the Triton kernels, and blocks made of their tiles."""
    return max(query.shape[-1], value.shape[-1]) <= MAX_KERNEL_CHANNELS and (block_mask is None or block_size % 16 == 0)


def _results(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(*query.shape[:3], value.shape[3]), query.new_empty(query.shape[:3], dtype=wide)


@_flash_attention.register_fake
def _(query, key, value, seed, alibi_slopes, block_mask, scale, dropout_p, left, right, top_left, softcap, block_size):
    return _results(query, value)


@torch.library.custom_op("visionkit::flash_attention_backward", mutates_args=())
def _flash_attention_backward(grad: Tensor, grad_logsumexp: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
                              logsumexp: Tensor, seed: Tensor | None, alibi_slopes: Tensor | None, block_mask: Tensor | None, scale: float,
                              dropout_p: float, left: int, right: int, top_left: bool, softcap: float,
                              block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    if fits_kernels(query, value, block_mask, block_size) and (triton := kernels("flash_attention", query)):
        return triton.backward(grad, grad_logsumexp, query, key, value, output, logsumexp, seed, alibi_slopes, block_mask, scale, dropout_p,
                               left, right, top_left, softcap, block_size)
    _, grad_key, grad_value = gradients = _gradients(query, key, value)
    grad_query = torch.zeros_like(gradients[0], dtype=logsumexp.dtype)
    scores = _scores(query, key, alibi_slopes, block_mask, scale, left, right, top_left, softcap, block_size)
    dropout = _dropout(query, key, seed, dropout_p)
    grad, grad_logsumexp, query, output, logsumexp, of_query = (
        group_heads(tensor, key.shape[1]) for tensor in (grad, grad_logsumexp, query, output, logsumexp, grad_query))
    attend_backward(grad, grad_logsumexp, query, key, value, scores, dropout, output, logsumexp, of_query, grad_key,
                    grad_value)
    return grad_query.to(query.dtype), grad_key, grad_value


def _gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


@_flash_attention_backward.register_fake
def _(grad, grad_logsumexp, query, key, value, output, logsumexp, seed, alibi_slopes, block_mask, scale, dropout_p, left, right, top_left,
      softcap, block_size):
    return _gradients(query, key, value)


def _save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, seed, alibi_slopes, block_mask, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, *output, seed, alibi_slopes, block_mask)


def _backward(ctx, grad: Tensor, grad_logsumexp: Tensor) -> tuple:
    gradients = torch.ops.visionkit.flash_attention_backward(grad, grad_logsumexp, *ctx.saved_tensors, *ctx.settings)
    return *gradients, *[None] * 10


def no_second_derivative(ctx, *grads: Tensor) -> tuple:
    """The gradient of a backward pass."""
    raise RuntimeError("FlashAttention has no second derivative; call F.scaled_dot_product_attention under "
                       "torch.nn.attention.sdpa_kernel(SDPBackend.MATH) where you need one")


_flash_attention.register_autograd(_backward, setup_context=_save_for_backward)
_flash_attention_backward.register_autograd(no_second_derivative)
