"""Each check is seen to pass on a sound op and to fail on one that breaks exactly that promise."""
from types import SimpleNamespace

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


@torch.library.custom_op("visionkit_test::double_whose_fake_is_never_empty", mutates_args=())
def double_whose_fake_is_never_empty(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@double_whose_fake_is_never_empty.register_fake
def _(x):
    return x.new_empty(max(len(x), 1), *x.shape[1:])


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


def sound_cube(x):
    return x ** 3


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


def looks_at_values(x):
    return x * 2 if len(x) and x[0, 0].item() < 0 else x * 3


def other_when_compiled(x):
    return x * 3 if torch.compiler.is_compiling() else x * 2


def wider_when_compiled(x):
    return x.double() * 2 if torch.compiler.is_compiling() else x * 2


def other_slope_when_compiled(x):
    return x * 3 - x.detach() if torch.compiler.is_compiling() else x * 2


def no_slope_when_compiled(x):
    return x.detach() * 2 if torch.compiler.is_compiling() else x * 2


def wrong_half(x):
    return x.float() * 2 if x.dtype == torch.float16 else x * 2


def no_float16(x):
    if x.dtype == torch.float16:
        raise RuntimeError("\"blend\" not implemented for 'Half'")
    return x * 2


def overflows_in_float16(x):
    if x.dtype == torch.float16:
        raise OverflowError("too large")
    return x * 2


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
    (looks_at_values, r"looks_at_values fails under torch.compile\(fullgraph=True\)"),
    (other_when_compiled, "other_when_compiled gives another result under torch.compile"),
    (wider_when_compiled, "another result under torch.compile: torch.float64"),
    (other_slope_when_compiled, "other_slope_when_compiled has another gradient under torch.compile"),
    (no_slope_when_compiled, "has another gradient under torch.compile: 0 tensors, not 1"),
    (wrong_half, "wrong_half returns torch.float32 for torch.float16 inputs"),
    (overflows_in_float16, "overflows_in_float16 does not take torch.float16"),
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
    with pytest.raises(AssertionError, match="fails torch.library.opcheck on an empty input"):
        check_op(double_whose_fake_is_never_empty, (torch.ones(3),))


def test_an_empty_call_can_be_given():
    def pair(boxes, scores):
        if not len(scores):
            raise RuntimeError("no scores")
        return boxes.sum(-1)[:, None] * scores
    arguments = (x(3), torch.ones(2))
    check_op(pair, arguments)                                # only the three boxes lose their rows
    with pytest.raises(AssertionError, match="no scores"):
        check_op(pair, arguments, empty=(x(3)[:0].detach(), torch.ones(0)))


def test_empty_calls_have_names():
    def pair(boxes, scores):
        if not len(scores):
            raise RuntimeError("no scores")
        return boxes.sum(-1)[:, None] * scores
    calls = {"no boxes": (x(3)[:0].detach(), torch.ones(2)), "no scores": (x(3), torch.ones(0))}
    with pytest.raises(AssertionError, match=r"pair fails on no scores of shapes \[\(3, 4\), \(0,\)\]"):
        check_op(pair, (x(3), torch.ones(2)), empty=calls)


def test_a_gradient_on_an_empty_input_is_finite():
    with pytest.raises(AssertionError, match="not finite for an empty input"):
        check_op(lambda x, weight: (x.sum() * weight).sqrt(), (x(), torch.ones(4, requires_grad=True)))


def test_an_op_whose_arguments_cannot_be_exported_is_named():
    class Settings:
        factor = 2

    def scale(x, settings):
        return x * settings.factor
    with pytest.raises(AssertionError, match="scale fails under torch.export"):
        check_op(scale, (x(), Settings()))
    check_op(lambda x: scale(x, Settings()), (x(),))


def test_an_exported_program_gives_the_same_result(monkeypatch):
    monkeypatch.setattr(torch.export, "export", lambda module, arguments: SimpleNamespace(module=lambda: lambda x: module(x) * 2))
    with pytest.raises(AssertionError, match="sound_cube gives another result once exported"):
        check_op(sound_cube, (x(),))


def test_an_op_may_be_for_eager_code_only():
    check_op(looks_at_values, (x(),), compiles=False)


def test_float16_is_only_owed_where_pytorch_has_it_or_where_it_is_named():
    check_op(no_float16, (x(),))
    with pytest.raises(AssertionError, match="no_float16 does not take torch.float16"):
        check_op(no_float16, (x(),), dtypes=(torch.float16,))


def test_one_op_can_be_checked_for_many_arguments():
    def shout(x, word):
        return x * len(word)
    for power in range(12):                                  # more than torch.compile recompiles a function for
        check_op(shout, (torch.ones(3), "a" * power), dtypes=(torch.float32,))


def test_a_result_need_not_depend_on_every_argument():
    check_op(lambda x, idle: x * 2, (x(), torch.ones(2, requires_grad=True)))
