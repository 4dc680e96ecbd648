"""Gradient checkpointing: keep a block's inputs instead of its activations, and compute those again in the backward pass (Chen et al. 2016,
arXiv:1604.06174)."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute(block: nn.Module, *inputs: Any) -> Any:
    """`block(*inputs)`, keeping only `inputs` for the backward pass, which runs `block` again.

    The same outputs, gradients and random numbers, for one more forward pass. Running statistics of batch normalisation are updated once,
    by the first pass. Without gradients it is an ordinary call.
    """
    if not torch.is_grad_enabled():
        return block(*inputs)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: _contexts(block))


def _contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _statistics_kept(block)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Leave the running statistics as the first pass made them: the second adds nothing to them."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm) and module.training and module.track_running_stats]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
