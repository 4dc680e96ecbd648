"""What each policy of gradient checkpointing saves in memory and costs in time, on the model and the images of a config."""
from __future__ import annotations

import copy
import inspect
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from visionkit.engine.memory import keep_freed_memory
from visionkit.engine.op_benchmark import peak_of
from visionkit.ops.checkpointing import POLICIES
from visionkit.registry import BACKBONES, HEADS, MODELS, NECKS, SCOPE, ConfigError, dotted

WARM_UP = 2                                                  # steps in which libraries set themselves up


@dataclass
class Cost:
    """Of a training step without the optimizer's part: forward, loss, backward."""
    policy: str
    held_bytes: int             # what the graph keeps between forward and backward, parameters and buffers left out
    peak_bytes: int             # the most that a step's tensors, gradients among them, take at a time
    seconds: float              # median
    loss: float                 # of the first step, the same random numbers for every policy
    gradient_norm: float        # likewise


def measure_checkpointing(cfg: Config, iterations: int = 5, policies: Sequence[str] = POLICIES) -> Iterator[Cost]:
    """Take the cost of a step under each policy, on the first batch of the training set, in a process of its own each.

    Args:
        cfg: a config with a training section.
        iterations: steps that are timed, after a few that are not.
        policies: of every part of the model that has a switch `checkpointing`.

    Raises:
        ConfigError: no part of the model has one.
    """
    switched(cfg.model, "none")
    for policy in policies:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            yield process.submit(_cost, cfg.to_dict(), policy, iterations, torch.get_num_threads()).result()


def switched(model: Mapping[str, Any], policy: str) -> tuple[dict[str, Any], list[str]]:
    """A model's config with every switch `checkpointing` set, and where those stand, such as `model.backbone`.

    Raises:
        ConfigError: there is none.
    """
    changed, places = copy.deepcopy(dict(model)), []
    for path, part in _parts(changed, ("model",)):
        if _has_switch(part.get("type")):
            part["checkpointing"] = {"policy": policy}
            places.append(dotted(path))
    if not places:
        raise ConfigError("no part of this model has an argument `checkpointing`, so there is nothing to compare", ("model",))
    return changed, places


def as_table(costs: Iterable[Cost]) -> Table:
    """A row for each policy, relative to the first, which is that without checkpointing."""
    table = Table("policy", "held, MB", "of none", "peak, MB", "of none", "ms a step", "of none", "loss", "gradient norm")
    first: Cost | None = None
    for cost in costs:
        first = first or cost
        same = [f"{value:.6g}" if value == other else f"{value:.6g}, not the same"
                for value, other in ((cost.loss, first.loss), (cost.gradient_norm, first.gradient_norm))]
        table.add_row(cost.policy, f"{cost.held_bytes / 1e6:.1f}", f"{cost.held_bytes / first.held_bytes:.2f}",
                      f"{cost.peak_bytes / 1e6:.1f}", f"{cost.peak_bytes / first.peak_bytes:.2f}",
                      f"{cost.seconds * 1e3:.3g}", f"{cost.seconds / first.seconds:.2f}", *same)
    return table


def held_bytes(forward: Callable[[], Any], parameters: Iterable[Tensor]) -> tuple[int, Any]:
    """Bytes that the graph of `forward()` keeps for the backward pass, and what it gives.

    What stands in one storage counts once; `parameters` do not count, they are there anyway. With torch before 2.14 what the policy
    `selective` keeps of ops does not show, and too little is told.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    return sum(sizes.values()), result


def peak_of_tensors(call: Callable[[], Any]) -> int:
    """The most bytes that tensors on the CPU made by `call()` take at a time. What the system gives the process is no measure of them: the
    libraries that compute convolutions keep memory of their own for each call that they have met."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")          # the profiler tells on stderr when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        call()
    changes = [event for event in log.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate((event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())), initial=0))


def _cost(settings: dict[str, Any], policy: str, iterations: int, threads: int) -> Cost:
    """What `measure_checkpointing` runs in the other process."""
    torch.set_num_threads(threads)
    if settings.get("custom_imports"):
        import_modules_from_strings(**settings["custom_imports"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loader = {**settings["train_dataloader"], "num_workers": 0, "persistent_workers": False}
    loader.pop("prefetch_factor", None)
    with DefaultScope.overwrite_default_scope(SCOPE):
        torch.manual_seed(0)
        model = MODELS.make(switched(settings["model"], policy)[0], at="model").to(device)
        optim_wrapper = build_optim_wrapper(model, Config(settings).optim_wrapper)
        batch = next(iter(Runner.build_dataloader(loader, seed=0)))
    model.train()

    def forward() -> Tensor:
        torch.manual_seed(0)
        with optim_wrapper.optim_context(model):             # autocast, where the config says so
            losses = model(**model.data_preprocessor(copy.deepcopy(batch), True), mode="loss")
        return model.parse_losses(losses)[0]

    def step() -> None:
        forward().backward()
        model.zero_grad(set_to_none=True)

    held, loss = held_bytes(forward, [*model.parameters(), *model.buffers()])
    loss.backward()
    norm = _gradient_norm(model)
    first = float(loss.detach())
    del loss                                                 # and with it its graph
    model.zero_grad(set_to_none=True)
    peak = peak_of(step, device) if device == "cuda" else peak_of_tensors(step)
    keep_freed_memory()                                      # as training does
    seconds = []
    for _ in range(WARM_UP + iterations):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return Cost(policy, held, peak, statistics.median(seconds[WARM_UP:]), first, norm)


def _gradient_norm(model: nn.Module) -> float:
    squares = [parameter.grad.double().square().sum() for parameter in model.parameters() if parameter.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


def _parts(node: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], dict[str, Any]]]:
    """Every dict in `node`, with its path."""
    if isinstance(node, dict):
        yield path, node
    if isinstance(node, (dict, list, tuple)):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _parts(value, (*path, key))


def _has_switch(kind: Any) -> bool:
    found = [registry.get(kind) for registry in (MODELS, BACKBONES, NECKS, HEADS) if kind in registry] if isinstance(kind, str) else [kind]
    return any(callable(component) and "checkpointing" in inspect.signature(component).parameters for component in found)
