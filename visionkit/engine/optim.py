"""Mixed precision by autocast, on any device."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from torch import nn
from torch.optim import Optimizer

from visionkit.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """The forward pass in bfloat16, weights, gradients and update in float32. No loss scaling: bfloat16 has float32's range.

    Args:
        optimizer: what updates the weights.
        accumulative_counts: iterations from one update to the next.
        clip_grad: arguments of `clip_grad_norm_`, or with `type="value"` of `clip_grad_value_`.
    """

    def __init__(self, optimizer: Optimizer, accumulative_counts: int = 1, clip_grad: dict | None = None) -> None:
        super().__init__(optimizer, accumulative_counts, clip_grad)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        # Without autocast's cache: in older releases of torch a cast made under no_grad, as in RPN.forward, has no gradient when it is
        # used again (pytorch/pytorch#65766).
        with super().optim_context(model), torch.autocast(get_device(), torch.bfloat16, cache_enabled=False):
            yield
