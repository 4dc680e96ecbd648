"""The key `activation_checkpointing` of a config: gradient checkpointing for parts that have no switch of their own.

Importing this module makes mmengine do it by way of `recompute`. Its own way is torch's reentrant checkpoint: a part none of whose inputs
requires a gradient learns nothing, named arguments are refused, and batch normalisation is updated twice.
"""
from __future__ import annotations

import fnmatch
import functools
from collections.abc import Sequence

import mmengine.runner.runner
from torch import nn

from visionkit.engine.checkpoint import part_of
from visionkit.ops.checkpointing import Checkpointing, recompute
from visionkit.registry import ConfigError

KEY = "activation_checkpointing"


def recompute_parts(model: nn.Module, names: Sequence[str] | str) -> None:
    """Let each named part of `model` keep its inputs only and run again in the backward pass.

    Raises:
        ConfigError: see `parts_to_recompute`.
    """
    for part in parts_to_recompute(model, names):
        part.forward = functools.partial(recompute, part.forward)


def parts_to_recompute(model: nn.Module, names: Sequence[str] | str) -> list[nn.Module]:
    """The parts of `model` called `names`, such as `neck` or `roi.hidden.0`; `layers.*` is each part of `layers`.

    Raises:
        ConfigError: no names; there is no such part, it is a list of parts, or what it is part of has a switch of its own.
    """
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"this is the name of a part of the model, or a list of names such as ['neck', 'roi.hidden.0']; got {names!r}",
                          (KEY,))
    parts = []
    for name in [single for pattern in names for single in _spelled_out(model, pattern)]:
        part = part_of(model, name, at=KEY)
        pieces = name.split(".")
        for cut in range(1, len(pieces)):
            owner = part_of(model, ".".join(pieces[:cut]), at=KEY)
            if isinstance(getattr(owner, "checkpointing", None), Checkpointing):
                raise ConfigError(f"{name!r} is a part of a {type(owner).__name__}, which has a switch of its own: its argument "
                                  f"checkpointing", (KEY,))
        if isinstance(part, (nn.ModuleList, nn.ModuleDict)):
            raise ConfigError(f"{name!r} is a {type(part).__name__}, which is not run itself; name what is in it: "
                              f"{', '.join(f'{name}.{child}' for child, _ in part.named_children())}", (KEY,))
        parts.append(part)
    return parts


def _spelled_out(model: nn.Module, name: str) -> list[str]:
    """The names that `name` stands for where pieces of it are patterns, such as the `*` of `layers.*`; else itself."""
    pieces = name.split(".")
    first = next((index for index, piece in enumerate(pieces) if set(piece) & set("*?[")), None)
    if first is None:
        return [name]
    owner = part_of(model, ".".join(pieces[:first]), at=KEY) if first else model
    children = [child for child, _ in owner.named_children()]
    found = fnmatch.filter(children, pieces[first])
    if not found:
        raise ConfigError(f"{name!r} names nothing: {type(owner).__name__} has no part {pieces[first]!r}. It has: {', '.join(children)}.",
                          (KEY,))
    return [single for child in found for single in _spelled_out(model, ".".join([*pieces[:first], child, *pieces[first + 1:]]))]


mmengine.runner.runner.turn_on_activation_checkpointing = recompute_parts
