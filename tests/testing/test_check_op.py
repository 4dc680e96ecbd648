"""Each check is seen to pass on a sound op and to fail on one that breaks exactly that promise."""
import pytest
import torch

from visionkit.testing import check_op


@torch.library.custom_op("visionkit_test::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x ** 3


@cube.register_fake
def _(x):
    return torch.empty_like(x)


cube.register_autograd(lambda ctx, gradient: 3 * ctx.saved_tensors[0] ** 2 * gradient,
                       setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]))


@torch.library.custom_op("visionkit_test::cube_of_wrong_shape", mutates_args=())
def cube_of_wrong_shape(x: torch.Tensor) -> torch.Tensor:
    return x ** 3


@cube_of_wrong_shape.register_fake
def _(x):
    return x.new_empty(len(x) + 1)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x * 2

    @staticmethod
    def backward(context, gradient):
        return gradient * 3


def sound(x, weight):
    return (x * weight).sum(-1), x.argmax(-1) if len(x) else torch.zeros(0, dtype=torch.long)


def x(rows=3):
    return torch.linspace(-1, 2, rows * 4).view(rows, 4).requires_grad_()


@pytest.mark.parametrize("function, inputs", [
    (sound, (x(), torch.tensor([1.0, 2.0, 3.0, 4.0]))), (cube, (x(),)), (torch.nn.functional.leaky_relu, (x(), 0.1)),
], ids=["two results", "torch.library", "a python number"])
def test_a_sound_op_passes(function, inputs):
    check_op(function, inputs)
    assert inputs[0].grad is None


def in_place(x):
    return x.mul_(2)


def needs_contiguous(x):
    return torch.as_strided(x, (x.numel(),), (1,)) if len(x) else x.sum()[None]


def always_float(x):
    return x.float() * 2


def never_half(x):
    if x.dtype == torch.bfloat16:
        raise RuntimeError("not implemented for 'BFloat16'")
    return x * 2


def no_empty(x):
    return x.amax(0)


def nan_on_empty(x):
    return x.mean(0)


def detached(x):
    return x.detach() * 2


def nothing(x):
    return None


@pytest.mark.parametrize("function, message", [
    (in_place, "in_place changes its argument 0 in place"),
    (needs_contiguous, "inputs that are not contiguous"),
    (always_float, "always_float returns torch.float32 for torch.float64 inputs"),
    (never_half, "does not take torch.bfloat16"),
    (no_empty, "fails on an empty input of shapes"),
    (nan_on_empty, "not finite for an empty input"),
    (detached, "has no gradient"),
    (WrongGradient.apply, "disagrees with finite differences"),
    (nothing, "returns no tensor"),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_promise_is_named(function, message):
    argument = x()
    if function is in_place:
        argument = argument.detach()
    with pytest.raises(AssertionError, match=message):
        check_op(function, (argument,))


def test_a_custom_op_whose_fake_lies_fails_opcheck():
    with pytest.raises(AssertionError, match="fails torch.library.opcheck"):
        check_op(cube_of_wrong_shape, (torch.ones(3),))
    with pytest.raises(AssertionError, match="fails torch.library.opcheck"):
        check_op(lambda x: cube_of_wrong_shape(x), (torch.ones(3),), custom_op=cube_of_wrong_shape)


def test_an_empty_call_can_be_given():
    def pair(boxes, scores):
        if not len(scores):
            raise RuntimeError("no scores")
        return boxes.sum(-1)[:, None] * scores
    arguments = (x(3), torch.ones(2))
    check_op(pair, arguments)                                # only the three boxes lose their rows
    with pytest.raises(AssertionError, match="no scores"):
        check_op(pair, arguments, empty=(x(3)[:0].detach(), torch.ones(0)))
