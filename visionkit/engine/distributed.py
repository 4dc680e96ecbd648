"""Several processes on one job, on GPUs or on CPUs."""
from __future__ import annotations

import gc
import os

import torch
import torch.distributed as dist
from mmengine.config import Config

from visionkit.registry import ConfigError

LAUNCHERS = ("none", "pytorch")


def start_processes(cfg: Config) -> None:
    """Join the other processes that `torchrun` started, if `cfg.launcher` says so.

    mmengine's own way calls torch.cuda on machines that have none, so the group is made before its Runner, which then uses it.

    Raises:
        ConfigError: the launcher is unknown, or did not start this process.
    """
    launcher = cfg.get("launcher") or "none"
    if launcher not in LAUNCHERS:
        raise ConfigError(f"launcher is one of {', '.join(LAUNCHERS)}; got {launcher!r}", ("launcher",))
    if launcher == "none":
        return
    absent = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name not in os.environ]
    if absent:
        raise ConfigError(f"--launcher pytorch is for processes started by torchrun, which sets {', '.join(absent)}: "
                          f"torchrun --nproc-per-node=2 tools/train.py CONFIG --launcher pytorch", ("launcher",))
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    if not on_gpu:                                           # there, DDP wants no device ids, and mmengine gives it some
        wrapper = cfg.get("model_wrapper_cfg") or {"type": "MMDistributedDataParallel", "broadcast_buffers": False,
                                                   "find_unused_parameters": cfg.get("find_unused_parameters", False)}
        cfg.model_wrapper_cfg = {**wrapper, "device_ids": None}


def end_processes() -> None:
    """Leave the group, so that torch has nothing to complain about."""
    if dist.is_available() and dist.is_initialized():
        # The Runner is a reference cycle that holds the model that holds the group. Left to the end of the interpreter, the group's
        # threads are cut down while they work, and now and then the process aborts after a run that went well.
        gc.collect()
        dist.destroy_process_group()


def is_first_process() -> bool:
    """Whether this is the process that speaks to the user."""
    return os.environ.get("RANK", "0") == "0"
