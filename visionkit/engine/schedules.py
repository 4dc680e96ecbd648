"""Resuming with other settings: the new schedule goes on as if it had been there from the start."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine.optim import OptimWrapperDict, _ParamScheduler
from mmengine.runner import Runner

from visionkit.engine.checkpoint import to_plain

PROGRESS = {"last_step", "_global_step", "_last_value", "base_values", "verbose"}  # of a scheduler's state; the rest is its settings


def group_settings(runner: Runner) -> list[dict[str, Any]]:
    """The settings of every parameter group as they are now: learning rate, weight decay, ..., without the parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in _groups(runner)]


def continue_schedule(runner: Runner, configured: list[dict[str, Any]]) -> None:
    """Let a resumed run follow its config where that differs from the checkpoint's.

    mmengine restores settings together with progress, so that after raising `max_epochs` the learning rate stays at its old end,
    and another learning rate or weight decay in the config is passed over. Here the config's settings win, and if one of the
    schedule differs, the schedulers are built anew and stepped through the iterations done.

    Args:
        runner: resumed, before its first iteration.
        configured: `group_settings` before the checkpoint was loaded.
    """
    changes = []
    for group, wanted in zip(_groups(runner), configured, strict=True):
        for key, value in wanted.items():
            if f"initial_{key}" not in wanted and group.get(key) != value:   # what is scheduled follows from its initial value
                changes.append(f"{key} {group.get(key)} -> {value}")
                group[key] = value
    restored = list(_schedulers(runner.param_schedulers))
    rescheduled = any(change.startswith("initial_") for change in changes)
    if restored:
        as_restored = group_settings(runner)
        fresh = _build_schedulers(runner)
        differences = [text for old, new in zip(restored, _schedulers(fresh), strict=False) for text in _differences(old, new)]
        rescheduled |= bool(differences) or len(restored) != len(list(_schedulers(fresh)))
        if rescheduled and not any(getattr(scheduler, "need_val_args", False) for scheduler in restored):
            changes += differences
            _replay(runner, list(_schedulers(fresh)))
            runner.param_schedulers = fresh
        else:
            for group, settings in zip(_groups(runner), as_restored, strict=True):
                group.update(settings)
            if rescheduled:
                runner.logger.warning("the config's schedule differs from the checkpoint's, but a part of it depends on validation "
                                      "results and cannot be replayed: the checkpoint's schedule goes on")
    if changes:
        runner.logger.info(f"the config differs from the checkpoint's, and is followed: {', '.join(dict.fromkeys(changes))}")


def _build_schedulers(runner: Runner) -> Any:
    for group in _groups(runner):
        for key in [key for key in group if key.startswith("initial_")]:
            group[key.removeprefix("initial_")] = group[key]
    return runner.build_param_scheduler(runner.cfg.param_scheduler)


def _replay(runner: Runner, schedulers: list[_ParamScheduler]) -> None:
    """Step as training did: after an iteration those by iteration, after an epoch those by epoch, in their order."""
    for scheduler in schedulers:
        scheduler.optimizer._global_step = runner.iter       # the optimizer has made its steps, so torch need not warn
    per_epoch = len(runner.train_dataloader)
    for iteration in range(1, runner.iter + 1):
        for scheduler in schedulers:
            if not scheduler.by_epoch:
                scheduler.step()
        if iteration % per_epoch == 0 and iteration // per_epoch <= runner.epoch:
            for scheduler in schedulers:
                if scheduler.by_epoch:
                    scheduler.step()


def _differences(old: _ParamScheduler, new: _ParamScheduler) -> list[str]:
    if getattr(new, "need_val_args", False):                 # its state cannot be told from its settings
        return []
    before, after = to_plain(old.state_dict()), to_plain(new.state_dict())
    return [f"{type(new).__name__}.{key} {before.get(key)} -> {value}" for key, value in after.items()
            if key not in PROGRESS and before.get(key) != value]


def _schedulers(schedulers: Any) -> Iterator[_ParamScheduler]:
    """One after the other, also where there is a list for each of several optimizers."""
    lists = schedulers.values() if isinstance(schedulers, dict) else [schedulers or []]
    return (scheduler for one in lists for scheduler in one)


def _groups(runner: Runner) -> list[dict[str, Any]]:
    wrapper = runner.optim_wrapper
    if isinstance(wrapper, OptimWrapperDict):
        return [group for groups in wrapper.param_groups.values() for group in groups]
    return wrapper.param_groups
