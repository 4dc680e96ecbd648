"""The contract of an op: tensors in, tensors out, on any floating type, with a gradient that is true."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from visionkit.testing.module import promise, require


def check_op(function: Callable[..., Any], inputs: Sequence[Any], *, empty: Sequence[Any] | None = None, custom_op: Any = None,
             dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64, torch.bfloat16)) -> None:
    """Check that `function(*inputs)` behaves as an op.

    In order: the inputs stay as they are; the result is the same for inputs that are not contiguous; floating results have the type
    of the inputs, for each of `dtypes`; an empty input works, backward too; the gradient agrees with finite differences in float64; and
    an op registered through `torch.library` passes `torch.library.opcheck`, so that compile and export may trust it.

    Args:
        function: the op.
        inputs: its arguments; a floating tensor that requires a gradient is differentiated.
        empty: arguments of an empty call; by default the tensors that are as long as the first one lose all their rows.
        custom_op: the registered op behind `function`, such as `torch.ops.starter.blend.default`, if `function` is not that
            itself; it takes the same arguments.
        dtypes: the floating types it supports.

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

    for dtype in dtypes:
        with promise(f"{name} does not take {dtype}"):
            results = list(_tensors(function(*_cast(inputs, dtype))))
        for result in results:
            require(not result.is_floating_point() or result.dtype == dtype, f"{name} returns {result.dtype} for {dtype} inputs")

    _check_empty(function, name, inputs if empty is None else list(empty), cut=empty is None)
    if differentiable:
        _check_gradient(function, name, _cast(inputs, torch.float64))
    if custom_op is None and isinstance(function, (CustomOpDef, torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        custom_op = function
    if custom_op is not None:
        with promise(f"{name} fails torch.library.opcheck"):
            torch.library.opcheck(custom_op, tuple(_cast(inputs, None)))


def _cast(values: Sequence[Any], dtype: torch.dtype | None) -> list[Any]:
    """Copies, leaves of a graph of their own; floating tensors as `dtype`."""
    copies = []
    for value in values:
        if isinstance(value, Tensor):
            wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
            value = value.detach().clone().to(wanted).requires_grad_(value.requires_grad)
        copies.append(value)
    return copies


def _check_empty(function: Callable[..., Any], name: str, inputs: list[Any], *, cut: bool) -> None:
    inputs = _cast(inputs, None)
    if cut:
        length = next((len(value) for value in inputs if isinstance(value, Tensor) and value.dim()), None)
        inputs = [value.detach()[:0].clone().requires_grad_(value.requires_grad)
                  if isinstance(value, Tensor) and value.dim() and len(value) == length else value for value in inputs]
    shapes = [tuple(value.shape) for value in inputs if isinstance(value, Tensor)]
    with promise(f"{name} fails on an empty input of shapes {shapes}"):
        results = list(_tensors(function(*inputs)))
        total = sum(result.sum() for result in results if result.is_floating_point())
        if isinstance(total, Tensor) and total.requires_grad:
            total.backward()
    for result in results:
        require(not result.is_floating_point() or result.isfinite().all(), f"{name} gives values that are not finite for an empty input")


def _check_gradient(function: Callable[..., Any], name: str, inputs: list[Any]) -> None:
    def differentiable_results(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(result for result in _tensors(function(*arguments)) if result.is_floating_point())

    results = differentiable_results(*inputs)
    require(any(result.requires_grad for result in results),
            f"{name} has no gradient although an argument requires one; is there a .detach(), or no register_autograd?")
    with promise(f"{name}: the gradient disagrees with finite differences"):
        torch.autograd.gradcheck(differentiable_results, tuple(inputs))


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from _tensors(part)
