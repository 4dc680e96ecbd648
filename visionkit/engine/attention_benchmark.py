"""What kinds of attention cost beside PyTorch's own: tiled, of packed sequences, linear."""
from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from visionkit.engine.memory import keep_freed_memory
from visionkit.engine.op_benchmark import PASSES, Call, difference, in_turns
from visionkit.ops import efficient_attention, flash_attention, linear_attention, varlen_attention
from visionkit.ops.attention import linear_attention_step

IMAGES = (64, 128, 196, 256, 400, 576, 784, 1024)            # tokens of images from 8x8 to 32x32 patches
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass
class AttentionCost:
    """One way beside the one that a study compares with, in turns; times are medians."""
    study: str
    tokens: int
    passes: str                                              # one of PASSES
    way: str
    seconds: float
    ratio: float                                             # times faster than the first way of the study, the median of the pairs
    difference: float | None                                 # the largest from the first way's results; None: it computes something else
    agrees: bool | None


def measure_flash(lengths: Sequence[int], *, heads: int = 8, channels: int = 64, causal: bool = False, repeats: int = 9,
                  device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[AttentionCost]:
    """`flash_attention` beside PyTorch's attention; on a GPU, in half precision, beside its flash kernel."""
    def pytorch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if device != "cuda" or dtype not in (torch.float16, torch.bfloat16):
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flash_attention(query, key, value, causal=causal)

    study = "flash, causal" if causal else "flash"
    for tokens in lengths:
        inputs = _random([(1, heads, tokens, channels)] * 3, device, dtype)
        yield from _measure(study, tokens, {"scaled_dot_product_attention": (pytorch, inputs), "flash_attention": (ours, inputs)}, repeats,
                            device, dtype)


def measure_varlen(lengths: Sequence[int] = IMAGES, *, heads: int = 16, channels: int = 72, repeats: int = 9, device: str = "cpu",
                   dtype: torch.dtype = torch.float32) -> Iterator[AttentionCost]:
    """`varlen_attention` beside a padded batch with a mask, a loop over the sequences, and one sequence with a mask of blocks."""
    tokens, longest = sum(lengths), max(lengths)
    inputs = _random([(tokens, heads, channels)] * 3, device, dtype)
    cu_seqlens = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)
    lengths = tuple(lengths)
    index = torch.repeat_interleave(torch.arange(len(lengths), device=device), cu_seqlens.diff().long())
    valid = torch.arange(longest, device=device) < cu_seqlens.diff()[:, None]

    def padded(*packed: Tensor) -> Tensor:
        batches = (packed_tensor.new_zeros(*valid.shape, *packed_tensor.shape[1:]).masked_scatter(valid[..., None, None], packed_tensor)
                   for packed_tensor in packed)
        output = F.scaled_dot_product_attention(*(batch.transpose(1, 2) for batch in batches), attn_mask=valid[:, None, None])
        return output.transpose(1, 2)[valid]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest, lengths_q=lengths)

    def loop(*packed: Tensor) -> Tensor:
        parts = zip(*(tensor.split(cu_seqlens.diff().tolist()) for tensor in packed), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*(tensor.transpose(0, 1)[None] for tensor in part))[0].transpose(0, 1)
                          for part in parts])

    def blocks(*packed: Tensor) -> Tensor:
        mask = index[:, None] == index
        return F.scaled_dot_product_attention(*(tensor.transpose(0, 1)[None] for tensor in packed), mask)[0].transpose(0, 1)

    ways = {"padded, with a mask": padded, "varlen_attention": ours, "loop": loop, "mask of blocks": blocks}
    yield from _measure("varlen", tokens, {name: (way, inputs) for name, way in ways.items()}, repeats, device, dtype)


