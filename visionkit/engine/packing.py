"""How well packs are filled: over a data set before training, and step by step while it goes on."""
from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.runner import Runner

from visionkit.datasets.packed_batches import PackedBatchSampler
from visionkit.datasets.packing import Pack
from visionkit.registry import HOOKS, ConfigError

PACKERS_SHOWN = ("next_fit", "best_fit", "balanced")


@dataclass
class PackingReport:
    """One pass or several over a data set, in packs. A step is what all processes take together, one pack each."""
    packer: str
    max_tokens: int
    samples: int                                             # that are in packs
    left_out: int                                            # longer than a pack, and filtered
    overlong: int                                            # packs that are above the limit: one sample each
    packs: int
    fill: float                                              # tokens over the room in all packs, those above the limit aside
    least_packs: int                                         # as many as the tokens would take without a gap
    samples_per_pack: tuple[int, float, int]                 # fewest, mean, most
    pack_deviation: float                                    # standard deviation of the tokens of a pack, over the limit
    tokens_per_rank: list[int]
    waiting: float                                           # time of a process, on average, for the one with most tokens in its step
    shift: float                                             # how far a sample is from its place in the order, on average, in samples
    long_weight: float                                       # mean over packs of their mean length, over the mean length of all samples

    def __str__(self) -> str:
        few, mean, many = self.samples_per_pack
        rows = [("packs", f"{self.packs} of at most {self.max_tokens} tokens (the tokens alone would take {self.least_packs})"),
                ("samples", f"{self.samples} in packs, {self.overlong} of them alone above the limit; {self.left_out} left out for that"),
                ("fill", f"{self.fill:.3f}"), ("samples a pack", f"{few} to {many}, {mean:.1f} on average"),
                ("tokens a pack", f"deviate by {self.pack_deviation:.1%} of the limit"),
                ("tokens a process", f"{', '.join(map(str, self.tokens_per_rank))}; waits {self.waiting:.1%} of a step for the longest"),
                ("order", f"samples are {self.shift:.1f} places from where they were drawn"),
                ("weight", f"a mean over packs of means over samples sees samples {self.long_weight:.2f} times as long as they are")]
        return "\n".join([self.packer, *(f"  {title:<18}{text}" for title, text in rows)])


def report_packs(packer: str, packs: Sequence[Pack], max_tokens: int, world_size: int, samples: int) -> PackingReport:
    """Count over packs whose items tell their `epoch` and their `position` in its order.

    Args:
        packer: what made them, for the report.
        packs: in the order in which they come.
        max_tokens: the limit.
        world_size: processes that they are dealt to.
        samples: that were drawn.
    """
    tokens = np.array([pack.tokens for pack in packs])
    sizes = np.array([len(pack) for pack in packs])
    within = tokens <= max_tokens
    steps = tokens[:len(tokens) // world_size * world_size].reshape(-1, world_size)
    drawn = np.array([(place.epoch, place.position) for pack in packs for place in pack.items])
    ranks = np.lexsort(drawn.T[::-1]).argsort()              # samples that were left out leave gaps in the positions
    return PackingReport(
        packer=packer, max_tokens=max_tokens, samples=int(sizes.sum()), left_out=samples - int(sizes.sum()), overlong=int((~within).sum()),
        packs=len(packs), fill=float(tokens[within].sum() / (within.sum() * max_tokens)) if within.any() else math.nan,
        least_packs=math.ceil(tokens.sum() / max_tokens), samples_per_pack=(int(sizes.min()), float(sizes.mean()), int(sizes.max())),
        pack_deviation=float(tokens[within].std() / max_tokens) if within.any() else math.nan,
        tokens_per_rank=[int(tokens[rank::world_size].sum()) for rank in range(world_size)],
        waiting=waiting(steps), shift=float(np.abs(ranks - np.arange(len(ranks))).mean()),
        long_weight=float((tokens / sizes).mean() / (tokens.sum() / sizes.sum())))


def waiting(steps: np.ndarray) -> float:
    """The part of its time that a process waits, on average, where a step takes as long as its most tokens: [steps, processes]."""
    return 1 - steps.mean() / steps.max(1).mean() if steps.size else 0.0


def compare_packers(sampler: Any, max_tokens: int, length: Any, packers: Sequence[str] = PACKERS_SHOWN, world_size: int = 1,
                    filter_overlong: bool = False, epochs: int = 1) -> list[PackingReport]:
    """The first passes of a sampler, packed by each of several packers.

    Args:
        sampler: a `DrawSampler` or an `InfiniteDrawSampler` of one process.
        max_tokens: of a pack.
        length: as `PackedBatchSampler` takes it.
        packers: their names.
        world_size: processes to deal packs to.
        filter_overlong: as `PackedBatchSampler` has it.
        epochs: passes.

    Raises:
        ConfigError: an unknown packer, or a data set that does not tell its lengths.
    """
    reports = []
    for packer in packers:
        batches = PackedBatchSampler(sampler, max_tokens, packer, length, filter_overlong=filter_overlong)
        reports.append(report_packs(packer, list(batches.packs(epochs=epochs)), max_tokens, world_size,
                                    epochs * len(sampler.dataset)))
    return reports


@HOOKS.register_module()
class PackingHook(Hook):
    """Log of every step of packed batches the tokens of this process (`train/tokens`) and how full its packs are (`train/fill`), and at
    the end of an epoch how evenly the processes had work.

    Warns once where images have other sizes than the length counted on: then packs are not what `max_tokens` says.
    """

    priority = "HIGH"                                        # the batch must be as the loader gives it

    def __init__(self) -> None:
        self.tokens: list[int] = []                          # of each step of this epoch
        self.told = False

    def before_train(self, runner: Runner) -> None:
        self.batches = runner.train_dataloader.batch_sampler
        if not isinstance(self.batches, PackedBatchSampler):
            raise ConfigError("a PackingHook looks at the batches of a PackedBatchSampler, and training has none; leave the hook out",
                              ("custom_hooks",))

    def before_train_epoch(self, runner: Runner) -> None:
        self.tokens = []

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        planned = self.batches.handed_out.popleft()
        self.tokens.append(planned.tokens)
        runner.message_hub.update_scalar("train/tokens", planned.tokens)
        runner.message_hub.update_scalar("train/fill", planned.tokens / (planned.packs * self.batches.max_tokens))
        images = data_batch.get("inputs", ()) if isinstance(data_batch, Mapping) else ()
        if hasattr(self.batches.length, "of_size") and not self.told:
            tokens = sum(self.batches.length.of_size(*image.shape[-2:]) for image in images)
            self.told = tokens != planned.tokens
            if self.told:
                runner.logger.log(logging.WARNING, f"a batch has {tokens} tokens where {planned.tokens} were planned: the pipeline makes "
                                  f"images of other sizes than its transforms tell, or an image that cannot be read was replaced")

    def after_train_epoch(self, runner: Runner) -> None:
        if not self.tokens:                                  # resumed behind the last step of an epoch
            return
        steps = np.array(all_gather_object(self.tokens)).T   # [steps, processes]
        room = self.batches.batch_size * self.batches.max_tokens
        runner.logger.info(f"packs: {steps.sum()} tokens in {len(steps)} steps, {steps.mean() / room:.1%} full; processes wait "
                           f"{waiting(steps):.1%} of a step for the one with most tokens")
