import math

import pytest
import torch

from visionkit.ops import SigmoidFocalLoss, sigmoid_focal_loss
from visionkit.registry import OPS

SETTINGS = [(0.25, 2), (-1, 0), (0.5, 1.5), (0.9, 0.5), (0, 1), (1, 3)]


def random_case(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 4
    return logits.to(dtype), (torch.rand(shape, generator=generator) < 0.3).to(dtype)


def focal_loss_by_hand(logit: float, target: float, alpha: float, gamma: float) -> float:
    """Equation 5 for one logit."""
    p = 1 / (1 + math.exp(-logit))
    p_t = p if target == 1 else 1 - p
    alpha_t = 1 if alpha < 0 else alpha if target == 1 else 1 - alpha
    return -alpha_t * (1 - p_t)**gamma * math.log(p_t)


def test_an_undecided_logit_costs_a_share_of_log_2():
    loss = sigmoid_focal_loss(torch.zeros(2), torch.tensor([1.0, 0.0]))
    assert loss.tolist() == pytest.approx([0.25 * 0.25 * math.log(2), 0.75 * 0.25 * math.log(2)])


@pytest.mark.parametrize("alpha, gamma", SETTINGS)
def test_focal_loss_agrees_with_the_definition(alpha, gamma):
    logits, targets = random_case(40)
    expected = [focal_loss_by_hand(*pair, alpha, gamma) for pair in zip(logits.tolist(), targets.tolist(), strict=True)]
    torch.testing.assert_close(sigmoid_focal_loss(logits, targets, alpha, gamma), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("alpha, gamma", SETTINGS)
def test_gradients_are_true(alpha, gamma):
    logits, targets = random_case(5, 4)
    assert torch.autograd.gradcheck(lambda x: sigmoid_focal_loss(x, targets, alpha, gamma), logits.requires_grad_())
    soft = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda x: sigmoid_focal_loss(x, soft, alpha, gamma), logits)


@pytest.mark.parametrize("gamma", [0, 0.5, 2])
def test_both_tails_are_as_exact_as_in_float64(gamma):
    logits = torch.tensor([-200.0, -90, -30, -8, 0, 8, 30, 90, 200]).repeat(2).requires_grad_()
    targets = torch.tensor([1.0] * 9 + [0.0] * 9)
    exact_logits = logits.detach().double().requires_grad_()
    loss, exact = sigmoid_focal_loss(logits, targets, gamma=gamma), sigmoid_focal_loss(exact_logits, targets, gamma=gamma)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-36)
    loss.sum().backward()
    exact.sum().backward()
    torch.testing.assert_close(logits.grad.double(), exact_logits.grad, rtol=1e-5, atol=1e-36)
    assert loss[0].item() == pytest.approx(0.25 * 200)                      # wrong and sure: the whole logit


def test_reductions_are_the_mean_and_the_sum():
    logits, targets = random_case(3, 4)
    loss = sigmoid_focal_loss(logits, targets)
    assert sigmoid_focal_loss(logits, targets, reduction="mean") == loss.mean()
    assert sigmoid_focal_loss(logits, targets, reduction="sum") == loss.sum()
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(sigmoid_focal_loss(logits, targets, reduction="sum"), logits)
    (mean_gradient,) = torch.autograd.grad(sigmoid_focal_loss(logits, targets, reduction="mean"), logits)
    torch.testing.assert_close(mean_gradient, gradient / 12)


def test_many_logits_are_taken_in_pieces():
    logits, targets = random_case(300, 1000, dtype=torch.float32)
    logits.requires_grad_()
    loss = sigmoid_focal_loss(logits, targets)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    for rows in (slice(0, 2), slice(130, 132), slice(298, 300)):
        few = logits.detach()[rows].clone().requires_grad_()
        torch.testing.assert_close(loss[rows], sigmoid_focal_loss(few, targets[rows]))
        torch.testing.assert_close(gradient[rows], torch.autograd.grad(sigmoid_focal_loss(few, targets[rows]).sum(), few)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logits, targets = random_case(50, dtype=dtype)
    logits.requires_grad_()
    exact_logits = logits.detach().float().requires_grad_()
    loss, exact = sigmoid_focal_loss(logits, targets), sigmoid_focal_loss(exact_logits, targets.float())
    assert torch.equal(loss, exact.to(dtype))
    assert torch.equal(torch.autograd.grad(loss.sum(), logits)[0], torch.autograd.grad(exact.sum(), exact_logits)[0].to(dtype))


def test_scaled_gradients_of_easy_examples_survive_float16():
    logits = torch.full((1,), -7.0, dtype=torch.float16, requires_grad=True)                     # a slope of 1.6e-9
    sigmoid_focal_loss(logits, torch.zeros(1)).backward(torch.full((1,), 2.0**15, dtype=torch.float16))
    assert logits.grad.item() == pytest.approx(0.75 * 3 * 9.11e-4**3 * 2**15, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64])
