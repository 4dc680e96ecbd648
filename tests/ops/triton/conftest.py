"""Ops on both tiers, on a GPU where there is one and in Triton's interpreter where there is none."""
import pytest
import torch

from visionkit.ops import tiers


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
        inputs = [among_nans(value.detach().to(device)).requires_grad_(value.requires_grad) for value in inputs]
        output = function(*inputs)
        wanted = [value for value in inputs if value.requires_grad]
        return [output.detach(), *torch.autograd.grad(output, wanted, grad.to(output))]

    def among_nans(tensor):
        """A copy in the midst of NaNs, to show what is read beside it."""
        if not tensor.is_floating_point() or not tensor.numel():
            return tensor
        memory = tensor.new_full((tensor.numel() + 512,), float("nan"))
        return memory.as_strided(tensor.shape, tensor.stride(), 256).copy_(tensor)

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
