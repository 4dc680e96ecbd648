"""The learning rate of the transformer's authors (Vaswani et al. 2017, arXiv:1706.03762, eq. 3)."""
from __future__ import annotations

from mmengine.optim import OptimWrapper, _ParamScheduler
from torch.optim import Optimizer

from visionkit.registry import PARAM_SCHEDULERS


@PARAM_SCHEDULERS.register_module()
class NoamLR(_ParamScheduler):
    """Up with the step, then down with its root: channels^-0.5 * min(step^-0.5, step * warmup^-1.5), times the optimizer's learning rate,
    which is 1 in the paper. The first step is 1.

    Args:
        optimizer: the runner gives it.
        channels: of the model.
        warmup: the step with the largest rate.
        begin: when to start, in iterations.
        end: when to stop, in iterations.
        by_epoch: must be false: a step is an iteration.
        last_step: for resuming without a state.
        verbose: print each rate.
    """

    def __init__(self, optimizer: Optimizer | OptimWrapper, channels: int = 512, warmup: int = 4000, begin: int = 0, end: int = 10**9,
                 by_epoch: bool = False, last_step: int = -1, verbose: bool = False) -> None:
        if channels < 1 or warmup < 1:
            raise ValueError(f"channels and warmup must be positive, got {channels} and {warmup}")
        if by_epoch:
            raise ValueError("NoamLR goes by iterations; leave by_epoch out")
        self.channels, self.warmup = channels, warmup
        super().__init__(optimizer, "lr", begin=begin, end=end, last_step=last_step, by_epoch=False, verbose=verbose)

    def _get_value(self) -> list[float]:
        before = self._factor(self.last_step) if self.last_step else 1.0
        return [group["lr"] * self._factor(self.last_step + 1) / before for group in self.optimizer.param_groups]

    def _factor(self, step: int) -> float:
        return self.channels**-0.5 * min(step**-0.5, step * self.warmup**-1.5)
