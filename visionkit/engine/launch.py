"""Train and test a config: from settings to mmengine's Runner."""
from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import sys
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.runner import Runner

from visionkit.engine.checkpoint import CheckpointError, find_resumable, read_checkpoint, read_resumable
from visionkit.engine.distributed import start_processes
from visionkit.engine.memory import keep_freed_memory
from visionkit.engine.preflight import preflight
from visionkit.engine.test_time import use_inference_loop
from visionkit.registry import ConfigError

_runs = count(1)                                             # of this process


def train(cfg: Config, *, resume: bool | str = False, amp: bool = False, launcher: str | None = None,
          work_dir: str | os.PathLike | None = None) -> Runner:
    """Train as `cfg` says.

    Args:
        cfg: from `load_config`; it is not changed.
        resume: go on with the run in the work folder (true or `auto`), or from the checkpoint named.
        amp: the forward pass in bfloat16.
        launcher: `pytorch` in processes that torchrun started.
        work_dir: where logs and checkpoints go; by default `work_dirs/<name of the config>`.

    Returns:
        The runner after training.

    Raises:
        ConfigError: something in `cfg` cannot be used; raised before any long work.
        Stopped: a signal asked to stop; the run is saved.
    """
    cfg = _prepared(cfg, launcher, work_dir)
    if amp:
        _use_autocast(cfg)
    keep_freed_memory()
    preflight(cfg)
    start_processes(cfg)
    note = _choose_checkpoint(cfg, resume or cfg.get("resume", False))
    runner = _build_runner(cfg)
    if note:
        runner.logger.info(note)
    runner.logger.info(f"seed {runner.seed}, {runner.world_size} process(es), work folder {runner.work_dir}")
    try:
        runner.train()
    finally:
        _release(runner)
    runner.logger.info(_where_things_are(runner))
    return runner


def test(cfg: Config, checkpoint: str | os.PathLike, *, launcher: str | None = None,  # noqa: PT028  (not a pytest test)
         work_dir: str | os.PathLike | None = None, tta: bool = False, amp: bool = False) -> dict[str, Any]:  # noqa: PT028
    """The metrics of the weights in `checkpoint` on the test set of `cfg`.

    Args:
        cfg: from `load_config`; it is not changed.
        checkpoint: a .pth or .safetensors file.
        launcher: `pytorch` in processes that torchrun started.
        work_dir: where logs go; by default `work_dirs/<name of the config>`.
        tta: merge the predictions of several views of each image, as the section `tta` of `cfg` says.
        amp: the forward pass in bfloat16.

    Raises:
        ConfigError: something in `cfg` cannot be used, or the checkpoint does not fit its model.
    """
    cfg = _prepared(cfg, launcher, work_dir)
    cfg.load_from, cfg.load_from_part, cfg.resume = os.fspath(checkpoint), None, False
    if tta or amp:
        use_inference_loop(cfg, tta, amp)
    keep_freed_memory()
    preflight(cfg, training=False)
    start_processes(cfg)
    _choose_checkpoint(cfg, False)
    runner = _build_runner(cfg)
    try:
        return runner.test()
    finally:
        _release(runner)


def _prepared(cfg: Config, launcher: str | None, work_dir: str | os.PathLike | None) -> Config:
    """A copy of `cfg` with everything said that the Runner would otherwise choose less well."""
    cfg = copy.deepcopy(cfg)
    if launcher:
        cfg.launcher = launcher
    if work_dir or not cfg.get("work_dir"):
        cfg.work_dir = os.fspath(work_dir or Path("work_dirs") / Path(cfg.filename or "unnamed").stem)
    if (cfg.get("train_cfg") or {}).get("by_epoch") is not None:       # mmengine builds its own loops from this form
        cfg.train_cfg.type = "EpochLoop" if cfg.train_cfg.pop("by_epoch") else "IterLoop"
    if not cfg.get("experiment_name"):                       # mmengine shares log and message hub between runs of one name and second
        number = next(_runs)
        cfg.experiment_name = Path(cfg.filename or "unnamed").stem + (f"_{number}" if number > 1 else "")
    backends = (cfg.get("visualizer") or {}).get("vis_backends")
    if backends is not None and find_spec("tensorboard") and "TensorboardVisBackend" not in [backend["type"] for backend in backends]:
        backends.append({"type": "TensorboardVisBackend"})
    return cfg


