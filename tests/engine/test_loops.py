"""Resuming: the next batch, the same bits."""
import pytest
import torch

from visionkit.engine import Stopped
from visionkit.engine.checkpoint import read_checkpoint
from visionkit.registry import ConfigError

IN_MID_EPOCH = "custom_hooks.0={'type': 'ToyRecorder', 'signal_at': 8}"    # an epoch has 6 iterations
BY_ITER = """
train_cfg = dict(_delete_=True, type="IterLoop", max_iters=12, val_interval=50)
param_scheduler = [dict(type="CosineAnnealingLR", by_epoch=False)]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=100))
"""


def weights(runner):
    return {**runner.model.state_dict(), **{f"momentum{i}": state["momentum_buffer"]
                                            for i, state in enumerate(runner.optim_wrapper.optimizer.state.values())}}


def assert_same(run, other):
    assert run.keys() == other.keys()
    assert all(torch.equal(run[key], other[key]) for key in run)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("more", ["", BY_ITER, BY_ITER + "train_dataloader = dict(sampler=dict(type='InfiniteDrawSampler'))\n"],
                         ids=["epochs", "iterations", "iterations, infinite"])
def test_a_run_stopped_in_mid_epoch_goes_on_bit_for_bit(toy, toy_parts, more, workers):
    data = f"train_dataloader.num_workers={workers}"
    whole = toy("whole", data, more=more)
    seen, losses, rates = list(toy_parts.SEEN), list(toy_parts.LOSSES), list(toy_parts.RATES)
    with pytest.raises(Stopped):
        toy("parts", data, IN_MID_EPOCH, more=more)
    first = len(toy_parts.LOSSES)
    assert first == 9                                        # the iteration that was under way is finished
    assert seen[:len(toy_parts.SEEN)] == toy_parts.SEEN
    before = list(toy_parts.SEEN)
    resumed = toy("parts", data, more=more, resume=True)
    assert before + toy_parts.SEEN == seen
    assert losses[first:] == toy_parts.LOSSES
    assert rates[first:] == toy_parts.RATES
    assert_same(weights(whole), weights(resumed))


def test_batches_already_trained_are_not_loaded_again(toy, toy_parts, monkeypatch):
    loaded = []
    load = toy_parts.ToyData.__getitem__
    monkeypatch.setattr(toy_parts.ToyData, "__getitem__", lambda self, draw: loaded.append(int(draw)) or load(self, draw))
    with pytest.raises(Stopped):
        toy("run", IN_MID_EPOCH)
    loaded.clear()
    toy("run", resume=True)
    assert loaded[-len(toy_parts.SEEN):] == [index for index, _ in toy_parts.SEEN]
    assert len(loaded) - len(toy_parts.SEEN) <= 1            # the one that the pre-flight looks at


def test_a_sampler_without_resume_at_goes_on_by_loading(toy, toy_parts):
    sampler = "train_dataloader = dict(sampler=dict(type='DefaultSampler', shuffle=True), dataset=dict(augment=False))\n"
    whole = toy("whole", more=sampler)
    with pytest.raises(Stopped):
        toy("parts", IN_MID_EPOCH, more=sampler)
    assert_same(weights(whole), weights(toy("parts", more=sampler, resume=True)))


def test_a_stop_at_the_end_of_an_epoch_leaves_nothing_out(toy, toy_parts, validation):
    whole = toy("whole", more=validation)
    with pytest.raises(Stopped):
        toy("parts", "custom_hooks.0={'type': 'ToyRecorder', 'signal_at': 5}", more=validation)
    resumed = toy("parts", more=validation, resume=True)
    assert_same(weights(whole), weights(resumed))
    errors = [runner.message_hub.get_scalar("val/toy/error").data[0].tolist() for runner in (whole, resumed)]
    assert errors[0] == errors[1]                            # both validations took place


