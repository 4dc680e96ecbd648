"""Kernels must compile for GPUs, which the interpreter does not show: it takes any Python."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from visionkit.ops.tiers import TRITON_OPS

pytest.importorskip("triton", reason="Triton has no wheel for this platform", exc_type=ImportError)

ATTENTION = ("flash_attention", "varlen_attention")
ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_every_kernel_compiles_for_ampere_and_hopper_in_each_type():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, Path(__file__).with_name("compile_kernels.py")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    variants = {(90, "torch.float32"), (90, "torch.bfloat16"), (90, "torch.float16"), (80, "torch.bfloat16")}
    for op in TRITON_OPS:
        compiled = [(row["capability"], row["dtype"]) for row in rows if row["op"] == op]
        # The two share their kernels, and variants, for these take long to compile.
        expected = {"flash_attention": {(90, "torch.float16")}, "varlen_attention": variants - {(90, "torch.float16")}}.get(op, variants)
        assert set(compiled) == expected
        assert len(compiled) == (3 if op in ATTENTION else 2) * len(expected), "forward and backward, of attention two"
    for row in rows:
        if row["op"] in ATTENTION:                                           # whose tiles are to fill the registers
            assert row["shared"] <= 99 * 1024, f"more shared memory than a small Ampere has: {row}"
        else:
            assert row["registers"] <= 128, row                              # four blocks fit on a multiprocessor
        assert row["stack"] <= (128 if row["op"] in ATTENTION else 64), f"registers spill: {row}"
