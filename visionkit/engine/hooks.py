"""What happens around the iterations of a run: checkpoints, seeds, stopping, progress, and what the data path did."""
from __future__ import annotations

import logging
import math
import os
import random
import shlex
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, all_reduce, get_rank, get_world_size, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn

from visionkit.engine.checkpoint import ENOUGH, check_fit, part_of, sweep_partial_files, to_history, to_plain, write_atomically
from visionkit.engine.loops import geometry, images_in
from visionkit.engine.schedules import continue_schedule, group_settings
from visionkit.models.backbones.pretrained import load_part
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
        self.configured: list[dict[str, Any]] | None = None  # of a resumed run: the optimizer's settings in the config

    # what goes into a checkpoint and comes out of it

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Only tensors and plain values, so that the file can be loaded without trusting it."""
        for part in ("meta", "message_hub", "param_schedulers"):
            if part in checkpoint:
                checkpoint[part] = to_plain(checkpoint[part])

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        resuming = runner._resume
        self.configured = group_settings(runner) if resuming else None
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        part = None if resuming else runner.cfg.get("load_from_part")
        if part is not None:
            self._load_part(runner, model, part, checkpoint)
        elif resuming or runner.cfg.get("load_from_strict", True):
            check_fit(model, checkpoint["state_dict"], str(runner._load_from), share=1.0 if resuming else ENOUGH)
        if resuming:
            checkpoint["message_hub"]["log_scalars"] = to_history(checkpoint["message_hub"]["log_scalars"])
            metainfo = getattr(runner.train_dataloader.dataset, "metainfo", None)
            if to_plain(metainfo) == checkpoint["meta"].get("dataset_meta"):
                checkpoint["meta"]["dataset_meta"] = metainfo  # mmengine compares pickles, which differ for equal values

    def _load_part(self, runner: Runner, model: nn.Module, part: str, checkpoint: dict) -> None:
        """Fill one part of the model; what the runner loads afterwards are the model's own weights."""
        load_part(part_of(model, part), checkpoint["state_dict"], str(runner._load_from))
        checkpoint["state_dict"] = model.state_dict()

    # when to save

    def before_train(self, runner: Runner) -> None:
        work_dir = Path(runner.work_dir)
        self.folder = Path(self.out_dir) / work_dir.name if self.out_dir else work_dir
        if is_main_process():
            for name in sweep_partial_files(self.folder):
                runner.logger.info(f"deleted {name}, which a stopped run left half-written")
        if self.by_epoch and isinstance(runner.train_loop, IterBasedTrainLoop):
            raise ConfigError("this counts epochs, and training by iterations has none; set by_epoch=False and interval=...",
                              ("default_hooks", "checkpoint"))
        self.kept: list[str] = list(runner.message_hub.get_info("kept_checkpoints", []))
        if self.configured is not None:
            continue_schedule(runner, self.configured)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if not self.by_epoch and (self.every_n_train_iters(runner, self.interval, self.save_begin)
                                  or self.save_last and self.is_last_train_iter(runner)):
            self.save(runner, epoch=runner.epoch, iteration=runner.iter + 1)

    def after_train_epoch(self, runner: Runner) -> None:
        if self.by_epoch and (self.every_n_epochs(runner, self.interval, self.save_begin)
                              or self.save_last and self.is_last_train_epoch(runner)):
            self.save(runner, epoch=runner.epoch + 1, iteration=runner.iter)

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, float] | None = None) -> None:
        runner.message_hub.update_info("validated_at", runner.iter)
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
        runner.message_hub.update_info("geometry", geometry(runner.train_dataloader))
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


class Diverged(RuntimeError):
    """The loss of a run is no longer a finite number."""


