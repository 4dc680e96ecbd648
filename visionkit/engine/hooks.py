"""What happens around the iterations of a run: checkpoints, seeds, stopping, progress, and what the data path did."""
from __future__ import annotations

import math
import os
import random
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from mmengine.dist import all_gather_object, get_rank, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from visionkit.engine.checkpoint import check_fit, drop_executable, sweep_partial_files, to_history, to_plain, write_atomically
from visionkit.registry import HOOKS, ConfigError, did_you_mean


@HOOKS.register_module()
class CheckpointHook(Hook):
    """Save a run so that it goes on, after whatever happened to it, as if nothing had.

    Files are written whole or not at all and are sealed (see `engine.checkpoint`); older ones are deleted after the newer one is
    complete. `last_checkpoint` in the work folder names the newest, relative to that folder.

    Args:
        interval: epochs or iterations from one checkpoint to the next; -1 for none but the last.
        by_epoch: what `interval` counts. Either resumes exactly, an iteration checkpoint in the middle of its epoch.
        max_keep_ckpts: how many to keep, the best not counted; -1 for all.
        save_last: save at the end of training, too.
        save_best: a metric, such as `coco/bbox_mAP`, or several; `auto` is the first one that validation reports. The
            weights of the best validation are kept as `best_<metric>_epoch_<N>.pth`.
        rule: `greater` or `less`, one for all or one a metric; by default less for a metric with `loss` or `error` in its name.
        save_optimizer: without, the checkpoint cannot be resumed from.
        save_param_scheduler: likewise.
        out_dir: where checkpoints go instead of the work folder; a folder named like the work folder is made in it.
        filename_tmpl: by default `epoch_{}.pth` or `iter_{}.pth`.
        save_begin: the first epoch or iteration after which to save.
    """

    priority = "VERY_LOW"                                    # after the schedulers and the EMA have made their step

    def __init__(self, interval: int = 1, by_epoch: bool = True, max_keep_ckpts: int = -1, save_last: bool = True,
                 save_best: str | Sequence[str] | None = None, rule: str | Sequence[str] | None = None, save_optimizer: bool = True,
                 save_param_scheduler: bool = True, out_dir: str | None = None, filename_tmpl: str | None = None,
                 save_begin: int = 0) -> None:
        if max_keep_ckpts == 0 or max_keep_ckpts < -1:
            raise ValueError(f"max_keep_ckpts is how many checkpoints to keep, at least 1, or -1 for all; got {max_keep_ckpts}")
        if filename_tmpl is not None and filename_tmpl.count("{}") != 1:
            raise ValueError(f"filename_tmpl needs one {{}} for the number of the epoch or iteration, got {filename_tmpl!r}")
        self.interval, self.by_epoch, self.save_begin, self.save_last = interval, by_epoch, save_begin, save_last
        self.max_keep_ckpts = max_keep_ckpts
        self.save_optimizer, self.save_param_scheduler = save_optimizer, save_param_scheduler
        self.out_dir = out_dir
        self.filename_tmpl = filename_tmpl
        self.metrics = [save_best] if isinstance(save_best, str) else list(save_best or ())
        rules = [rule] * len(self.metrics) if rule is None or isinstance(rule, str) else list(rule)
        if len(rules) != len(self.metrics) or not {*rules} <= {None, "greater", "less"}:
            raise ValueError(f"rule is 'greater' or 'less', one for all or one for each of save_best={self.metrics}; got {rule!r}")
        self.rules = dict(zip(self.metrics, rules, strict=True))
        self.saved_at = -1                                   # the iteration of the newest checkpoint of this process

    # what goes into a checkpoint and comes out of it

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Only tensors and plain values, so that the file can be loaded without trusting it."""
        for part in ("meta", "message_hub", "param_schedulers"):
            if part in checkpoint:
                checkpoint[part] = to_plain(checkpoint[part])

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        drop_executable(checkpoint)                          # again: a checkpoint from a URL did not come through our loader
        resuming = runner._resume
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if resuming or runner.cfg.get("load_from_strict", True):
            check_fit(model, checkpoint["state_dict"], str(runner._load_from), **({"share": 1.0} if resuming else {}))
        if "message_hub" in checkpoint:
            checkpoint["message_hub"]["log_scalars"] = to_history(checkpoint["message_hub"]["log_scalars"])
        if resuming and runner._train_loop is not None:
            metainfo = getattr(runner.train_dataloader.dataset, "metainfo", None)
            if to_plain(metainfo) == checkpoint["meta"].get("dataset_meta"):
                checkpoint["meta"]["dataset_meta"] = metainfo  # mmengine compares pickles, which differ for equal values

    # when to save

    def before_train(self, runner: Runner) -> None:
        work_dir = Path(runner.work_dir)
        self.folder = Path(self.out_dir) / work_dir.name if self.out_dir else work_dir
        if is_main_process():
            for name in sweep_partial_files(self.folder):
                runner.logger.info(f"deleted {name}, which a stopped run left half-written")
        self.kept: list[str] = list(runner.message_hub.get_info("kept_checkpoints", []))
        runner.logger.info(f"checkpoints go to {self.folder}")

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if not self.by_epoch and (self.every_n_train_iters(runner, self.interval, self.save_begin)
                                  or self.save_last and self.is_last_train_iter(runner)):
            self.save(runner, epoch=runner.epoch, iteration=runner.iter + 1)

    def after_train_epoch(self, runner: Runner) -> None:
        if self.by_epoch and (self.every_n_epochs(runner, self.interval, self.save_begin)
                              or self.save_last and self.is_last_train_epoch(runner)):
            self.save(runner, epoch=runner.epoch + 1, iteration=runner.iter)

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, float] | None = None) -> None:
        better = [name for name in self.metrics if self._is_better(runner, name, metrics or {})]
        if better and self.saved_at == runner.iter:          # so that a resumed run knows the best so far
            self.save(runner, epoch=runner.epoch, iteration=runner.iter)

    # saving

    def save(self, runner: Runner, epoch: int, iteration: int) -> None:
        """Save a checkpoint from which `iteration` iterations, `epoch` whole epochs among them, need not be repeated."""
        at_epoch_end = self.by_epoch and iteration == epoch * len(runner.train_dataloader)
        name = (self.filename_tmpl or ("epoch_{}.pth" if at_epoch_end else "iter_{}.pth")).format(epoch if at_epoch_end else iteration)
        self.kept = [other for other in self.kept if other != name] + [name]
        runner.message_hub.update_info("kept_checkpoints", self.kept)
        runner.save_checkpoint(str(self.folder), name, save_optimizer=self.save_optimizer,
                               save_param_scheduler=self.save_param_scheduler, meta={"epoch": epoch, "iter": iteration})
        self.saved_at = iteration
        if is_main_process():
            pointer = os.path.relpath(self.folder / name, runner.work_dir)
            write_atomically(Path(runner.work_dir) / "last_checkpoint", pointer.encode())
        if self.max_keep_ckpts > 0:
            outdated, self.kept = self.kept[:-self.max_keep_ckpts], self.kept[-self.max_keep_ckpts:]
            for old in outdated if is_main_process() else ():
                (self.folder / old).unlink(missing_ok=True)
        runner.logger.info(f"saved {name}")

    def _is_better(self, runner: Runner, wanted: str, metrics: Mapping[str, float]) -> bool:
        """Keep the weights as the best by the metric `wanted`, if they are."""
        name = next(iter(metrics), wanted) if wanted == "auto" else wanted
        if name not in metrics:
            raise ConfigError(f"save_best={wanted!r} is not among what validation reports: {', '.join(metrics) or 'nothing'}."
                              f"{did_you_mean(name, metrics)}")
        rule = self.rules[wanted] or ("less" if "loss" in name.lower() or "error" in name.lower() else "greater")
        info = f"best_{wanted}"
        best: dict[str, Any] = runner.message_hub.get_info(info) or {"score": -math.inf if rule == "greater" else math.inf, "file": None}
        score = float(metrics[name])
        if not (score > best["score"] if rule == "greater" else score < best["score"]):
            return False
        unit, number = ("epoch", runner.epoch) if self.by_epoch else ("iter", runner.iter)
        file = f"best_{name.replace('/', '_')}_{unit}_{number}.pth"
        runner.message_hub.update_info(info, {"score": score, "file": file})
        runner.save_checkpoint(str(self.folder), file, save_optimizer=False, save_param_scheduler=False,
                               meta={"epoch": runner.epoch, "iter": runner.iter})
        if is_main_process() and best["file"] and best["file"] != file:
            (self.folder / best["file"]).unlink(missing_ok=True)
        runner.logger.info(f"saved {file}: {name} {score:.4f} is the best so far")
        return True


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Seed torch, numpy and random before every training iteration from (seed, rank, iteration).

    So dropout and target sampling repeat bit for bit in a resumed run, and no generator state has to be saved.
    """

    priority = "VERY_HIGH"

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        seed = int(np.random.SeedSequence((runner.seed or 0, get_rank(), runner.iter)).generate_state(1, np.uint64)[0])
        torch.manual_seed(seed)                              # every GPU included
        np.random.seed(seed % 2**32)
        random.seed(seed)
