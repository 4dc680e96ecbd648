"""Ops on both tiers, on a GPU where there is one and in Triton's interpreter where there is none."""
import importlib

import numpy as np
import pytest
import torch

from visionkit.ops import tiers


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)           # products in half the digits would hide what differs
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def accesses_are_checked(device, monkeypatch):
    """In the interpreter, kernels may touch nothing but their tensors; a GPU may not notice."""
    triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform", exc_type=ImportError)
    interpreter, tl = importlib.import_module("triton.runtime.interpreter"), importlib.import_module("triton.language")
    if device.type == "cuda":
        return
    triton_version, numpy_version = (tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, np))
    if triton_version < (3, 7) and numpy_version >= (2, 4):
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not run with NumPy {np.__version__}")
    ranges = []
    host_arguments = interpreter.GridExecutor._init_args_hst

    def remember_tensors(executor, *arguments):
        assert all(executor.grid), "a GPU refuses to launch no program"
        hosts = host_arguments(executor, *arguments)
        ranges[:] = [span(tensor) for tensor in hosts[0] if isinstance(tensor, torch.Tensor)]
        return hosts

    def span(tensor):
        """First and last address of a tensor, which may be a view."""
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1 if tensor.numel() else 0
        return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.itemsize

    def check(pointers, mask, bytes):
        touched = np.broadcast_to(pointers, np.broadcast_shapes(pointers.shape, mask.shape))[mask].astype(np.int64)
        within = np.zeros(touched.shape, bool)
        for start, end in ranges:
            within |= (touched >= start) & (touched + bytes <= end)
        assert within.all(), "a kernel reads or writes outside of its tensors"

    class Checked:
        def __getattr__(self, name):
            return getattr(memory, name)

        def load(self, pointers, mask, other, dtype):
            check(pointers, mask, dtype.itemsize)
            return memory.load(pointers, mask, other, dtype)

        def store(self, pointers, values, mask):
            check(pointers, mask, values.dtype.itemsize)
            return memory.store(pointers, values, mask)

        def atomic_rmw(self, operation, pointers, values, mask, order):
            check(pointers, mask, values.dtype.itemsize)
            return memory.atomic_rmw(operation, pointers, values, mask, order)

    dot = interpreter.InterpreterBuilder.create_dot

    def dot_of_numbers(builder, one, other, *arguments):
        """Triton 3.8 multiplies the bits of bfloat16 as if they were whole numbers."""
        wide = [interpreter.TensorHandle((factor.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
                if factor.dtype.scalar == tl.bfloat16 else factor for factor in (one, other)]
        return dot(builder, *wide, *arguments)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_numbers)
    memory = interpreter._interpreter
    monkeypatch.setattr(interpreter, "_interpreter", Checked())
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", remember_tensors)


@pytest.fixture
def on_tier(monkeypatch):
    """Call a function with the ops in it served by one tier, whatever the device."""
    def call(name, function, *arguments):
        asked = []
        with monkeypatch.context() as patch:
            patch.setattr(tiers, "tier", lambda op, *_: asked.append(op) or tiers.Tier(name, "the test says so"))
            result = function(*arguments)
        assert asked or name == "portable", "no op asked which tier serves it"
        return result

    return call


@pytest.fixture
def assert_tiers_agree(on_tier, device):
    """Compare results, gradients and memory orders of a function of tensors on both tiers."""
    def with_gradients(function, inputs, grad):
        inputs = [value.detach().to(device).requires_grad_(value.requires_grad) for value in inputs]
        output = function(*inputs)
        wanted = [value for value in inputs if value.requires_grad]
        return [output.detach(), *torch.autograd.grad(output, wanted, grad.to(output))]

    def memory_order(tensor):
        return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1] if tensor.numel() else []

    def check(function, *inputs, **tolerances):
        shape = on_tier("portable", function, *(value.detach().to(device) for value in inputs)).shape
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        expected = on_tier("portable", with_gradients, function, inputs, grad)
        for ours, theirs in zip(on_tier("triton", with_gradients, function, inputs, grad), expected, strict=True):
            usual = {"rtol": 1e-5, "atol": 1e-5} if ours.dtype == torch.float32 else {}
            torch.testing.assert_close(ours, theirs, **(tolerances or usual))
            assert memory_order(ours) == memory_order(theirs)

    return check