def _use_autocast(cfg: Config) -> None:
    kind = cfg.optim_wrapper.get("type", "OptimWrapper")
    if kind not in ("OptimWrapper", "AutocastOptimWrapper"):
        raise ConfigError(f"--amp puts AutocastOptimWrapper in the place of OptimWrapper, but this is {kind!r}; run it without --amp",
                          ("optim_wrapper", "type"))
    cfg.optim_wrapper.type = "AutocastOptimWrapper"


def _choose_checkpoint(cfg: Config, resume: bool | str) -> str:
    """Set `load_from` and `resume` of `cfg`, the same in all processes; tells what was chosen and why."""
    choice: list[Any] = [None]
    if is_main_process():
        try:
            choice = [_checkpoint_of(cfg, resume)]
        except ConfigError as error:                         # the other processes must not wait for the answer
            choice = [error]
    broadcast_object_list(choice)
    if isinstance(choice[0], ConfigError):
        raise choice[0]
    cfg.load_from, cfg.resume, seed, note = choice[0]
    if seed is not None and seed != cfg.get("randomness", {}).get("seed"):           # else the data order would be another
        cfg.randomness = {**cfg.get("randomness", {}), "seed": seed}
        note += f"\n  with its seed, {seed}"
    return note


def _checkpoint_of(cfg: Config, resume: bool | str) -> tuple[str | None, bool, int | None, str]:
    """`load_from`, `resume`, the seed of the run to resume, and what to tell about it."""
    load_from = cfg.get("load_from")
    if resume in (True, "auto"):
        found = find_resumable(cfg.work_dir)
        if found.path:
            return str(found.path), True, found.meta.get("seed"), found.describe()
        if found.damaged:
            raise CheckpointError(f"{found.describe()}\nTo start anew in this folder, leave out --resume.")
        return load_from, False, None, f"nothing to resume in {cfg.work_dir}: a new run starts"
    if resume:
        return str(resume), True, read_resumable(resume)["meta"].get("seed"), f"resuming from {resume}"
    if load_from and "://" not in load_from:
        read_checkpoint(load_from, mmap=True)                # a wrong name or a damaged file shows before any work
    return load_from, False, None, ""


def _build_runner(cfg: Config) -> Runner:
    """The Runner, without the 200 lines that it prints at its start: environment, config and hooks are in the log file."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):               # its log handler takes the stream that it finds, so give it back below
            runner = Runner.from_cfg(cfg)
    except BaseException:
        print(said.getvalue(), end="")
        raise
    for handler in runner.logger.handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is said:
            handler.setStream(sys.stdout)
    print("".join(line for line in said.getvalue().splitlines(keepends=True) if " - WARNING - " in line or " - ERROR - " in line), end="")
    runner.logger.addFilter(_is_news)
    return runner


def _is_news(record: logging.LogRecord) -> bool:
    """Not what mmengine says about its own use of its deprecated classes at every checkpoint."""
    return not str(record.msg).startswith(('"FileClient" will be deprecated', '"HardDiskBackend" is the alias'))


def _release(runner: Runner) -> None:
    """Give back what hooks hold of the process, also after an error: the terminal, signal handlers."""
    for hook in runner.hooks:
        if hasattr(hook, "release"):
            hook.release()
    runner.visualizer.close()


def _where_things_are(runner: Runner) -> str:
    work_dir = Path(runner.work_dir)
    folders = {"checkpoints": work_dir, "logs": Path(runner.log_dir)}
    pictures = sorted({path.parent for suffix in ("png", "jpg") for path in work_dir.rglob(f"*.{suffix}")})
    lines = [f"{what}: {folder}" for what, folder in folders.items()] + [f"pictures: {folder}" for folder in pictures]
    return "done\n  " + "\n  ".join(lines)
