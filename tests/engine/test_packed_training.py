"""Training on packs: the runner, resuming, two processes, what is logged."""
import os
import re
from collections import Counter
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from torch.utils.data import DataLoader

from visionkit.datasets import Pack, pack_all
from visionkit.datasets.packed_batches import Place
from visionkit.engine import Stopped
from visionkit.engine.loops import EpochLoop, same_images
from visionkit.engine.packing import PackingHook, report_packs
from visionkit.registry import PACKERS, ConfigError

PACKED = """
train_dataloader = dict(batch_size=1, sampler=dict(type={sampler!r}), dataset=dict(length=40),
                        batch_sampler=dict(type="PackedBatchSampler", packer={packer!r}, max_tokens=20, length=dict(type="ToyLength")))
custom_hooks = [dict(type="ToyRecorder"), dict(type="PackingHook")]
"""
BY_ITER = """
train_cfg = dict(_delete_=True, type="IterLoop", max_iters=30, val_interval=50)
param_scheduler = []
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=100))
"""



def log_of(runner):
    with open(os.path.join(runner.log_dir, f"{runner.timestamp}.log")) as file:
        return file.read()


SIGNAL = "custom_hooks.0={'type': 'ToyRecorder', 'signal_at': 17}"        # an epoch has about 13 iterations


@pytest.mark.parametrize("sampler, more, workers", [("DrawSampler", "", 0), ("DrawSampler", BY_ITER, 0), ("InfiniteDrawSampler", BY_ITER,
2)],
                         ids=["epochs", "iterations", "iterations, infinite, workers"])
def test_a_stopped_run_goes_on_with_the_very_next_image(toy, toy_parts, sampler, more, workers):
    """Lengths depend on the draws here. Images and losses of the resumed run are those of the whole run, to the bit."""
    more = PACKED.format(sampler=sampler, packer="best_fit") + more
    data = f"train_dataloader.num_workers={workers}"
    toy("whole", data, more=more)
    seen, losses = list(toy_parts.SEEN), list(toy_parts.LOSSES)
    with pytest.raises(Stopped):
        toy("parts", data, SIGNAL, more=more)
    before, first = list(toy_parts.SEEN), len(toy_parts.LOSSES)
    assert first == 18
    toy("parts", data, more=more, resume=True)
    assert before + toy_parts.SEEN == seen
    assert losses[first:] == toy_parts.LOSSES


def test_packs_already_trained_are_not_loaded_again(toy, toy_parts, monkeypatch):
    more, loaded, load = PACKED.format(sampler="DrawSampler", packer="best_fit"), [], toy_parts.ToyData.__getitem__
    monkeypatch.setattr(toy_parts.ToyData, "__getitem__", lambda self, draw: loaded.append(int(draw)) or load(self, draw))
    with pytest.raises(Stopped):
        toy("run", SIGNAL, more=more)
    loaded.clear()
    toy("run", more=more, resume=True)
    assert len(loaded) - len(toy_parts.SEEN) <= 1            # the one that the pre-flight looks at


def test_an_epoch_has_the_iterations_that_its_packs_need_and_the_schedule_knows(toy, toy_parts):
    runner = toy("run", more=PACKED.format(sampler="DrawSampler", packer="best_fit"))
    per_epoch = len(runner.train_dataloader)
    assert (runner.iter, runner.max_iters) == (2 * per_epoch, 2 * per_epoch)
    assert len(toy_parts.RATES) == 2 * per_epoch
    times = Counter(index for index, _ in toy_parts.SEEN)
    assert set(times) == set(range(40))
    assert set(times.values()) <= {1, 2, 3}                  # two passes, up to the packs by which they differ


def test_another_world_size_resumes_at_the_same_pack_of_the_epoch_and_other_packs_at_about_the_same_image():
    """What an iteration is when packs are dealt to 2 processes, or hold twice as much."""
    then = {"images_per_iter": 1, "iters_per_epoch": 40, "packing": "small"}
    assert same_images(30, then, {"images_per_iter": 2, "iters_per_epoch": 20, "packing": "small"}) == 15
    assert same_images(30, then, {"images_per_iter": 1, "iters_per_epoch": 20, "packing": "large"}) == 15
    assert same_images(30, then, {"images_per_iter": 8, "iters_per_epoch": 12}) == 9


def test_a_run_goes_on_with_larger_packs_and_says_so(toy, toy_parts, tmp_path):
    more = PACKED.format(sampler="DrawSampler", packer="best_fit")
    with pytest.raises(Stopped):
        toy("run", SIGNAL, more=more)
    done = len(toy_parts.SEEN)
    runner = toy("run", "train_dataloader.batch_sampler.max_tokens=40", more=more, resume=True)
    assert runner.iter == runner.max_iters == 2 * len(runner.train_dataloader)
    assert abs(done + len(toy_parts.SEEN) - 80) <= 8         # of 2 x 40 images
    assert "packs by (40, {'type': 'best_fit'}" in log_of(runner)