def test_targets_may_be_of_any_type(dtype):
    logits, targets = random_case(20, dtype=torch.float32)
    assert torch.equal(sigmoid_focal_loss(logits, targets.to(dtype)), sigmoid_focal_loss(logits, targets))


def test_strided_inputs_give_the_same_numbers():
    logits, targets = random_case(6, 5)
    expected = sigmoid_focal_loss(logits, targets)
    strided = logits.t().contiguous().t().requires_grad_()
    assert torch.equal(sigmoid_focal_loss(strided, targets.repeat_interleave(2, 1)[:, ::2]), expected)
    (gradient,) = torch.autograd.grad(sigmoid_focal_loss(strided, targets).sum(), strided)
    assert torch.equal(gradient, torch.autograd.grad(sigmoid_focal_loss(logits.requires_grad_(), targets).sum(), logits)[0])


@pytest.mark.parametrize("shape", [(0,), (0, 80), ()])
def test_no_logits_and_a_single_one(shape):
    logits = torch.zeros(shape, requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.ones(shape))
    assert loss.shape == shape
    loss.sum().backward()
    assert logits.grad.shape == shape


def test_backward_gives_the_same_bits_every_time():
    logits, targets = random_case(100, 80, dtype=torch.float32)
    logits.requires_grad_()
    first, second = (torch.autograd.grad(sigmoid_focal_loss(logits, targets).square().sum(), logits)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_second_derivative_is_an_error():
    logits, targets = random_case(3)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(sigmoid_focal_loss(logits, targets).square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="sigmoid_focal_loss_backward"):
        torch.autograd.grad(gradient.sum(), logits)


@pytest.mark.parametrize("change, message", [
    ({"inputs": torch.zeros(3, dtype=torch.int64)}, "inputs must be floating-point numbers, got torch.int64"),
    ({"targets": torch.zeros(4)}, r"one target, got inputs \[3\] and targets \[4\]"),
    ({"targets": torch.zeros(3, device="meta")}, "inputs are on cpu, targets on meta"),
    ({"targets": torch.zeros(3, requires_grad=True)}, "targets require a gradient"),
    ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], or be -1"),
    ({"gamma": -1}, "gamma must not be negative"),
    ({"reduction": "max"}, "reduction must be 'none', 'mean' or 'sum', got 'max'"),
], ids=["inputs", "shape", "device", "gradient", "alpha", "gamma", "reduction"])
def test_focal_loss_tells_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        sigmoid_focal_loss(**{"inputs": torch.zeros(3), "targets": torch.zeros(3)} | change)


@pytest.mark.parametrize("with_slope", [True, False])
def test_focal_loss_is_one_operator_to_the_compiler(with_slope):
    logits, targets = random_case(4, 3, dtype=torch.float32)
    arguments = (logits.requires_grad_(with_slope), targets, 0.25, 2.0, with_slope)
    torch.library.opcheck(torch.ops.visionkit.sigmoid_focal_loss.default, arguments)
    torch.library.opcheck(torch.ops.visionkit.sigmoid_focal_loss_backward.default, (logits.detach(), targets))


def test_focal_loss_compiles_and_exports():
    logits, targets = random_case(4, 3, dtype=torch.float32)
    logits.requires_grad_()
    module = SigmoidFocalLoss(reduction="sum")
    expected = torch.autograd.grad(module(logits, targets), logits)[0]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(logits, targets), logits)[0], expected)
    program = torch.export.export(module, (logits.detach(), targets), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},) * 2)
    more, targets = random_case(7, 3, dtype=torch.float32)
    torch.testing.assert_close(program.module()(more, targets), module(more, targets))


def test_the_module_calls_the_function_with_its_settings():
    logits, targets = random_case(5)
    module = OPS.build({"type": "SigmoidFocalLoss", "alpha": 0.5, "gamma": 1, "reduction": "mean"})
    assert torch.equal(module(logits, targets), sigmoid_focal_loss(logits, targets, 0.5, 1, "mean"))
    assert repr(module) == "SigmoidFocalLoss(alpha=0.5, gamma=1, reduction='mean')"


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("alpha, gamma", SETTINGS[:4])
def test_focal_loss_is_torchvisions(alpha, gamma, soft):
    peer = pytest.importorskip("torchvision", reason="the peer to compare with is not installed", exc_type=ImportError).ops
    logits, targets = random_case(30, 4)
    logits.requires_grad_()
    if soft:
        targets = torch.rand(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = (function(logits, targets, alpha, gamma) for function in (sigmoid_focal_loss, peer.sigmoid_focal_loss))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, theirs)), rtol=0, atol=1e-10)
