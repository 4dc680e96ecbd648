"""Train and test a config: from settings to mmengine's Runner."""
from __future__ import annotations

import copy
import os
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner

from visionkit.engine.checkpoint import find_resumable
from visionkit.engine.distributed import start_processes
from visionkit.registry import ConfigError


def train(cfg: Config, *, resume: bool | str = False, amp: bool = False, launcher: str | None = None,
          work_dir: str | os.PathLike | None = None) -> Runner:
    """Train as `cfg` says.

    Args:
        cfg: from `load_config`; it is not changed.
        resume: go on with the run in the work folder, or from the checkpoint named.
        amp: the forward pass in bfloat16.
        launcher: `pytorch` in processes that torchrun started.
        work_dir: where logs and checkpoints go; by default `work_dirs/<name of the config>`.

    Returns:
        The runner after training.

    Raises:
        ConfigError: something in `cfg` cannot be used; raised before any long work.
    """
    from visionkit.engine.preflight import preflight

    cfg = _prepared(cfg, launcher, work_dir)
    if amp:
        _set_autocast(cfg)
    preflight(cfg)
    start_processes(cfg)
    _set_resume(cfg, resume if resume else cfg.get("resume", False))
    runner = Runner.from_cfg(cfg)
    runner.logger.info(f"seed {runner.seed}, {runner.world_size} process(es)")
    runner.train()
    return runner


def test(cfg: Config, checkpoint: str | os.PathLike, *, launcher: str | None = None, work_dir: str | os.PathLike | None = None) -> dict:
    """The metrics of the weights in `checkpoint` on the test set of `cfg`."""
    from visionkit.engine.preflight import preflight

    cfg = _prepared(cfg, launcher, work_dir)
    preflight(cfg, training=False)
    start_processes(cfg)
    cfg.load_from, cfg.resume = str(checkpoint), False
    return Runner.from_cfg(cfg).test()


def _prepared(cfg: Config, launcher: str | None, work_dir: str | os.PathLike | None) -> Config:
    cfg = copy.deepcopy(cfg)
    if launcher:
        cfg.launcher = launcher
    if work_dir or not cfg.get("work_dir"):
        cfg.work_dir = os.fspath(work_dir or Path("work_dirs") / Path(cfg.filename or "unnamed").stem)
    return cfg


def _set_autocast(cfg: Config) -> None:
    kind = cfg.optim_wrapper.get("type", "OptimWrapper")
    if kind not in ("OptimWrapper", "AutocastOptimWrapper"):
        raise ConfigError(f"--amp replaces OptimWrapper by AutocastOptimWrapper, and this config has {kind!r}; run it without --amp",
                          ("optim_wrapper", "type"))
    cfg.optim_wrapper.type = "AutocastOptimWrapper"


def _set_resume(cfg: Config, resume: bool | str) -> None:
    cfg.resume = bool(resume)
    if not resume:
        return
    if resume in (True, "auto"):
        found = find_resumable(cfg.work_dir)
        print(found.describe())
        cfg.resume = found.path is not None
        if found.path:
            cfg.load_from = str(found.path)
    else:
        cfg.load_from = str(resume)