def test_what_a_step_holds_is_logged_and_checked(toy, toy_parts):
    more = PACKED.format(sampler="DrawSampler", packer="next_fit") + "default_hooks = dict(logger=dict(interval=1))\n"
    runner = toy("run", "train_cfg.max_epochs=1", more=more)
    fills = [value for value, _ in zip(*runner.message_hub.get_scalar("train/fill").data, strict=True)]
    tokens = [value for value, _ in zip(*runner.message_hub.get_scalar("train/tokens").data, strict=True)]
    assert len(fills) == len(runner.train_dataloader) == len(tokens)
    assert fills == pytest.approx([count / 20 for count in tokens])
    assert re.search(rf"packs: {sum(tokens):.0f} tokens in {len(tokens)} steps, {np.mean(fills):.1%} full; processes wait 0.0%",
                     log_of(runner))
    rate = runner.message_hub.get_scalar("train/images_per_s").data[0]
    assert len(set(rate)) == len(rate)
    assert "images of other sizes" not in log_of(runner)


def test_images_that_are_not_as_long_as_planned_are_told_once(toy, toy_parts):
    more = PACKED.format(sampler="DrawSampler", packer="next_fit")
    runner = toy("run", "train_cfg.max_epochs=1", "train_dataloader.batch_sampler.length.type=WrongToyLength", more=more)
    assert log_of(runner).count("the pipeline makes images of other sizes than its transforms tell") == 1


def test_the_hook_compares_processes(monkeypatch):
    lines = []
    monkeypatch.setattr("visionkit.engine.packing.all_gather_object", lambda mine: [mine, [10, 5]])
    hook = PackingHook()
    hook.tokens, hook.batches = [10, 10], SimpleNamespace(batch_size=1, max_tokens=10)
    hook.after_train_epoch(SimpleNamespace(logger=SimpleNamespace(info=lines.append)))
    assert lines == ["packs: 35 tokens in 2 steps, 87.5% full; processes wait 12.5% of a step for the one with most tokens"]


def test_the_hook_says_nothing_of_an_epoch_without_steps():
    """As where a run resumes behind the last step of an epoch."""
    lines = []
    hook = PackingHook()
    hook.batches = SimpleNamespace(batch_size=1, max_tokens=10)
    hook.after_train_epoch(SimpleNamespace(logger=SimpleNamespace(info=lines.append)))
    assert lines == []


def test_a_stop_at_the_last_iteration_of_an_epoch_goes_on_with_the_next_epoch(toy, toy_parts):
    more = PACKED.format(sampler="DrawSampler", packer="best_fit")
    per_epoch = len(toy("whole", more=more).train_dataloader)
    seen = list(toy_parts.SEEN)
    with pytest.raises(Stopped):
        toy("parts", f"custom_hooks.0={{'type': 'ToyRecorder', 'signal_at': {per_epoch - 1}}}", more=more)
    before = list(toy_parts.SEEN)
    runner = toy("parts", more=more, resume=True)
    assert before + toy_parts.SEEN == seen
    assert "nan" not in log_of(runner)


def test_an_epoch_that_was_longer_then_is_done_now():
    """14 of 16 batches of 3 packs are more than the 40 packs that an epoch has now: none is left, and the next begins where it should."""
    loop, info = EpochLoop.__new__(EpochLoop), []
    then = {"images_per_iter": 3, "iters_per_epoch": 16}
    loop._iter, loop._epoch, loop.dataloader = 14, 0, DataLoader(range(40), batch_size=1)
    loop._runner = SimpleNamespace(message_hub=SimpleNamespace(get_info=lambda key: then), logger=SimpleNamespace(info=info.append))
    assert loop._batches_done() == 40
    assert loop._iter == 40
    assert len(info) == 1


def test_the_hook_wants_packs(toy):
    with pytest.raises(ConfigError, match="custom_hooks: a PackingHook looks at the batches of a PackedBatchSampler"):
        toy("run", "custom_hooks=[{'type': 'PackingHook'}]")


@pytest.mark.parametrize("change, message", [
    ("packer=bestfit7", r"packer\.type: no packer named 'bestfit7'"),
    ("length.type=ToyLenght", r"length\.type: no length named 'ToyLenght'\. Did you mean 'ToyLength'"),
    ("max_tokens=1", r"max_tokens: no sample has 1 tokens or less"),
], ids=["packer", "length", "limit"])
def test_a_batch_sampler_is_checked_before_the_run(toy, change, message):
    with pytest.raises(ConfigError, match=rf"train_dataloader\.batch_sampler\.{message}"):
        toy("run", f"train_dataloader.batch_sampler.{change}", "+train_dataloader.batch_sampler.filter_overlong=True",
            more=PACKED.format(sampler="DrawSampler", packer="best_fit"))


