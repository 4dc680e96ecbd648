"""Training loops that go on at the very next batch, wherever a run stopped."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_world_size
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from mmengine.runner.base_loop import BaseLoop
from mmengine.runner.utils import calc_dynamic_intervals
from torch.utils.data import BatchSampler, DataLoader

from visionkit.datasets.packed_batches import PackedBatchSampler
from visionkit.datasets.sampler import InfiniteDrawSampler
from visionkit.registry import LOOPS


def geometry(dataloader: DataLoader) -> dict[str, int | str]:
    """What an iteration means: how many images, or packs of images, all processes take together, how many iterations an epoch has, and
    what packs there are depends on."""
    batch_size = getattr(dataloader.batch_sampler, "batch_size", None) or 1
    packing = {"packing": dataloader.batch_sampler.recipe} if isinstance(dataloader.batch_sampler, PackedBatchSampler) else {}
    return {"images_per_iter": batch_size * get_world_size(), "iters_per_epoch": len(dataloader), **packing}


def same_images(batches: int, then: Mapping[str, Any], now: Mapping[str, Any]) -> int:
    """How many batches hold now what so many held then. Where packs are made in another way this is an estimate by the length of an
    epoch: some images near that place are seen once more, or not."""
    if then.get("packing") != now.get("packing"):
        return batches * now["iters_per_epoch"] // then["iters_per_epoch"]
    return batches * then["images_per_iter"] // now["images_per_iter"]


def images_in(dataloader: DataLoader, batch: Any) -> int:
    """How many images all processes take in this iteration; with packs, estimated from the batch of this process."""
    if isinstance(dataloader.batch_sampler, PackedBatchSampler) and isinstance(batch, Mapping) and "data_samples" in batch:
        return len(batch["data_samples"]) * get_world_size()
    return geometry(dataloader)["images_per_iter"]


def batches_from(dataloader: DataLoader, first: int) -> Iterator[Any]:
    """The batches of `dataloader` from number `first` on; those before are not loaded where the sampler can tell what comes next."""
    sampler = getattr(dataloader.batch_sampler, "sampler", None)
    if first and hasattr(dataloader.batch_sampler, "resume_at"):
        dataloader.batch_sampler.resume_at(first)
        first = 0
    elif first and hasattr(sampler, "resume_at") and type(dataloader.batch_sampler) is BatchSampler:
        sampler.resume_at(first * dataloader.batch_size)
        first = 0
    return islice(dataloader, first, None)


def endless_batches(dataloader: DataLoader, first: int) -> Iterator[Any]:
    """The batches of one epoch after the other, from number `first` on."""
    sampler = getattr(dataloader.batch_sampler, "sampler", None)
    if isinstance(sampler, (InfiniteDrawSampler, InfiniteSampler)):
        yield from batches_from(dataloader, first)
    epoch, first = divmod(first, len(dataloader))
    while True:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        yield from batches_from(dataloader, first)
        epoch, first = epoch + 1, 0


def _iteration(meaning: Mapping[str, Any]) -> str:
    return f"{meaning['images_per_iter']} " + (f"packs by {meaning['packing']}" if "packing" in meaning else "images")


@LOOPS.register_module(["EpochLoop", "EpochBasedTrainLoop"])
class EpochLoop(EpochBasedTrainLoop):
    """Train epoch by epoch, validating in between.

    A run resumes in the middle of an epoch at the next batch, also with another batch size or number of processes: what counts is
    the images, or packs, of the epoch that were seen. An epoch of packs is whole steps, so with other steps it may begin some packs
    from where it began before. A validation that a stop cut short is made up for.

    Args:
        runner: the runner; it gives itself and the data loader.
        dataloader: of the training images.
        max_epochs: when to stop.
        val_begin: the first epoch after which to validate.
        val_interval: epochs from one validation to the next; the last epoch is always validated.
        dynamic_intervals: pairs (epoch, interval): from that epoch on another interval.
    """

    def __init__(self, runner: Runner, dataloader: DataLoader | dict, max_epochs: int, val_begin: int = 1, val_interval: int = 1,
                 dynamic_intervals: list[tuple[int, int]] | None = None) -> None:
        super().__init__(runner, dataloader, max_epochs, val_begin, val_interval, dynamic_intervals)
        self._first_batch = 0                                # of the next epoch

    def run(self) -> Any:
        self._first_batch = self._batches_done()
        self.runner.call_hook("before_train")
        if self._epoch and not self._first_batch:
            self._validate(again=True)
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self._validate()
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_epoch(self) -> None:
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        first, self._first_batch = self._first_batch, 0
        for index, batch in enumerate(batches_from(self.dataloader, first), first):
            self.run_iter(index, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def _batches_done(self) -> int:
        """Of the epoch in which the run resumes; `iter` is put in step when an iteration now means something else."""
        now = geometry(self.dataloader)
        then = self.runner.message_hub.get_info("geometry") or now
        done = self._iter - self._epoch * then["iters_per_epoch"]
        if then != now and self._iter:
            done = min(same_images(done, then, now), now["iters_per_epoch"])     # rounded up, an epoch may have been longer then
            old, self._iter = self._iter, self._epoch * now["iters_per_epoch"] + done
            self.runner.logger.info(f"the checkpoint's iterations have {_iteration(then)} and its epochs {then['iters_per_epoch']} "
                                    f"iterations; here they have {_iteration(now)} and {now['iters_per_epoch']}, so iteration {old} there "
                                    f"is {self._iter} here")
        return done

    def _validate(self, again: bool = False) -> None:
        self._decide_current_val_interval()
        due = self._epoch >= self.val_begin and (self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs)
        _validate_if(self.runner, due, again)


@LOOPS.register_module(["IterLoop", "IterBasedTrainLoop"])
class IterLoop(IterBasedTrainLoop):
    """Train for a number of iterations, validating in between; a run resumes at the next batch.

    Args:
        runner: the runner; it gives itself and the data loader.
        dataloader: of the training images; any sampler will do, a finite one starts over.
        max_iters: when to stop.
        val_begin: the first iteration after which to validate.
        val_interval: iterations from one validation to the next; the last iteration is always validated.
        dynamic_intervals: pairs (iteration, interval): from that iteration on another interval.
    """

    def __init__(self, runner: Runner, dataloader: DataLoader | dict, max_iters: int, val_begin: int = 1, val_interval: int = 1000,
                 dynamic_intervals: list[tuple[int, int]] | None = None) -> None:
        BaseLoop.__init__(self, runner, dataloader)          # mmengine's starts the workers, before it is known where to resume
        if max_iters != int(max_iters):
            raise ValueError(f"max_iters is a whole number, got {max_iters}")
        self._max_iters, self._max_epochs = int(max_iters), 1
        self._iter = self._epoch = 0
        self.val_begin, self.val_interval = val_begin, val_interval
        self.dynamic_milestones, self.dynamic_intervals = calc_dynamic_intervals(val_interval, dynamic_intervals)
        self.stop_training = False                           # set by mmengine's EarlyStoppingHook
        self.runner.visualizer.dataset_meta = getattr(self.dataloader.dataset, "metainfo", None)

    def run(self) -> Any:
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        now = geometry(self.dataloader)
        then = self.runner.message_hub.get_info("geometry") or now
        batches = endless_batches(self.dataloader, same_images(self._iter, then, now))
        if self._iter:
            self._validate(again=True)
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(batches))
            self._validate()
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

    def _validate(self, again: bool = False) -> None:
        self._decide_current_val_interval()
        due = self._iter >= self.val_begin and (self._iter % self.val_interval == 0 or self._iter == self._max_iters)
        _validate_if(self.runner, due, again)


def _validate_if(runner: Runner, due: bool, again: bool) -> None:
    """Validate if it is due; `again`: in a resumed run, and only if the checkpoint does not know of it."""
    if runner.val_loop is None or not due:
        return
    if again and runner.message_hub.get_info("validated_at") == runner.iter:
        return
    if again:
        runner.logger.info("validating where the checkpoint was saved: the run may have stopped before it did")
    runner.val_loop.run()
