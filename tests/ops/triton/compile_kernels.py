"""Compile every kernel for GPUs that need not be there: python compile_kernels.py, prints a line of JSON for each.

The ops are called as on a GPU, with tensors of the CPU; Triton compiles what they launch, down to machine code, and nothing runs.
"""
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from visionkit.ops import tiers
from visionkit.ops.attention import flash_attention, varlen_attention
from visionkit.ops.deform_conv import deform_conv2d
from visionkit.ops.deform_roi_pool import deform_roi_pool
from visionkit.ops.ms_deform_attention import ms_deform_attn
from visionkit.ops.ps_roi_align import ps_roi_align
from visionkit.ops.ps_roi_pool import ps_roi_pool
from visionkit.ops.roi_align import roi_align
from visionkit.ops.triton import bilinear

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Driver:
    """As much of a CUDA driver as the compiler asks."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device=None):
        return 0


def calls(dtype):
    """Op, function and differentiable inputs."""
    rois = torch.tensor([[0, 8.0, 8, 90, 80]])
    shapes, starts = torch.tensor([[16, 16], [8, 8]]), torch.tensor([0, 256])

    def maps(channels):
        return torch.zeros(2, channels, 16, 16, dtype=dtype, requires_grad=True)

    yield "roi_align", lambda x: roi_align(x, rois, 7, 1 / 16, 2), [maps(256)]
    yield "ps_roi_align", lambda x: ps_roi_align(x, rois, 7, 1 / 16, 2), [maps(21 * 49)]
    yield "ps_roi_pool", lambda x: ps_roi_pool(x, rois, 7, 1 / 16), [maps(21 * 49)]
    yield "deform_roi_pool", lambda x, d: deform_roi_pool(x, rois, d, 7, 1 / 16), [maps(256), torch.zeros(1, 2, 7, 7, requires_grad=True)]
    yield "ms_deform_attn", lambda *inputs: ms_deform_attn(inputs[0], shapes, starts, *inputs[1:]), [
        torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in ((2, 320, 8, 32), (2, 5, 8, 2, 4, 2), (2, 5, 8, 2, 4))]
    yield "deform_conv2d", lambda x, d, m, w: deform_conv2d(x, d, w, padding=1, mask=m), [
        maps(256), *(torch.ones(shape, dtype=dtype, requires_grad=True) for shape in ((2, 18, 16, 16), (2, 9, 16, 16), (8, 256, 3, 3)))]
    # These two have the same kernels: with all that can be asked for in one type, plain in the others. Rows of other lengths have tiles of
    # their own, which take minutes more to compile.
    if dtype == torch.float16:
        options = {"window": (9, 9), "softcap": 30.0, "dropout_p": 0.1, "alibi_slopes": torch.ones(8),
                   "block_mask": torch.ones(5, 5, dtype=torch.bool)}
        yield "flash_attention", lambda *inputs: flash_attention(*inputs, **options), [
            torch.zeros(2, heads, 300, 64, dtype=dtype, requires_grad=True) for heads in (8, 2, 2)]
        return
    borders = torch.tensor([0, 100, 300], dtype=torch.int32)
    yield "varlen_attention", lambda *inputs: varlen_attention(*inputs, borders, borders, causal=True), [
        torch.zeros(300, heads, 64, dtype=dtype, requires_grad=True) for heads in (8, 2, 2)]


def compile_kernels(capability, dtype):
    driver.set_active(Driver(capability))
    bilinear._adds_four = lambda device: capability >= 90
    compiled = {}
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        assert all(1 <= size <= limit for size, limit in zip(grid, (2**31 - 1, 65535, 65535), strict=False)), grid
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        compiled[kernel.hash] = self.__name__, kernel

    JITFunction.run = compile_only
    try:
        for op, function, inputs in calls(dtype):
            compiled.clear()
            output = function(*inputs)
            torch.autograd.grad(output, inputs, torch.zeros_like(output))
            for name, kernel in compiled.values():
                yield {"op": op, "kernel": name, "capability": capability, "dtype": str(dtype), "threads": 32 * kernel.metadata.num_warps,
                       "shared": kernel.metadata.shared, "shape": list(inputs[0].shape), **resources(kernel.asm["cubin"])}
    finally:
        JITFunction.run = run


def resources(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {"registers": int(registers), "stack": int(stack)}


if __name__ == "__main__":
    tiers.tier = lambda *_: tiers.Tier("triton", "only to compile")
    for capability, dtype in ((90, torch.float32), (90, torch.bfloat16), (90, torch.float16), (80, torch.bfloat16)):
        for row in compile_kernels(capability, dtype):
            print(json.dumps(row), flush=True)