@pytest.mark.parametrize("key", ["shuffle", "drop_last"])
def test_what_a_sampler_decides_is_not_asked_of_the_loader(toy, key):
    with pytest.raises(ConfigError, match=rf"^train_dataloader\.{key}: it is the (batch_)?sampler that decides on this; leave {key} out"):
        toy("run", f"+train_dataloader.{key}=True", more=PACKED.format(sampler="DrawSampler", packer="best_fit"))


def test_packs_are_refused_outside_training(toy, validation):
    """Their epochs are as long as the first pass, and their last step is filled from the next."""
    batch_sampler = "dict(type='PackedBatchSampler', max_tokens=20, length=dict(type='ToyLength')), batch_size"
    with pytest.raises(ConfigError, match=r"^val_dataloader\.batch_sampler: packs are for training: .* leave the batch_sampler out"):
        toy("run", more=validation.replace("batch_size", f"batch_sampler={batch_sampler}", 1))


@pytest.mark.parametrize("sampler", ["InfiniteDrawSampler", "InfiniteSampler"])
@pytest.mark.parametrize("loop", ["type='EpochLoop'", "by_epoch=True"], ids=["named", "default"])
def test_epochs_that_would_not_end_are_refused(toy, sampler, loop):
    with pytest.raises(ConfigError, match=rf"^train_dataloader\.sampler: {sampler} never comes to the end of an epoch, which EpochLoop"):
        toy("run", more=f"train_cfg = dict(_delete_=True, max_epochs=1, {loop})\ntrain_dataloader = dict(sampler=dict(type={sampler!r}))")


# ---------------------------------------------------------------------------------------------------------------------- the report

def packs_of(*lengths):
    """Packs of these lengths, whose samples were drawn in this order."""
    position, packs = count(), []
    for some in lengths:
        packs.append(Pack([Place(0, next(position), 0) for _ in some], list(some), sum(some)))
    return packs


def test_a_report_by_hand():
    report = report_packs("by hand", packs_of([4, 6], [5], [3, 3, 3], [25], [10]), max_tokens=10, world_size=2, samples=10)
    assert (report.packs, report.samples, report.left_out, report.overlong) == (5, 8, 2, 1)
    assert report.fill == (10 + 5 + 9 + 10) / 40
    assert report.least_packs == 6                           # 59 tokens
    assert report.samples_per_pack == (1, 8 / 5, 3)
    assert report.tokens_per_rank == [10 + 9 + 10, 5 + 25]
    assert report.waiting == pytest.approx(1 - (10 + 5 + 9 + 25) / 2 / (10 + 25))
    assert report.shift == 0
    assert report.long_weight == pytest.approx((5 + 5 + 3 + 25 + 10) / 5 / (59 / 8))


def test_the_shift_counts_places_among_the_samples_that_are_there():
    packs = packs_of([1, 1], [1, 1])
    packs[0].items, packs[1].items = [Place(0, 7, 0), Place(0, 2, 0)], [Place(0, 3, 0), Place(0, 9, 0)]     # drawn as 2, 3, 7, 9
    assert report_packs("by hand", packs, 10, 1, 4).shift == (2 + 1 + 1 + 0) / 4


@pytest.mark.parametrize("packer, shift", [("next_fit", 0.0), ("best_fit", 5.0), ("balanced", 6.9)])
def test_the_order_of_packs_does_not_put_long_samples_first_or_last(packer, shift):
    """Spec 6, (e): 4000 samples of 5 to 60 tokens, packs of 100, two seeds. Samples come a few places from where they were drawn
    (next-fit 0, best-fit 5.0, balanced 6.9 measured). The mean length in the first half of the packs over that in the second is that of
    the stream itself, to 0.5 % (measured 0.5 %). What does depend on length is what shares a pack: a mean over packs of means over
    samples counts long samples for 1.10, 1.08 and 1.07 times their length."""
    for seed in range(2):
        lengths = np.random.default_rng(seed).integers(5, 61, 4000).tolist()
        packs = list(pack_all(((Place(0, i, i), length) for i, length in enumerate(lengths)),
                              PACKERS.build(dict(type=packer, max_tokens=100))))
        report = report_packs(packer, packs, 100, 1, 4000)
        emitted = [length for pack in packs for length in pack.lengths]
        halves = [np.mean(some[:2000]) / np.mean(some[2000:]) for some in (emitted, lengths)]
        assert halves[0] == pytest.approx(halves[1], rel=0.005)
        assert report.shift == pytest.approx(shift, abs=0.5)
        assert 1.05 < report.long_weight < 1.12
