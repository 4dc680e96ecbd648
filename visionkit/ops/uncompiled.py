"""Checkpointing that `torch.compile` leaves as it is. A file of its own, imported where it is used: the decorator loads the compiler, which
takes a second."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


@torch.compiler.disable(reason="torch.compile takes no context_fn of this kind; the block runs as it is, between compiled parts")
def checkpoint_with(contexts: Callable, call: Callable, *inputs: Any, **settings: Any) -> Any:
    """`torch.utils.checkpoint.checkpoint(call, *inputs)`, non-reentrant, with `contexts` as its `context_fn`."""
    return checkpoint(call, *inputs, use_reentrant=False, context_fn=contexts, **settings)