@HOOKS.register_module()
class DivergenceHook(Hook):
    """End a run whose loss is no longer finite, before it writes that over good checkpoints.

    Args:
        interval: iterations from one look at the loss to the next; a look waits for the GPU. Before a checkpoint there is always one.
    """

    priority = "ABOVE_NORMAL"

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval
        self.outputs: Mapping[str, Any] = {}

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.outputs = outputs or {}
        if self.every_n_inner_iters(batch_idx, self.interval):
            self._look(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._look(runner)

    def _look(self, runner: Runner) -> None:
        wrong = [name for name, value in self.outputs.items() if not math.isfinite(value)]
        if wrong:
            raise Diverged(f"the loss is no longer finite ({', '.join(wrong)}) at iteration {runner.iter}, and nothing was saved since. "
                           f"Go on from the newest checkpoint with --resume and a lower learning rate or stronger clipping "
                           f"(optim_wrapper.clip_grad)")


class Stopped(Exception):
    """Training was asked to stop, and did after saving.

    Args:
        by: the signal.
        checkpoint: what was saved.
    """

    def __init__(self, by: signal.Signals, checkpoint: Path) -> None:
        super().__init__(by, checkpoint)
        self.checkpoint = checkpoint
        self.exit_code = 130 if by == signal.SIGINT else 0   # Ctrl-C in a shell loop shall end the loop, too

    def __str__(self) -> str:
        return f"stopped by {self.args[0].name}; saved {self.checkpoint}"


@HOOKS.register_module()
class StopHook(Hook):
    """On SIGTERM or Ctrl-C, finish the iteration, save, and raise `Stopped`; a second Ctrl-C stops at once.

    Ranks agree on the iteration. In a validation a single process stops at once, several after it; a resumed run repeats it.
    """

    priority = "LOWEST"                                      # after whatever else belongs to the iteration

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def before_train(self, runner: Runner) -> None:
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def release(self) -> None:
        """Leave the signals as they were."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:                     # a data worker: its process ends when training does
            return
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number)
        if hasattr(signal, "SIGCHLD"):                       # the signal may have killed the data workers as well, which torch would
            previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # report by an exception in the middle of the iteration
            self._previous.setdefault(signal.SIGCHLD, previous)
        again = "; Ctrl-C again to stop at once" if number == signal.SIGINT else ""
        os.write(2, f"\n{self.asked.name}: finishing the iteration, then saving{again}\n".encode())

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        updated = getattr(runner.optim_wrapper, "should_update", lambda: True)()
        if self._agreed() and updated:                       # not between two iterations whose gradients are added up
            self._stop(runner, epoch=runner.epoch, iteration=runner.iter + 1)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self.asked and get_world_size() == 1 and not isinstance(runner._train_loop, dict):
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):
                    hook.after_val_epoch(runner)             # the model holds the averaged weights; put its own back
            self._stop(runner, epoch=runner.epoch, iteration=runner.iter)

    def after_val(self, runner: Runner) -> None:
        if get_world_size() > 1 and not isinstance(runner._train_loop, dict) and self._agreed():
            self._stop(runner, epoch=runner.epoch, iteration=runner.iter)

    def _agreed(self) -> bool:
        """Whether any rank was asked to stop, so that all do after the same iteration."""
        if get_world_size() > 1:
            asked = torch.tensor(self.asked or 0)
            all_reduce(asked, "max")
            self.asked = signal.Signals(asked.item()) if asked else None
        return self.asked is not None

    def _stop(self, runner: Runner, epoch: int, iteration: int) -> None:
        saver = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
        if saver is None:
            raise KeyboardInterrupt                          # the config does without checkpoints
        if saver.saved_at != iteration:
            saver.save(runner, epoch, iteration)
        raise Stopped(self.asked, saver.folder / saver.kept[-1])


def resume_command() -> str:
    """The command line of this process with `--resume`, to be copied into a shell."""
    arguments = list(sys.orig_argv)
    if "--resume" in arguments:
        at = arguments.index("--resume")
        has_value = len(arguments) > at + 1 and not arguments[at + 1].startswith("-")
        del arguments[at:at + 1 + has_value]
    arguments = [argument for argument in arguments if not argument.startswith("--resume=")]
    if "TORCHELASTIC_RUN_ID" in os.environ:                  # torchrun started `python -u tools/train.py ...`
        script = next(index for index, argument in enumerate(arguments[1:], 1) if not argument.startswith("-"))
        arguments = ["torchrun", f"--nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}", *arguments[script:]]
    return shlex.join([*arguments, "--resume"])


@HOOKS.register_module()
class ProgressHook(Hook):
    """A progress bar with the time that is left, where standard error is a terminal; otherwise nothing."""

    priority = "VERY_LOW"

    def __init__(self) -> None:
        self.progress: Any = None
        self._streams: list[tuple[logging.StreamHandler, Any]] = []

    def before_train(self, runner: Runner) -> None:
        if self._start(runner):
            self.training = self.progress.add_task("train", total=runner.max_iters, completed=runner.iter, note="")

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self.progress:
            losses = outputs or {}
            note = f"loss {float(losses['loss']):.4f}" if "loss" in losses else ""
            by_epoch = f"epoch {runner.epoch + 1}/{runner.max_epochs}" if runner.max_epochs > 1 else "train"
            self.progress.update(self.training, advance=1, description=by_epoch, note=note)

    def before_val_epoch(self, runner: Runner) -> None:
        if self._start(runner):
            self.evaluation = self.progress.add_task("validate", total=len(runner.val_dataloader), note="")

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._advance()

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, float] | None = None) -> None:
        self._remove()

    def before_test_epoch(self, runner: Runner) -> None:
        if self._start(runner):
            self.evaluation = self.progress.add_task("test", total=len(runner.test_dataloader), note="")

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._advance()

    def after_test_epoch(self, runner: Runner, metrics: Mapping[str, float] | None = None) -> None:
        self._remove()

    def after_run(self, runner: Runner) -> None:
        self.release()

    def release(self) -> None:
        """Give the terminal back."""
        if self.progress:
            self.progress.stop()
            self.progress = None
        for handler, stream in self._streams:
            handler.setStream(stream)
        self._streams = []

    def _start(self, runner: Runner) -> bool:
        """Whether there is a bar to show progress on."""
        if self.progress is None and is_main_process() and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            self.progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                                     TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
                                     console=Console(file=sys.stderr), transient=True, redirect_stdout=sys.stdout.isatty())
            stdout = sys.stdout
            self.progress.start()
            for handler in runner.logger.handlers:           # log lines go above the bar, by way of rich
                if getattr(handler, "stream", None) is stdout is not sys.stdout:
                    self._streams.append((handler, handler.setStream(sys.stdout)))
        return self.progress is not None

    def _advance(self) -> None:
        if self.progress:
            self.progress.advance(self.evaluation)

    def _remove(self) -> None:
        if self.progress:
            self.progress.remove_task(self.evaluation)


@HOOKS.register_module()
class ReplacedImagesHook(Hook):
    """After each epoch tell how many images could not be read and were replaced (`on_error="skip"` of a data set).

    Args:
        most: how many of them to name.
    """

    def __init__(self, most: int = 5) -> None:
        self.most = most
        self.replaced: list[str] = []

    def before_train_epoch(self, runner: Runner) -> None:
        self.replaced = []

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        samples = data_batch.get("data_samples", ()) if isinstance(data_batch, Mapping) else ()
        for sample in samples:
            self.replaced += getattr(sample, "replaced", ())

    def after_train_epoch(self, runner: Runner) -> None:
        replaced = [message for rank in all_gather_object(self.replaced) for message in rank]
        if replaced:
            runner.message_hub.update_scalar("train/replaced_images", len(replaced))
            distinct = list(dict.fromkeys(replaced))
            more = f"\n  and {len(distinct) - self.most} more" if len(distinct) > self.most else ""
            runner.logger.warning(f"{len(replaced)} images could not be read in this epoch and were replaced by others:"
                                  + "".join(f"\n  {message}" for message in distinct[:self.most]) + more)


class TimedFetch:
    """Takes the samples of a batch from a data set, as torch's loader would, and notes in them how long that took.

    torch calls `dataset.__getitems__` where there is one.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __call__(self, indices: Sequence[int]) -> list[Any]:
        start = time.perf_counter()
        samples = [self.dataset[index] for index in indices]
        seconds = time.perf_counter() - start
        return [{**sample, "load_seconds": seconds} if isinstance(sample, dict) else sample for sample in samples]


@HOOKS.register_module()
class ThroughputHook(Hook):
    """Log how many images a second are trained, and beside it how many the data loader could give at most.

    What the loader could give is measured where images are loaded, in the workers: images over the time spent on them, times the
    number of workers. If training waits for data more than `tolerated` of its time, the end of the epoch tells so.

    Args:
        tolerated: share of the time.
    """

    priority = "HIGH"                                        # the batch must be as the model knows it when others see it

    def __init__(self, tolerated: float = 0.1) -> None:
        self.tolerated = tolerated

    def before_train(self, runner: Runner) -> None:
        dataset = runner.train_dataloader.dataset
        if not hasattr(dataset, "__getitems__"):
            dataset.__getitems__ = TimedFetch(dataset)

    def before_train_epoch(self, runner: Runner) -> None:
        self.finished = time.perf_counter()
        self.waited = self.worked = 0.0

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.waited += time.perf_counter() - self.finished
        seconds = data_batch.pop("load_seconds", None) if isinstance(data_batch, dict) else None
        if seconds:
            workers = max(1, runner.train_dataloader.num_workers) * get_world_size()
            runner.message_hub.update_scalar("train/loader_images_per_s", len(seconds) * workers / max(seconds[0], 1e-9))

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        seconds = time.perf_counter() - self.finished
        self.finished += seconds
        self.worked += seconds
        runner.message_hub.update_scalar("train/images_per_s", images_in(runner.train_dataloader, data_batch) / seconds)

    def after_val(self, runner: Runner) -> None:
        self.finished = time.perf_counter()                  # between two iterations of IterLoop

    def after_train_epoch(self, runner: Runner) -> None:
        if self.worked > 10 and self.waited > self.tolerated * self.worked:  # in seconds: not for the start of the workers alone
            runner.logger.warning(f"training waited for data {self.waited / self.worked:.0%} of its time; more workers may help "
                                  f"(train_dataloader.num_workers, now {runner.train_dataloader.num_workers})")
