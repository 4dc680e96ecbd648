"""The kernels of `flash_attention` and `varlen_attention`: a program takes a tile of queries through its keys, or one of keys through the
queries that see them. Nothing is added atomically, so results and gradients are the same bits every time.

Scores are kept in units of log 2, for `exp2`. A program does without masks where its tiles lie wholly within the band of visible keys.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionkit.ops.attention.dropout import threshold

# B images or sequences, H heads of queries, H_kv of keys, N queries, M keys, D and D_v channels

_LOG2_E = tl.constexpr(math.log2(math.e))


@dataclass(frozen=True)
class Settings:
    """What the kernels need beside the tensors; `borders_q` and `borders_k` are the cu_seqlens of packed sequences."""
    seed: Tensor | None
    scale: float
    dropout_p: float
    left: int
    right: int
    top_left: bool = False
    softcap: float = 0.0
    slopes: Tensor | None = None                             # [B, H], float32, contiguous
    block_mask: Tensor | None = None
    block_size: int = 64
    borders_q: Tensor | None = None
    borders_k: Tensor | None = None


def attend(query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor, settings: Settings, sequences: int,
           longest_q: int) -> None:
    """Fill in `output` [B, H, N, D_v] and `logsumexp` [B, H, N]; of packed sequences, B is 1."""
    blocks = block_sizes(query, value, settings, "forward")
    query, key, value = map(_rows, (query, key, value))
    grid = _grid(query, longest_q, blocks[0], sequences * query.shape[1])
    if grid is not None:
        with torch.cuda.device_of(query):
            _attend_kernel[grid](query, key, value, output, logsumexp, *_strides(query, key, value, output),
                                 *_arguments(query, key, settings, longest_q), **_constants(query, key, value, settings, blocks))


def attend_backward(grad: Tensor, delta: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor,
                    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, settings: Settings, sequences: int, longest_q: int,
                    longest_k: int) -> None:
    """Fill in the gradients; `delta` [B, H, N] comes as what is to be added to rowsum(grad * output)."""
    query, key, value, grad, output = map(_rows, (query, key, value, grad, output))
    logsumexp = logsumexp.contiguous()
    with torch.cuda.device_of(query):
        blocks = block_sizes(query, value, settings, "queries")
        grid = _grid(query, longest_q, blocks[0], sequences * query.shape[1])
        if grid is not None:                                                # also finishes delta, which the next kernel reads
            _attend_backward_queries_kernel[grid](
                query, key, value, grad, output, logsumexp, delta, grad_query, *_strides(query, key, value, grad, output, grad_query),
                *_arguments(query, key, settings, longest_q), **_constants(query, key, value, settings, blocks))
        blocks = block_sizes(query, value, settings, "keys")
        grid = _grid(key, longest_k, blocks[1], sequences * key.shape[1])
        if grid is not None:
            _attend_backward_keys_kernel[grid](
                query, key, value, grad, logsumexp, delta, grad_key, grad_value,
                *_strides(query, key, value, grad, grad_key, grad_value), *_arguments(query, key, settings, longest_k),
                **_constants(query, key, value, settings, blocks))


def block_sizes(query: Tensor, value: Tensor, settings: Settings, kernel: str) -> tuple[int, int, int]:
    """Queries and keys of a tile of the kernel `forward`, `queries` or `keys`, and warps of a program."""
    channels = max(_padded(query.shape[-1]), _padded(value.shape[-1]), 64)
    queries, keys, warps = _BLOCKS[kernel, query.element_size() > 2][channels]
    if settings.block_mask is not None:                                     # a tile lies within one block
        largest = settings.block_size & -settings.block_size
        queries, keys = min(queries, largest), min(keys, largest)
    return queries, keys, warps


# By channels: the largest tiles of which hardly a register spills. float32 is multiplied in three parts and takes the most.
_BLOCKS = {
    ("forward", False): {64: (128, 64, 8), 128: (128, 64, 8), 256: (64, 32, 8)},
    ("forward", True): {64: (32, 32, 4), 128: (32, 32, 8), 256: (16, 16, 8)},
    ("queries", False): {64: (64, 64, 4), 128: (64, 32, 8), 256: (32, 32, 8)},
    ("queries", True): {64: (32, 32, 4), 128: (16, 32, 8), 256: (16, 16, 8)},
    ("keys", False): {64: (32, 64, 4), 128: (32, 64, 8), 256: (16, 32, 8)},
    ("keys", True): {64: (16, 32, 4), 128: (16, 16, 8), 256: (16, 16, 8)},
}


def _padded(channels: int) -> int:
    return max(triton.next_power_of_2(channels), 16)


def _rows(tensor: Tensor) -> Tensor:
    """`tensor`, copied where the channels of a token do not lie side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _grid(tensor: Tensor, longest: int, block: int, heads: int) -> tuple[int] | None:
    programs = triton.cdiv(longest, block) * heads
    return (programs,) if programs and tensor.shape[2] else None


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _arguments(query: Tensor, key: Tensor, settings: Settings, longest: int) -> list:
    """What follows the strides, in the order of the kernels' arguments."""
    return [settings.borders_q, settings.borders_k, settings.seed, settings.slopes, settings.block_mask, query.shape[2], key.shape[2],
            longest, settings.scale, settings.softcap or 1.0, threshold(settings.dropout_p), 1 / (1 - settings.dropout_p), settings.left,
            settings.right, settings.block_size]


