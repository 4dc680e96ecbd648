"""What a block of MoonViT costs on packed images beside the same block on the same images padded to the longest."""
from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visionkit.engine.memory import keep_freed_memory
from visionkit.engine.op_benchmark import PASSES, in_turns, peak_of
from visionkit.models.layers import VisionTransformerBlock, patch_coordinates, rotated, rotation_2d
from visionkit.structures import PackedSequence

TIME_BAR, MEMORY_BAR = 2.4, 0.5                              # times faster, at least; share of the padded block's memory, at most
FORMS = ("packed", "padded")

# B images of L patches at most, T in all, C channels


@dataclass(frozen=True)
class Shape:
    """A block and what it is given."""
    channels: int = 1152
    num_heads: int = 16
    hidden_channels: int = 4304
    # 64 to 1024 patches, 3428 in all; padded, 8192
    grids: tuple[tuple[int, int], ...] = ((8, 8), (10, 12), (12, 16), (16, 18), (16, 26), (24, 24), (22, 34), (32, 32))


@dataclass
class BlockCost:
    """Of one block in float32; times are medians."""
    passes: str                                              # one of PASSES
    packed_seconds: float
    padded_seconds: float
    times_faster: float                                      # the median over timings that followed each other
    difference: float                                        # the largest, of the outputs on patches or the gradients of the weights
    packed_bytes: int | None = None                          # at the peak, over block and input; None where the system does not tell
    padded_bytes: int | None = None

    @property
    def memory(self) -> float | None:
        """Packed over padded."""
        return self.packed_bytes / self.padded_bytes if self.packed_bytes and self.padded_bytes else None


def measure_packing(repeats: int = 9, shape: Shape = Shape(), memory: bool = True, device: str = "cpu") -> Iterator[BlockCost]:
    """Times in turns, the peak memory of each form and pass in a process of its own."""
    bytes_of = {(form, passes): _peak_in_a_process(form, passes, shape, device) if memory else None for passes in PASSES for form in FORMS}
    keep_freed_memory()
    for passes in PASSES:
        calls = [build_call(form, passes, shape, device) for form in FORMS]
        results = [call() for call in calls]
        apart = max((a - b).abs().max().item() for a, b in zip(*results, strict=True))
        turns = in_turns(calls, repeats, device)
        packed, padded = map(statistics.median, zip(*turns, strict=True))
        yield BlockCost(passes, packed, padded, statistics.median(theirs / ours for ours, theirs in turns), apart,
                        bytes_of["packed", passes], bytes_of["padded", passes])


def build_call(form: str, passes: str, shape: Shape = Shape(), device: str = "cpu") -> Callable[[], Sequence[Tensor]]:
    """A pass through the block, packed or padded, whose results can be compared: the tokens of the images, [T, C], or the gradients of the
    weights for the same random gradients of those tokens."""
    torch.manual_seed(0)
    block = VisionTransformerBlock(shape.channels, shape.num_heads, shape.hidden_channels, "gelu_tanh", 1e-5).to(device)
    images = PackedSequence.of_grids(torch.randn(sum(h * w for h, w in shape.grids), shape.channels), shape.grids)
    incoming = torch.randn(images.tokens.shape).to(device)
    images = PackedSequence.of_grids(images.tokens.to(device), shape.grids)
    rotation = rotation_2d(*patch_coordinates(images), shape.channels // shape.num_heads)
    if form == "padded":
        x, valid = images.to_padded()
        turning = images.replace(rotation).to_padded(1.0)[0]
        incoming = images.replace(incoming).to_padded()[0]

    def forward() -> Tensor:
        if form == "packed":
            return block(images.tokens, images.cu_seqlens, images.lengths, rotation)
        return padded_block(block, x, valid, turning)

    def forward_only() -> Sequence[Tensor]:
        with torch.no_grad():
            output = forward()
        return [output if form == "packed" else output[valid]]

    def forward_and_backward() -> Sequence[Tensor]:
        return torch.autograd.grad(forward(), list(block.parameters()), incoming)

    return forward_only if passes == PASSES[0] else forward_and_backward


def padded_block(block: VisionTransformerBlock, x: Tensor, valid: Tensor, rotation: Tensor) -> Tensor:
    """What others do: every layer computes on padding too, and a mask keeps attention off it.

    Args:
        block: has the weights.
        x: [B, L, C].
        valid: [B, L] bool, false on padding.
        rotation: [B, L, D / 2].
    """
    attention = block.attention
    qkv = attention.qkv(block.attention_norm(x)).unflatten(2, (3, attention.num_heads, -1))                   # [B, L, 3, H, D]
    qk = rotated(qkv[:, :, :2].flatten(0, 1), rotation.flatten(0, 1)).unflatten(0, valid.shape)
    q, k, v = (heads.transpose(1, 2) for heads in (*qk.unbind(2), qkv[:, :, 2]))                              # [B, H, L, D]
    read = F.scaled_dot_product_attention(q, k, v, valid[:, None, None])
    x = x + attention.output(read.transpose(1, 2).flatten(2))
    return x + block.feed_forward(block.feed_forward_norm(x))


def _peak_in_a_process(form: str, passes: str, shape: Shape, device: str) -> int | None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_peak, form, passes, shape, device, torch.get_num_threads()).result()


def _peak(form: str, passes: str, shape: Shape, device: str, threads: int) -> int | None:
    torch.set_num_threads(threads)
    call = build_call(form, passes, shape, device)
    call()                                                   # libraries set themselves up
    return peak_of(call, device)