def measure_linear(lengths: Sequence[int], *, heads: int = 1, channels: int = 64, causal: bool = False, repeats: int = 9,
                   device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[AttentionCost]:
    """`linear_attention` and, where not causal, `efficient_attention` beside PyTorch's attention, which they do not equal."""
    ways: dict[str, Callable] = {
        "scaled_dot_product_attention": lambda *inputs: F.scaled_dot_product_attention(*inputs, is_causal=causal),
        "linear_attention": lambda *inputs: linear_attention(*inputs, causal=causal)}
    if not causal:
        ways["efficient_attention"] = efficient_attention
    for tokens in lengths:
        inputs = _random([(1, heads, tokens, channels)] * 3, device, dtype)
        yield from _measure("linear, causal" if causal else "linear", tokens, {name: (way, inputs) for name, way in ways.items()}, repeats,
                            device, dtype, same=False)


def measure_generation(lengths: Sequence[int], *, heads: int = 8, channels: int = 64, repeats: int = 9, device: str = "cpu",
                       dtype: torch.dtype = torch.float32) -> Iterator[AttentionCost]:
    """One more token after so many: `linear_attention_step` with the state that they left, beside PyTorch's attention to all of them."""
    token = _random([(1, heads, channels)] * 3, device, dtype)
    for tokens in lengths:
        cache = _random([(1, heads, tokens, channels)] * 3, device, dtype)
        with torch.no_grad():
            _, state = linear_attention(*cache, causal=True, return_state=True)
        ways = {"scaled_dot_product_attention": lambda query, key, value: F.scaled_dot_product_attention(query[:, :, None], key, value),
                "linear_attention_step": lambda query, key, value, state=state: linear_attention_step(query, key, value, state)[0]}
        inputs = {"scaled_dot_product_attention": (token[0], *cache[1:]), "linear_attention_step": token}
        yield from _measure("generation", tokens, {name: (way, inputs[name]) for name, way in ways.items()}, repeats, device, dtype,
                            same=False, all_passes=PASSES[:1])


def crossing(rows: Sequence[AttentionCost], way: str, passes: str) -> int | None:
    """The smallest measured number of tokens from which on `way` is always the faster one; None where it never is."""
    of_way = sorted((row for row in rows if (row.way, row.passes) == (way, passes)), key=lambda row: row.tokens)
    found = None
    for row in reversed(of_way):
        if row.ratio <= 1:
            break
        found = row.tokens
    return found


def exponent(rows: Sequence[AttentionCost], way: str, passes: str) -> float | None:
    """Of the time in the number of tokens, from a thousand on (else over all): the slope of a straight line in log-log."""
    points = [(row.tokens, row.seconds) for row in rows if (row.way, row.passes) == (way, passes)]
    points = [point for point in points if point[0] >= 1024] if sum(tokens >= 1024 for tokens, _ in points) > 1 else points
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*((math.log(tokens), math.log(seconds)) for tokens, seconds in points), strict=True)).slope


def draw(rows: Sequence[AttentionCost], path: str | Path, title: str) -> None:
    """Seconds over tokens of every way, on two logarithmic axes; solid forward, dashed with backward."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for index, way in enumerate(dict.fromkeys(row.way for row in rows)):
        for passes, line in zip(PASSES, ("-", "--"), strict=True):
            points = sorted((row.tokens, row.seconds * 1e3) for row in rows if (row.way, row.passes) == (way, passes))
            if points:
                axes.plot(*zip(*points, strict=True), line, color=f"C{index}", marker="o", markersize=3, label=f"{way}, {passes}")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _random(shapes: Sequence[tuple[int, ...]], device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes)


def _measure(study: str, tokens: int, ways: dict[str, tuple[Callable, tuple]], repeats: int, device: str, dtype: torch.dtype,
             same: bool = True, all_passes: Sequence[str] = PASSES) -> Iterator[AttentionCost]:
    """All ways take turns; the first one is what the others are compared with."""
    keep_freed_memory()
    for passes in all_passes:
        calls = [Call(way, inputs, passes) for way, inputs in ways.values()]
        first = calls[0]()
        apart = [difference(call(), first, _TOLERANCE[dtype]) if same else (None, None) for call in calls]
        turns = in_turns(calls, repeats, device)
        for index, name in enumerate(ways):
            yield AttentionCost(study, tokens, passes, name, statistics.median(turn[index] for turn in turns),
                                statistics.median(turn[0] / turn[index] for turn in turns), *apart[index])