def _constants(query: Tensor, key: Tensor, value: Tensor, settings: Settings, blocks: tuple[int, int, int]) -> dict:
    return {
        "HEADS": query.shape[1], "GROUP": query.shape[1] // key.shape[1], "CHANNELS": query.shape[3], "VALUE_CHANNELS": value.shape[3],
        "BLOCK_Q": blocks[0], "BLOCK_K": blocks[1], "BLOCK_D": _padded(query.shape[3]), "BLOCK_V": _padded(value.shape[3]),
        "PACKED": settings.borders_q is not None, "LEFT": settings.left >= 0, "RIGHT": settings.right >= 0,
        "TOP_LEFT": settings.top_left, "SOFTCAP": settings.softcap > 0, "SLOPES": settings.slopes is not None,
        "SPARSE": settings.block_mask is not None, "DROPOUT": settings.seed is not None, "PRECISION": _precision(query.device),
        "SPLIT": _splits(query.dtype),
        "num_warps": blocks[2], "num_stages": 2,
    }


def _splits(dtype: torch.dtype) -> bool:
    """Whether tiles within the band have a loop of their own, without masks: not where products cost far more, and compile for long."""
    return dtype != torch.float32


def _precision(device: torch.device) -> str:
    """How tensor cores multiply float32: as PyTorch's products do, in one part of 10 bits, or else in three."""
    if torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    has_tf32 = torch.version.hip is None and (device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0))
    return "tf32x3" if has_tf32 else "ieee"