@pytest.mark.parametrize("more", ["", BY_ITER.replace("50", "6")], ids=["epochs", "iterations"])
def test_a_stop_in_validation_repeats_it(toy, toy_parts, validation, more):
    more = validation + more
    ema = "+custom_hooks.1={'type': 'EMAHook'}"              # during validation the model holds the averaged weights
    whole = toy("whole", ema, more=more)
    with pytest.raises(Stopped):
        toy("parts", ema, "+custom_hooks.0.signal_in_val=True", "default_hooks.checkpoint.interval=5", more=more)
    resumed = toy("parts", ema, more=more, resume=True)
    assert_same(weights(whole), weights(resumed))
    errors = [runner.message_hub.get_scalar("val/toy/error").data[0].tolist() for runner in (whole, resumed)]
    assert len(errors[0]) == 2
    assert errors[0] == errors[1]


def test_a_resumed_run_keeps_its_seed(toy, toy_parts):
    toy("whole", "randomness.seed=5")
    seen = list(toy_parts.SEEN)
    with pytest.raises(Stopped):
        toy("parts", IN_MID_EPOCH, "randomness.seed=5")
    before = list(toy_parts.SEEN)
    assert toy("parts", resume=True).seed == 5               # the config says 0
    assert before + toy_parts.SEEN == seen


def test_another_batch_size_resumes_at_the_same_image(toy, toy_parts):
    toy("whole", "train_dataloader.dataset.length=12")
    seen = list(toy_parts.SEEN)
    with pytest.raises(Stopped):
        toy("parts", "train_dataloader.dataset.length=12", "custom_hooks.0={'type': 'ToyRecorder', 'signal_at': 7}")
    before = list(toy_parts.SEEN)
    runner = toy("parts", "train_dataloader.dataset.length=12", "train_dataloader.batch_size=4", resume=True)
    assert before + toy_parts.SEEN == seen
    assert runner.iter == 6                                  # as if all epochs had had three iterations


@pytest.mark.parametrize("schedule", [[{"type": "CosineAnnealingLR"}], [{"type": "MultiStepLR", "milestones": [2, 3], "gamma": 0.5}],
                                      [{"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "end": 9},
                                       {"type": "CosineAnnealingLR", "begin": 1, "convert_to_iter_based": True}],
                                      [{"type": "OneCycleLR", "eta_max": 0.1, "total_steps": 24, "by_epoch": False}]],
                         ids=["cosine", "steps", "warm-up and cosine by iteration", "one cycle"])
def test_more_epochs_continue_the_schedule_as_if_new_from_the_start(toy, toy_parts, schedule):
    options = [f"param_scheduler={schedule}"]
    toy("whole", *options, "train_cfg.max_epochs=4")
    rates = list(toy_parts.RATES)
    toy("parts", *options, "train_cfg.max_epochs=2")
    toy("parts", *options, "train_cfg.max_epochs=4", resume=True)
    assert rates[12:] == pytest.approx(toy_parts.RATES, rel=1e-12)
    assert len(set(rates[12:])) > 1                          # the schedule moves there, so a frozen one would be noticed


def test_more_iterations_continue_the_schedule(toy, toy_parts):
    toy("whole", "train_cfg.max_iters=24", more=BY_ITER)
    rates = list(toy_parts.RATES)
    toy("parts", more=BY_ITER)
    toy("parts", "train_cfg.max_iters=24", more=BY_ITER, resume=True)
    assert rates[12:] == pytest.approx(toy_parts.RATES, rel=1e-12)


def test_another_milestone_rate_or_momentum_is_followed_too(toy, toy_parts):
    options = ["param_scheduler=[{'type': 'MultiStepLR', 'milestones': [3], 'gamma': 0.5}]", "optim_wrapper.optimizer.lr=0.2"]
    toy("parts")
    runner = toy("parts", *options, "train_cfg.max_epochs=4", "optim_wrapper.optimizer.momentum=0.5", resume=True)
    assert toy_parts.RATES == [0.2] * 6 + [0.1] * 6
    assert runner.optim_wrapper.param_groups[0]["momentum"] == 0.5


def test_counting_epochs_while_training_by_iterations_is_an_error(toy):
    with pytest.raises(ConfigError, match=r"default_hooks\.checkpoint: .*set by_epoch=False"):
        toy("run", "default_hooks.checkpoint.by_epoch=True", more=BY_ITER)


def test_an_epoch_checkpoint_knows_its_place(toy, tmp_path):
    toy("run")
    meta = read_checkpoint(tmp_path / "run" / "epoch_1.pth")["meta"]
    assert (meta["epoch"], meta["iter"]) == (1, 6)
