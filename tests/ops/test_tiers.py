import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch

from visionkit.ops import tiers

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def h100(monkeypatch):
    """As if an H100 and Triton were here."""
    monkeypatch.delenv("VISIONKIT_OPS", raising=False)
    monkeypatch.setattr(tiers, "_triton_installed", lambda: True)
    monkeypatch.setattr(tiers, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.mark.parametrize("setting", ["auto", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_serve_a_gpu(h100, monkeypatch, setting, dtype):
    monkeypatch.setenv("VISIONKIT_OPS", setting)
    assert {tiers.tier(op, CUDA, dtype).name for op in tiers.TRITON_OPS} == {"triton"}


def test_all_else_is_served_by_the_portable_tier_and_the_reason_is_told(h100, monkeypatch):
    def reason(*arguments):
        name, why = tiers.tier(*arguments)
        assert name == "portable"
        return why

    assert "no kernel" in reason("nms", CUDA)
    assert "on cpu" in reason("roi_align", CPU)
    assert "float64" in reason("roi_align", CUDA, torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(tiers, "_triton_installed", lambda: False)
        assert "not installed" in reason("roi_align", CUDA)
    with monkeypatch.context() as patch:
        patch.setattr(tiers, "_capability", lambda device: (6, 1))
        assert "7.0, this GPU has 6.1" in reason("roi_align", CUDA)
        patch.setattr(torch.version, "hip", "6.2")                           # AMD numbers its GPUs otherwise
        assert tiers.tier("roi_align", CUDA).name == "triton"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert "use_deterministic_algorithms" in reason("roi_align", CUDA)
    monkeypatch.setenv("VISIONKIT_OPS", "portable")
    assert reason("roi_align", CUDA) == "VISIONKIT_OPS=portable"


def test_kernels_of_attention_are_deterministic_and_flash_attn_goes_first(h100, monkeypatch):
    monkeypatch.setattr(tiers, "_flash_attn_installed", lambda: True)
    assert tiers.tier("varlen_attention", CUDA, torch.bfloat16) == ("flash_attn", "CUDA, half precision, and flash-attn is installed")
    assert tiers.tier("varlen_attention", CUDA, torch.float32).name == "triton"
    with monkeypatch.context() as patch:                                     # flash-attn refuses a Turing, Triton does not
        patch.setattr(tiers, "_capability", lambda device: (7, 5))
        assert tiers.tier("varlen_attention", CUDA, torch.float16) == ("triton", "CUDA, and triton is installed")
    assert tiers.tier("flash_attention", CUDA, torch.bfloat16).name == "triton"           # which is ours by name
    assert "scaled_dot_product_attention" in tiers.tier("attention", CUDA).reason
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert {tiers.tier(op, CUDA, torch.bfloat16).name for op in ("varlen_attention", "flash_attention")} == {"triton"}


def test_a_tier_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("VISIONKIT_OPS", "cuda")
    with pytest.raises(ValueError, match="must be 'auto' or 'portable', got 'cuda'"):
        tiers.kernels("nms", torch.zeros(1))


def test_kernels_are_looked_up_for_the_tensor_at_each_call(h100, monkeypatch):
    pytest.importorskip("triton", reason="Triton has no wheel for this platform", exc_type=ImportError)
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(tiers, "tier", lambda *arguments: asked.append(arguments) or tiers.Tier("triton", ""))
        assert tiers.kernels("roi_align", torch.zeros(1, dtype=torch.bfloat16)).__name__ == "visionkit.ops.triton.roi_align"
    assert asked == [("roi_align", CPU, torch.bfloat16)]
    assert tiers.kernels("roi_align", torch.zeros(1)) is None


@pytest.mark.parametrize("op", tiers.TRITON_OPS)
def test_each_module_of_kernels_takes_what_the_portable_op_takes(op):
    pytest.importorskip("triton", reason="Triton has no wheel for this platform", exc_type=ImportError)
    module = importlib.import_module(f"visionkit.ops.triton.{op}")
    if op == "deform_conv2d":                                                # of which kernels do the sampling only
        from visionkit.ops.deform_conv import Sampler
        methods = [name for name in vars(Sampler) if name == "__init__" or not name.startswith("_")]
        assert len(methods) == 5
        for name in methods:
            assert inspect.signature(getattr(module.Sampler, name)) == inspect.signature(getattr(Sampler, name))
        return
    for function, name in ((module.forward, op), (module.backward, f"{op}_backward")):
        schema = getattr(torch.ops.visionkit, name).default._schema
        assert list(inspect.signature(function).parameters) == [argument.name for argument in schema.arguments]


def test_triton_is_imported_only_where_it_serves():
    importers = set()
    for source in (ROOT / "visionkit").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            names = [name.name for name in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            names = [f"{node.module}.{name}" for name in names] if isinstance(node, ast.ImportFrom) else names
            if any(name.startswith(("triton", "visionkit.ops.triton")) for name in names):
                importers.add(source.parent.relative_to(ROOT).as_posix())
    assert importers == {"visionkit/ops/triton"}