_NOT_SPECIALIZED = ["all_queries", "all_keys", "longest", "scale", "softcap", "threshold", "larger", "left", "right", "block_size"]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _attend_kernel(
        q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n, borders_q_ptr,
        borders_k_ptr, seed_ptr, slopes_ptr, mask_ptr, all_queries, all_keys, longest, scale, softcap, threshold, larger, left, right,
        block_size, HEADS: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr, VALUE_CHANNELS: tl.constexpr, BLOCK_Q: tl.constexpr,
        BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PACKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
        TOP_LEFT: tl.constexpr, SOFTCAP: tl.constexpr, SLOPES: tl.constexpr, SPARSE: tl.constexpr, DROPOUT: tl.constexpr,
        SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    blocks = tl.cdiv(longest, BLOCK_Q)
    first, image, head = _place(blocks, BLOCK_Q, HEADS)
    q_start, k_start, queries, keys = _sequence(borders_q_ptr, borders_k_ptr, image, all_queries, all_keys, PACKED)
    lse_start = _first_number(image, head, all_queries, q_start, HEADS, PACKED)
    if first >= queries:
        return
    batch = 0 if PACKED else image.to(tl.int64)
    q_ptr += batch * q_b + head.to(tl.int64) * q_h + q_start * q_n
    k_ptr += batch * k_b + (head // GROUP).to(tl.int64) * k_h + k_start * k_n
    v_ptr += batch * v_b + (head // GROUP).to(tl.int64) * v_h + k_start * v_n
    out_ptr += batch * out_b + head.to(tl.int64) * out_h + q_start * out_n
    offset = 0 if TOP_LEFT else keys - queries
    slope = tl.load(slopes_ptr + image * HEADS + head) if SLOPES else 0.0

    row = first + tl.arange(0, BLOCK_Q)
    query = _load_rows(q_ptr, q_n, row, queries, CHANNELS, BLOCK_D)
    highest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    summed = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)
    begin, full_begin, full_end, end = _keys_of(first, queries, keys, offset, left, right, BLOCK_Q, BLOCK_K, LEFT, RIGHT, SPLIT)
    for part in tl.static_range(3):                                         # left edge of the band, tiles without a mask, right edge
        if (SPLIT and (part != 0 or LEFT)) or (part == 2 and not SPLIT):
            start = begin if part == 0 else full_begin if part == 1 else full_end
            stop = full_begin if part == 0 else full_end if part == 1 else end
            for at in range(start, stop, BLOCK_K):
                if _is_there(mask_ptr, first, at, keys, block_size, SPARSE):
                    column = at + tl.arange(0, BLOCK_K)
                    key = _load_rows(k_ptr, k_n, column, keys, CHANNELS, BLOCK_D)
                    value = _load_rows(v_ptr, v_n, column, keys, VALUE_CHANNELS, BLOCK_V)
                    scores, _ = _scores(query, key, row, column, keys, offset, slope, scale, softcap, left, right, part != 1, LEFT, RIGHT,
                                        SOFTCAP, SLOPES, PRECISION)
                    higher = tl.maximum(highest, tl.max(scores, 1))
                    level = tl.where(higher == float("-inf"), 0.0, higher)     # nothing seen so far: exponentials are to be 0, not NaN
                    weights = tl.exp2(scores - level[:, None])
                    shrink = tl.exp2(highest - level)
                    total = total * shrink + tl.sum(weights, 1)
                    if DROPOUT:
                        weights = tl.where(_kept(seed_ptr, lse_start + row, column, threshold), weights * larger, 0.0)
                    summed = summed * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
                    highest = higher
    seen = total != 0                                        # true of what is not a number, too, which is to be seen
    summed = tl.where(seen[:, None], summed / tl.where(seen, total, 1.0)[:, None], 0.0)
    lse = tl.where(seen, (highest + tl.log2(tl.where(seen, total, 1.0))) / _LOG2_E, float("inf"))
    _store_rows(out_ptr, out_n, row, queries, VALUE_CHANNELS, BLOCK_V, summed)
    tl.store(lse_ptr + lse_start + row, lse, mask=row < queries)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _attend_backward_queries_kernel(
        q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, lse_ptr, delta_ptr, grad_q_ptr, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, grad_b, grad_h,
        grad_n, out_b, out_h, out_n, grad_q_b, grad_q_h, grad_q_n, borders_q_ptr, borders_k_ptr, seed_ptr, slopes_ptr, mask_ptr,
        all_queries, all_keys, longest, scale, softcap, threshold, larger, left, right, block_size, HEADS: tl.constexpr,
        GROUP: tl.constexpr, CHANNELS: tl.constexpr, VALUE_CHANNELS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
        BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PACKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
        TOP_LEFT: tl.constexpr, SOFTCAP: tl.constexpr, SLOPES: tl.constexpr, SPARSE: tl.constexpr, DROPOUT: tl.constexpr,
        SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    blocks = tl.cdiv(longest, BLOCK_Q)
    first, image, head = _place(blocks, BLOCK_Q, HEADS)
    q_start, k_start, queries, keys = _sequence(borders_q_ptr, borders_k_ptr, image, all_queries, all_keys, PACKED)
    lse_start = _first_number(image, head, all_queries, q_start, HEADS, PACKED)
    if first >= queries:
        return
    batch = 0 if PACKED else image.to(tl.int64)
    q_ptr += batch * q_b + head.to(tl.int64) * q_h + q_start * q_n
    k_ptr += batch * k_b + (head // GROUP).to(tl.int64) * k_h + k_start * k_n
    v_ptr += batch * v_b + (head // GROUP).to(tl.int64) * v_h + k_start * v_n
    grad_ptr += batch * grad_b + head.to(tl.int64) * grad_h + q_start * grad_n
    out_ptr += batch * out_b + head.to(tl.int64) * out_h + q_start * out_n
    grad_q_ptr += batch * grad_q_b + head.to(tl.int64) * grad_q_h + q_start * grad_q_n
    offset = 0 if TOP_LEFT else keys - queries
    slope = tl.load(slopes_ptr + image * HEADS + head) if SLOPES else 0.0

    row = first + tl.arange(0, BLOCK_Q)
    query = _load_rows(q_ptr, q_n, row, queries, CHANNELS, BLOCK_D)
    grad = _load_rows(grad_ptr, grad_n, row, queries, VALUE_CHANNELS, BLOCK_V)
    output = _load_rows(out_ptr, out_n, row, queries, VALUE_CHANNELS, BLOCK_V)
    delta = tl.load(delta_ptr + lse_start + row, mask=row < queries, other=0.0)
    delta += tl.sum(grad.to(tl.float32) * output.to(tl.float32), 1)
    tl.store(delta_ptr + lse_start + row, delta, mask=row < queries)
    lse = tl.load(lse_ptr + lse_start + row, mask=row < queries, other=float("inf")) * _LOG2_E
    summed = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    begin, full_begin, full_end, end = _keys_of(first, queries, keys, offset, left, right, BLOCK_Q, BLOCK_K, LEFT, RIGHT, SPLIT)
    for part in tl.static_range(3):
        if (SPLIT and (part != 0 or LEFT)) or (part == 2 and not SPLIT):
            start = begin if part == 0 else full_begin if part == 1 else full_end
            stop = full_begin if part == 0 else full_end if part == 1 else end
            for at in range(start, stop, BLOCK_K):
                if _is_there(mask_ptr, first, at, keys, block_size, SPARSE):
                    column = at + tl.arange(0, BLOCK_K)
                    key = _load_rows(k_ptr, k_n, column, keys, CHANNELS, BLOCK_D)
                    value = _load_rows(v_ptr, v_n, column, keys, VALUE_CHANNELS, BLOCK_V)
                    scores, bent = _scores(query, key, row, column, keys, offset, slope, scale, softcap, left, right, part != 1, LEFT,
                                           RIGHT, SOFTCAP, SLOPES, PRECISION)
                    weights = tl.exp2(scores - lse[:, None])
                    of_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
                    if DROPOUT:
                        of_weights = tl.where(_kept(seed_ptr, lse_start + row, column, threshold), of_weights * larger, 0.0)
                    of_scores = weights * (of_weights - delta[:, None])
                    if SOFTCAP:
                        of_scores *= 1 - bent * bent
                    summed += tl.dot(of_scores.to(key.dtype), key, input_precision=PRECISION)
    _store_rows(grad_q_ptr, grad_q_n, row, queries, CHANNELS, BLOCK_D, summed * scale)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _attend_backward_keys_kernel(
        q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, grad_b,
        grad_h, grad_n, grad_k_b, grad_k_h, grad_k_n, grad_v_b, grad_v_h, grad_v_n, borders_q_ptr, borders_k_ptr, seed_ptr, slopes_ptr,
        mask_ptr, all_queries, all_keys, longest, scale, softcap, threshold, larger, left, right, block_size, HEADS: tl.constexpr,
        GROUP: tl.constexpr, CHANNELS: tl.constexpr, VALUE_CHANNELS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
        BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PACKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
        TOP_LEFT: tl.constexpr, SOFTCAP: tl.constexpr, SLOPES: tl.constexpr, SPARSE: tl.constexpr, DROPOUT: tl.constexpr,
        SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    blocks = tl.cdiv(longest, BLOCK_K)
    first, image, key_head = _place(blocks, BLOCK_K, HEADS // GROUP)
    batch = 0 if PACKED else image.to(tl.int64)
    q_start, k_start, queries, keys = _sequence(borders_q_ptr, borders_k_ptr, image, all_queries, all_keys, PACKED)
    if first >= keys:
        return
    k_ptr += batch * k_b + key_head.to(tl.int64) * k_h + k_start * k_n
    v_ptr += batch * v_b + key_head.to(tl.int64) * v_h + k_start * v_n
    grad_k_ptr += batch * grad_k_b + key_head.to(tl.int64) * grad_k_h + k_start * grad_k_n
    grad_v_ptr += batch * grad_v_b + key_head.to(tl.int64) * grad_v_h + k_start * grad_v_n
    offset = 0 if TOP_LEFT else keys - queries

    column = first + tl.arange(0, BLOCK_K)
    key = _load_rows(k_ptr, k_n, column, keys, CHANNELS, BLOCK_D)
    value = _load_rows(v_ptr, v_n, column, keys, VALUE_CHANNELS, BLOCK_V)
    of_key = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    of_value = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    begin, full_begin, full_end, end = _queries_of(first, queries, offset, left, right, BLOCK_Q, BLOCK_K, LEFT, RIGHT, SPLIT)
    for in_group in range(GROUP):
        head = key_head * GROUP + in_group
        lse_start = _first_number(image, head, all_queries, q_start, HEADS, PACKED)
        of_head = q_ptr + batch * q_b + head.to(tl.int64) * q_h + q_start * q_n
        grad_of_head = grad_ptr + batch * grad_b + head.to(tl.int64) * grad_h + q_start * grad_n
        slope = tl.load(slopes_ptr + image * HEADS + head) if SLOPES else 0.0
        for part in tl.static_range(3):
            if (SPLIT and (part == 1 or (RIGHT if part == 0 else LEFT))) or (part == 2 and not SPLIT):
                start = begin if part == 0 else full_begin if part == 1 else full_end
                stop = full_begin if part == 0 else full_end if part == 1 else end
                for at in range(start, stop, BLOCK_Q):
                    if _is_there(mask_ptr, at, first, keys, block_size, SPARSE):
                        row = at + tl.arange(0, BLOCK_Q)
                        query = _load_rows(of_head, q_n, row, queries, CHANNELS, BLOCK_D)
                        grad = _load_rows(grad_of_head, grad_n, row, queries, VALUE_CHANNELS, BLOCK_V)
                        lse = tl.load(lse_ptr + lse_start + row, mask=row < queries, other=float("inf")) * _LOG2_E
                        delta = tl.load(delta_ptr + lse_start + row, mask=row < queries, other=0.0)
                        # Keys and queries beyond the end need no mask: those are not stored, these have weights of 0.
                        scores, bent = _scores(query, key, row, column, keys, offset, slope, scale, softcap, left, right, part != 1, LEFT,
                                               RIGHT, SOFTCAP, SLOPES, PRECISION)
                        weights = tl.exp2(scores - lse[:, None])
                        of_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
                        used = weights
                        if DROPOUT:
                            kept = _kept(seed_ptr, lse_start + row, column, threshold)
                            used = tl.where(kept, weights * larger, 0.0)
                            of_weights = tl.where(kept, of_weights * larger, 0.0)
                        of_value += tl.dot(tl.trans(used.to(grad.dtype)), grad, input_precision=PRECISION)
                        of_scores = weights * (of_weights - delta[:, None])
                        if SOFTCAP:
                            of_scores *= 1 - bent * bent
                        of_key += tl.dot(tl.trans(of_scores.to(query.dtype)), query, input_precision=PRECISION)
    _store_rows(grad_k_ptr, grad_k_n, column, keys, CHANNELS, BLOCK_D, of_key * scale)
    _store_rows(grad_v_ptr, grad_v_n, column, keys, VALUE_CHANNELS, BLOCK_V, of_value)


@triton.jit
def _place(blocks, BLOCK: tl.constexpr, HEADS: tl.constexpr):
    """First token, image and head of this program."""
    program = tl.program_id(0)
    first = program % blocks * BLOCK
    return first, program // blocks // HEADS, program // blocks % HEADS


@triton.jit
def _sequence(borders_q_ptr, borders_k_ptr, image, all_queries, all_keys, PACKED: tl.constexpr):
    """First query and key, and number of both; borders reach no further than the tensors."""
    q_start, k_start, queries, keys = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64), all_queries, all_keys
    if PACKED:
        first_q = tl.minimum(tl.maximum(tl.load(borders_q_ptr + image), 0), all_queries)
        first_k = tl.minimum(tl.maximum(tl.load(borders_k_ptr + image), 0), all_keys)
        queries = tl.minimum(tl.load(borders_q_ptr + image + 1), all_queries) - first_q
        keys = tl.minimum(tl.load(borders_k_ptr + image + 1), all_keys) - first_k
        q_start, k_start = first_q.to(tl.int64), first_k.to(tl.int64)
    return q_start, k_start, queries, keys


@triton.jit
def _first_number(image, head, all_queries, q_start, HEADS: tl.constexpr, PACKED: tl.constexpr):
    """Where the log-sum-exp of a head's queries begins."""
    return head.to(tl.int64) * all_queries + q_start if PACKED else (image * HEADS + head).to(tl.int64) * all_queries


@triton.jit
def _keys_of(first, queries, keys, offset, left, right, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LEFT: tl.constexpr,
             RIGHT: tl.constexpr, SPLIT: tl.constexpr):
    """Where the keys of a tile of queries begin, where tiles that all of them see begin and end, and where the keys end."""
    begin, end, full_begin, full_end = 0, keys, 0, keys // BLOCK_K * BLOCK_K
    if RIGHT:
        end = tl.maximum(tl.minimum(keys, tl.minimum(first + BLOCK_Q, queries) + offset + right), 0)
        full_end = tl.maximum(tl.minimum(keys, first + offset + right + 1), 0) // BLOCK_K * BLOCK_K
    if LEFT:
        begin = tl.maximum(first + offset - left, 0) // BLOCK_K * BLOCK_K
        full_begin = tl.cdiv(tl.maximum(first + BLOCK_Q - 1 + offset - left, 0), BLOCK_K) * BLOCK_K
        full_begin = tl.maximum(tl.minimum(full_begin, end), begin)
        full_end = tl.maximum(full_end, full_begin)
    if not SPLIT:
        full_begin, full_end = begin, begin
    return begin, full_begin, full_end, end


@triton.jit
def _queries_of(first, queries, offset, left, right, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LEFT: tl.constexpr,
                RIGHT: tl.constexpr, SPLIT: tl.constexpr):
    """Where the queries of a tile of keys begin, where tiles that see all of them begin and end, and where the queries end."""
    begin, end, full_begin, full_end = 0, queries, 0, queries
    if LEFT:
        end = tl.maximum(tl.minimum(queries, first + BLOCK_K - offset + left), 0)
        full_end = tl.maximum(tl.minimum(queries, first - offset + left + 1), 0) // BLOCK_Q * BLOCK_Q
    if RIGHT:
        begin = tl.maximum(first - offset - right, 0) // BLOCK_Q * BLOCK_Q
        full_begin = tl.cdiv(tl.maximum(first + BLOCK_K - 1 - offset - right, 0), BLOCK_Q) * BLOCK_Q
        full_begin = tl.maximum(tl.minimum(full_begin, end), begin)
        full_end = tl.maximum(full_end, full_begin)
    if not SPLIT:
        full_begin, full_end = begin, begin
    return begin, full_begin, full_end, end


@triton.jit
def _is_there(mask_ptr, row, column, keys, block_size, SPARSE: tl.constexpr):
    """Whether the block mask has the tile that begins here."""
    there = True
    if SPARSE:
        there = tl.load(mask_ptr + row // block_size * tl.cdiv(keys, block_size) + column // block_size) != 0
    return there


@triton.jit
def _scores(query, key, row, column, keys, offset, slope, scale, softcap, left, right, MASKED: tl.constexpr, LEFT: tl.constexpr,
            RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, SLOPES: tl.constexpr, PRECISION: tl.constexpr):
    """[queries, keys] in units of log 2, and the hyperbolic tangents of the softcap."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    bent = scores
    if SOFTCAP:
        bent = 2 * tl.sigmoid(scores * (2 * scale / softcap)) - 1           # the hyperbolic tangent
        scores = bent * (softcap * _LOG2_E)
    else:
        scores *= scale * _LOG2_E
    if SLOPES:
        scores -= slope * _LOG2_E * tl.abs(row[:, None] + offset - column[None, :]).to(tl.float32)
    if MASKED:
        visible = (column < keys)[None, :]
        if RIGHT:
            visible &= column[None, :] <= row[:, None] + offset + right
        if LEFT:
            visible &= column[None, :] >= row[:, None] + offset - left
        scores = tl.where(visible, scores, float("-inf"))
    return scores, bent


@triton.jit
def _kept(seed_ptr, row, column, threshold):
    """As `visionkit.ops.attention.dropout.kept`."""
    seed = tl.load(seed_ptr)
    mixed = _mix(_mix(row.to(tl.uint32) ^ seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32))
    return (_mix(mixed[:, None] ^ _mix(column.to(tl.uint32))[None, :]) >> 8).to(tl.int32) >= threshold


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _load_rows(ptr, stride, row, rows, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None]
    if CHANNELS != BLOCK:
        mask &= (channel < CHANNELS)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(ptr, stride, row, rows, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, values):
    channel = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (channel < CHANNELS)[None, :]
    tl.store(ptr + row.to(tl.int64)[:, None] * stride + channel[None, :], values.to(ptr.dtype.element_ty), mask=mask)
