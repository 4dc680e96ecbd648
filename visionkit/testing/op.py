"""The contract of an op: tensors in, tensors out, on any floating type, with a gradient that is true."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef

from visionkit.testing.module import promise, require


def check_op(function: Callable[..., Any], inputs: Sequence[Any], *, empty: Sequence[Any] | Mapping[str, Sequence[Any]] | None = None,
             custom_op: Any = None, dtypes: Sequence[torch.dtype] | None = None, compiles: bool = True) -> None:
    """Check that `function(*inputs)` behaves as an op.

    In order: the inputs stay as they are; the result is the same for inputs that are not contiguous; floating results have the type
    of the inputs, for each of `dtypes`; an empty input works, backward too; the gradient agrees with finite differences in float64;
    `torch.compile(fullgraph=True)` and `torch.export` take it whole and change neither result nor gradient; and an op registered
    through `torch.library` passes `torch.library.opcheck`, for the empty input too.

    Args:
        function: the op.
        inputs: its arguments; a floating tensor that requires a gradient is differentiated.
        empty: arguments of an empty call, or several by name, such as `{"no images": [...], "no boxes": [...]}`; by default the
            tensors that are as long as the first one lose all their rows.
        custom_op: the registered op behind `function`, such as `torch.ops.starter.blend.default`, if `function` is not that
            itself; it takes the same arguments.
        dtypes: the floating types it supports; by default float32, float64 and bfloat16, and float16 unless PyTorch lacks that type
            for something the op calls.
        compiles: False for an op that is meant to be called outside of compiled and exported code only.

    Raises:
        AssertionError: tells which promise is broken.
    """
    name = getattr(function, "__name__", None) or getattr(function, "_name", None) or repr(function)
    inputs = list(inputs)
    differentiable = [index for index, value in enumerate(inputs) if isinstance(value, Tensor) and value.requires_grad]

    copies = _cast(inputs, None)
    expected = list(_tensors(function(*copies)))
    require(len(expected) > 0, f"{name} returns no tensor")
    for index, (value, kept) in enumerate(zip(inputs, copies, strict=True)):
        require(not isinstance(value, Tensor) or torch.equal(value, kept), f"{name} changes its argument {index} in place")
    strided = [value.repeat_interleave(2, -1)[..., ::2] if isinstance(value, Tensor) and value.dim() else value
               for value in _cast(inputs, None)]
    for result, wanted in zip(_tensors(function(*strided)), expected, strict=True):
        require(torch.allclose(result.double(), wanted.double(), atol=1e-5, equal_nan=True),
                f"{name} gives another result for inputs that are not contiguous")

    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16) if dtypes is None else dtypes:
        try:
            with promise(f"{name} does not take {dtype}"):
                results = list(_tensors(function(*_cast(inputs, dtype))))
        except AssertionError as error:
            if dtypes is None and dtype == torch.float16 and "not implemented for 'Half'" in str(error):
                continue
            raise
        for result in results:
            require(not result.is_floating_point() or result.dtype == dtype, f"{name} returns {result.dtype} for {dtype} inputs")

    empties = dict(empty) if isinstance(empty, Mapping) else {"an empty input": _without_rows(inputs) if empty is None else empty}
    for description, arguments in empties.items():
        _check_empty(function, name, description, list(arguments))
    if differentiable:
        _check_gradient(function, name, _cast(inputs, torch.float64))
    if compiles:
        _check_compiled(function, name, inputs)
        _check_exported(function, name, inputs, expected)
    if custom_op is None and isinstance(function, (CustomOpDef, torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        custom_op = function
    if custom_op is not None:
        with promise(f"{name} fails torch.library.opcheck"):
            torch.library.opcheck(custom_op, tuple(_cast(inputs, None)))
        for description, arguments in empties.items():
            with promise(f"{name} fails torch.library.opcheck on {description}"):
                torch.library.opcheck(custom_op, tuple(_cast(arguments, None)), test_utils=("test_schema", "test_faketensor"))


def _cast(values: Sequence[Any], dtype: torch.dtype | None) -> list[Any]:
    """Copies, leaves of a graph of their own; floating tensors as `dtype`."""
    copies = []
    for value in values:
        if isinstance(value, Tensor):
            wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
            value = value.detach().clone().to(wanted).requires_grad_(value.requires_grad)
        copies.append(value)
    return copies


def _without_rows(inputs: list[Any]) -> list[Any]:
    """`inputs`, of which the tensors that are as long as the first one have lost all their rows."""
    length = next((len(value) for value in inputs if isinstance(value, Tensor) and value.dim()), None)
    return [value.detach()[:0].clone().requires_grad_(value.requires_grad)
            if isinstance(value, Tensor) and value.dim() and len(value) == length else value for value in inputs]


def _check_empty(function: Callable[..., Any], name: str, description: str, inputs: list[Any]) -> None:
    inputs = _cast(inputs, None)
    shapes = [tuple(value.shape) for value in inputs if isinstance(value, Tensor)]
    with promise(f"{name} fails on {description} of shapes {shapes}"):
        results = list(_tensors(function(*inputs)))
        total = sum(result.sum() for result in results if result.is_floating_point())
        if isinstance(total, Tensor) and total.requires_grad:
            total.backward()
    gradients = [value.grad for value in inputs if isinstance(value, Tensor) and value.requires_grad and value.grad is not None]
    for result in (*results, *gradients):
        require(not result.is_floating_point() or result.isfinite().all(), f"{name} gives values that are not finite for {description}")


def _check_gradient(function: Callable[..., Any], name: str, inputs: list[Any]) -> None:
    def differentiable_results(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(result for result in _tensors(function(*arguments)) if result.is_floating_point())

    results = differentiable_results(*inputs)
    require(any(result.requires_grad for result in results),
            f"{name} has no gradient although an argument requires one; is there a .detach(), or no register_autograd?")
    with promise(f"{name}: the gradient disagrees with finite differences"):
        torch.autograd.gradcheck(differentiable_results, tuple(inputs))


def _check_compiled(function: Callable[..., Any], name: str, inputs: list[Any]) -> None:
    """One graph, traced through the fake kernels and the registered gradient; no code is generated, so no compiler is needed."""
    eager, traced = _cast(inputs, None), _cast(inputs, None)
    expected = list(_tensors(function(*eager)))
    torch._dynamo.reset()                                    # it gives up on a function that was compiled for many other arguments
    with promise(f"{name} fails under torch.compile(fullgraph=True)"):
        results = list(_tensors(torch.compile(function, backend="aot_eager", fullgraph=True)(*traced)))
        _require_same(results, expected, f"{name} gives another result under torch.compile")
        _require_same(_gradients(results, traced), _gradients(expected, eager), f"{name} has another gradient under torch.compile")


def _check_exported(function: Callable[..., Any], name: str, inputs: list[Any], expected: list[Tensor]) -> None:
    class Program(nn.Module):
        def forward(self, *arguments: Any) -> Any:
            return function(*arguments)

    with promise(f"{name} fails under torch.export"):
        program = torch.export.export(Program(), tuple(_cast(inputs, None))).module()
        _require_same(list(_tensors(program(*_cast(inputs, None)))), expected, f"{name} gives another result once exported")


def _gradients(results: list[Tensor], inputs: list[Any]) -> list[Tensor]:
    """Gradients of the sum of `results` with respect to the tensors that require one; zeros where a result does not depend on it."""
    sources = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    total = sum(result.sum() for result in results if result.requires_grad)
    if not isinstance(total, Tensor):
        return []
    found = torch.autograd.grad(total, sources, allow_unused=True)
    return [torch.zeros_like(source) if gradient is None else gradient for source, gradient in zip(sources, found, strict=True)]


def _require_same(results: list[Tensor], expected: list[Tensor], message: str) -> None:
    require(len(results) == len(expected), f"{message}: {len(results)} tensors, not {len(expected)}")
    for result, wanted in zip(results, expected, strict=True):
        require(result.shape == wanted.shape and result.dtype == wanted.dtype,
                f"{message}: {result.dtype} {list(result.shape)}, not {wanted.dtype} {list(wanted.shape)}")
        require(torch.allclose(result.double(), wanted.double(), atol=1e-5, equal_nan=True), message)


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from _tensors(part)
