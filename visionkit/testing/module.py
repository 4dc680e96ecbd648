"""What every trainable module promises, whatever it computes."""
from __future__ import annotations

import copy
import io
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch

import torch
from torch import Tensor, nn


def require(condition: bool | Tensor, message: str) -> None:
    """Raise AssertionError; unlike `assert` it also runs under `python -O`."""
    if not condition:
        raise AssertionError(message)


@contextmanager
def promise(message: str) -> Iterator[None]:
    """Turns whatever a component raises inside into an AssertionError that opens with `message`."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{message}: {type(error).__name__}: {error}") from error


def check_modes(module: nn.Module) -> None:
    """`train()` and `eval()` return the module, and say so in `training`."""
    name = type(module).__name__
    require(module.eval() is module, f"{name}.eval() does not return the module; end an overridden train() with `return self`")
    require(not module.training, f"{name}.eval() leaves training=True")
    require(module.train() is module, f"{name}.train() does not return the module; end an overridden train() with `return self`")


def check_gradients(module: nn.Module, loss: Callable[[nn.Module], Tensor], unused: Collection[str] = (), *,
                    nonzero: bool = True) -> None:
    """Back-propagation of `loss(module)` reaches every parameter that requires a gradient.

    A parameter that starts at exactly 0, such as the last norm of a residual branch, hides the ones before it; so every
    parameter of a copy is moved a little first.

    Args:
        module: is not changed.
        loss: computes a scalar from the copy.
        unused: patterns (`neck.extra.*`) of parameters that need not be reached.
        nonzero: a gradient of exactly 0 everywhere counts as not reached.
    """
    name = type(module).__name__
    module = copy.deepcopy(module).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * 0.02)
    module.zero_grad(set_to_none=True)
    loss(module).backward()

    checked = {key: p for key, p in module.named_parameters()
               if p.requires_grad and not any(fnmatch(key, pattern) for pattern in unused)}
    missed = [key for key, p in checked.items() if p.grad is None]
    require(not missed, f"{name}: no gradient reaches {_some(missed)}. Is the result detached or unused? A parameter that training "
                        f"shall not touch needs requires_grad_(False)")
    wild = [key for key, p in checked.items() if not p.grad.isfinite().all()]
    require(not wild, f"{name}: the gradient of {_some(wild)} is not finite")
    idle = [key for key, p in checked.items() if p.numel() and not p.grad.any()]
    require(not (nonzero and idle), f"{name}: the gradient of {_some(idle)} is exactly zero; the loss does not depend on it")


def check_state_dict(module: nn.Module, run: Callable[[nn.Module], list[Tensor]]) -> None:
    """A state dict, saved and loaded into another copy, restores what the module computes.

    Args:
        module: in eval mode; is not changed.
        run: what is compared.
    """
    name = type(module).__name__
    for prefix, part in module.named_modules():
        loose = [key for key, value in vars(part).items() if isinstance(value, Tensor)]
        place = f"{name}.{prefix}" if prefix else name
        require(not loose, f"{place} holds {_some(loose)} as a plain tensor, which is neither saved nor moved to a device; "
                           f"use register_buffer (persistent=False for a constant) or nn.Parameter")
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for value in other.state_dict().values():            # shares memory with the module
            if value.is_floating_point():
                value.mul_(0.5).add_(0.25)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    before, after = run(module), run(other)
    require(len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
            f"{name}: after saving and loading its state dict the output differs; does load_state_dict or a hook change values?")


def _some(names: Collection[str]) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
