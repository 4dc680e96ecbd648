"""How long a training iteration takes, and whether the data path keeps up."""
from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from visionkit.datasets import images_per_second
from visionkit.engine.memory import keep_freed_memory
from visionkit.registry import MODELS, SCOPE

WARM_UP = 3                                                  # iterations in which libraries set themselves up


@dataclass
class TrainingSpeed:
    """Medians; `loader_images_per_s` is the data path alone, without a model beside it."""
    seconds_per_iteration: dict[str, float]                  # by variant
    images_per_s: float
    loader_images_per_s: float


def measure_training(cfg: Config, iterations: int = 20, memory_orders: Sequence[str] = ("as configured",)) -> TrainingSpeed:
    """Train for a few iterations and take the time of each: loading, forward, backward and the optimizer's step.

    Args:
        cfg: a config with a training section.
        iterations: of each variant, after a few that do not count.
        memory_orders: variants, of `channels last`, `channels first` and `as configured`; they take turns, iteration by
            iteration, so that a change in the machine's speed meets them all.
    """
    keep_freed_memory()
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(SCOPE):
        loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
        model = MODELS.make(cfg.model, at="model").to("cuda" if torch.cuda.is_available() else "cpu")
        optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        data_path = images_per_second(loader.dataset, loader.batch_size, loader.num_workers, seconds=3.0)
    model.train()
    configured = getattr(model.data_preprocessor, "channels_last", None)
    seconds: dict[str, list[float]] = {order: [] for order in memory_orders}
    batches = _endless(loader)
    for step in range((WARM_UP + iterations) * len(memory_orders)):
        order = memory_orders[step % len(memory_orders)]
        if order != "as configured":
            model.data_preprocessor.channels_last = order == "channels last"
        start = time.perf_counter()
        model.train_step(next(batches), optim_wrapper)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[order].append(time.perf_counter() - start)
    if configured is not None:
        model.data_preprocessor.channels_last = configured
    medians = {order: statistics.median(times[WARM_UP:]) for order, times in seconds.items()}
    return TrainingSpeed(medians, loader.batch_size / medians[memory_orders[0]], data_path)


def _endless(loader: DataLoader) -> Iterator[dict[str, Any]]:
    while True:
        yield from loader
