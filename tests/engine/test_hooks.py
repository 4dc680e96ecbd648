"""Hooks: what is kept, what repeats, what is told."""
import io
import json
import os
import re
import signal
import sys

import numpy as np
import pytest
import torch

from visionkit.engine import Diverged, Stopped, load_config
from visionkit.engine.checkpoint import read_checkpoint
from visionkit.engine.hooks import CheckpointHook, StopHook, resume_command
from visionkit.engine.launch import test as evaluate
from visionkit.registry import ConfigError


def names(folder):
    return sorted(path.name for path in folder.glob("*.pth"))


def log_of(runner):
    with open(os.path.join(runner.log_dir, f"{runner.timestamp}.log")) as file:
        return file.read()


# ------------------------------------------------------------------------------------------------------------- checkpoints

def test_old_checkpoints_go_after_the_new_one_is_there(toy, tmp_path, monkeypatch):
    present = []
    unlink = type(tmp_path).unlink
    monkeypatch.setattr(type(tmp_path), "unlink", lambda path, **kw: present.append(names(path.parent)) or unlink(path, **kw))
    toy("run", "train_cfg.max_epochs=4", "default_hooks.checkpoint.max_keep_ckpts=2")
    assert present == [["epoch_1.pth", "epoch_2.pth", "epoch_3.pth"], ["epoch_2.pth", "epoch_3.pth", "epoch_4.pth"]]
    assert names(tmp_path / "run") == ["epoch_3.pth", "epoch_4.pth"]
    toy("run", "train_cfg.max_epochs=6", "default_hooks.checkpoint.max_keep_ckpts=2", resume=True)
    assert names(tmp_path / "run") == ["epoch_5.pth", "epoch_6.pth"]       # it knows of those of the run it goes on with


def test_interval_and_save_last(toy, tmp_path):
    toy("every_2", "train_cfg.max_epochs=3", "default_hooks.checkpoint.interval=2")
    assert names(tmp_path / "every_2") == ["epoch_2.pth", "epoch_3.pth"]
    toy("not_last", "train_cfg.max_epochs=3", "default_hooks.checkpoint.interval=2", "+default_hooks.checkpoint.save_last=False")
    assert names(tmp_path / "not_last") == ["epoch_2.pth"]
    toy("by_iter", "+default_hooks.checkpoint.by_epoch=False", "default_hooks.checkpoint.interval=5")
    assert names(tmp_path / "by_iter") == ["iter_10.pth", "iter_12.pth", "iter_5.pth"]
    toy("elsewhere", f"+default_hooks.checkpoint.out_dir={tmp_path / 'disk'}")
    assert names(tmp_path / "disk" / "elsewhere") == ["epoch_1.pth", "epoch_2.pth"]
    runner = toy("elsewhere", f"+default_hooks.checkpoint.out_dir={tmp_path / 'disk'}", "train_cfg.max_epochs=3", resume=True)
    assert "disk/elsewhere/epoch_2.pth" in log_of(runner)


@pytest.mark.parametrize("save_best", ["toy/error", "auto"])
def test_the_best_is_kept_and_survives_resuming(toy, toy_parts, tmp_path, validation, monkeypatch, save_best):
    errors = iter([3.0, 1.0, 2.0, 0.5])
    monkeypatch.setattr(toy_parts.ToyMetric, "compute_metrics", lambda self, results: {"error": next(errors)})
    best = f"+default_hooks.checkpoint.save_best={save_best}"
    toy("run", best, "train_cfg.max_epochs=3", more=validation)
    assert [name for name in names(tmp_path / "run") if "best" in name] == ["best_toy_error_epoch_2.pth"]
    assert "optimizer" not in read_checkpoint(tmp_path / "run" / "best_toy_error_epoch_2.pth")
    errors = iter([2.0, 0.5])                                # epoch 3 once more, as nothing says it was validated, and epoch 4
    runner = toy("run", best, "train_cfg.max_epochs=4", more=validation, resume=True)
    assert [name for name in names(tmp_path / "run") if "best" in name] == ["best_toy_error_epoch_4.pth"]
    assert runner.message_hub.get_info(f"best_{save_best}") == {"score": 0.5, "file": "best_toy_error_epoch_4.pth"}


def test_a_validation_that_the_checkpoint_knows_of_is_not_repeated(toy, toy_parts, validation, monkeypatch):
    errors = iter([3.0, 1.0])
    monkeypatch.setattr(toy_parts.ToyMetric, "compute_metrics", lambda self, results: {"error": next(errors)})
    toy("run", "+default_hooks.checkpoint.save_best=auto", more=validation)
    errors = iter([0.5])                                     # of epoch 3; epoch 2 was the best, and saved again for it
    toy("run", "+default_hooks.checkpoint.save_best=auto", "train_cfg.max_epochs=3", more=validation, resume=True)


def test_a_best_metric_that_is_not_reported_is_an_error(toy, validation):
    with pytest.raises(ConfigError, match="save_best='toy/eror' .*reports: toy/error.*Did you mean 'toy/error'"):
        toy("run", "+default_hooks.checkpoint.save_best=toy/eror", more=validation)
    with pytest.raises(ValueError, match="rule is 'greater' or 'less'"):
        CheckpointHook(save_best="a", rule="bigger")
    with pytest.raises(ValueError, match="max_keep_ckpts"):
        CheckpointHook(max_keep_ckpts=0)


def test_averaged_weights_survive_resuming(toy, tmp_path):
    ema = "+custom_hooks.1={'type': 'EMAHook', 'momentum': 0.3}"
    toy("whole", ema)
    with pytest.raises(Stopped):
        toy("parts", ema, "custom_hooks.0={'type': 'ToyRecorder', 'signal_at': 8}")
    toy("parts", ema, resume=True)
    whole, parts = (read_checkpoint(tmp_path / name / "epoch_2.pth") for name in ("whole", "parts"))
    for key in ("state_dict", "ema_state_dict"):
        assert all(torch.equal(whole[key][name], parts[key][name]) for name in whole[key])
    assert not torch.equal(whole["state_dict"]["classify.weight"], whole["ema_state_dict"]["module.classify.weight"])


def test_a_test_uses_the_averaged_weights_with_the_hook_and_without(toy, toy_file, validation, tmp_path):
    ema = {"type": "EMAHook", "momentum": 0.3}
    more = validation + validation.replace("val_", "test_").replace("ValLoop", "TestLoop")
    runner = toy("run", f"+custom_hooks.1={ema}", more=more)
    checkpoint = read_checkpoint(tmp_path / "run" / "epoch_2.pth")
    own = {name.removeprefix("module."): value for name, value in checkpoint["ema_state_dict"].items() if name != "steps"}
    torch.save({"state_dict": own}, tmp_path / "own.pth")
    (error,) = (evaluate(load_config(toy_file(more)), tmp_path / "run" / "epoch_2.pth", work_dir=tmp_path / "test").values())
    assert error == runner.message_hub.get_scalar("val/toy/error").current()                 # as validation saw the model
    with_hook = load_config(toy_file(more), [f"+custom_hooks.1={ema}"])
    assert evaluate(with_hook, tmp_path / "run" / "epoch_2.pth", work_dir=tmp_path / "test") == {"toy/error": error}
    assert evaluate(with_hook, tmp_path / "own.pth", work_dir=tmp_path / "test") != {"toy/error": error}


def test_checkpoints_hold_only_what_a_safe_loader_takes(toy, tmp_path):
    toy("run")
    checkpoint = torch.load(tmp_path / "run" / "epoch_2.pth", weights_only=True)
    assert checkpoint["message_hub"]["log_scalars"]["train/loss"]["history"].shape == (12,)
    runner = toy("run", "train_cfg.max_epochs=3", resume=True)
    assert runner.message_hub.get_scalar("train/loss").data[0].shape == (18,)


# ------------------------------------------------------------------------------------------------- weights for a part alone

@pytest.fixture
def trunk_file(toy_parts, tmp_path):
    """A trunk that fits the toy's `classify`, and under that name something else."""
    path = tmp_path / "trunk.pth"
    torch.save({"state_dict": {"module.trunk.weight": torch.full((1, 4), 0.25), "module.trunk.bias": torch.full((1,), 0.5),
                               "classify.bias": torch.full((1,), 9.0), "puzzle.order": torch.zeros(3)}}, path)
    return path


def still(name, *options):
    return (name, "optim_wrapper.optimizer.lr=0.0", *options)


def test_one_part_is_filled_from_a_checkpoint_of_another_model(toy, trunk_file):
    runner = toy(*still("run", f"load_from={trunk_file}", "load_from_part=classify", "randomness.seed=3"))
    other = toy(*still("other", "randomness.seed=3"))
    assert runner.model.classify.weight.tolist() == [[0.25] * 4]
    assert runner.model.classify.bias.tolist() == [0.5]
    untouched = [name for name, value in runner.model.state_dict().items() if torch.equal(value, other.model.state_dict()[name])]
    assert untouched
    assert {*runner.model.state_dict()} - {*untouched} == {"classify.weight", "classify.bias"}
    assert f"Linear: loaded 2 tensors of {trunk_file}, whose names there have the prefix 'module.trunk.'; left out 2" in log_of(runner)


def test_a_resumed_run_and_a_test_take_their_own_weights_whole(toy, toy_file, trunk_file, validation, tmp_path):
    part = [f"load_from={trunk_file}", "load_from_part=classify"]
    toy("run", *part)
    saved = read_checkpoint(tmp_path / "run" / "epoch_2.pth")["state_dict"]
    assert saved["classify.bias"].item() != 0.5                                                  # it was trained on
    runner = toy("run", *part, "train_cfg.max_epochs=2", resume=True)
    assert all(torch.equal(value, saved[name]) for name, value in runner.model.state_dict().items())
    more = validation + validation.replace("val_", "test_").replace("ValLoop", "TestLoop")
    alone = evaluate(load_config(toy_file(more)), tmp_path / "run" / "epoch_2.pth", work_dir=tmp_path / "test")
    assert evaluate(load_config(toy_file(more), part), tmp_path / "run" / "epoch_2.pth", work_dir=tmp_path / "test") == alone


@pytest.mark.parametrize("options, said", [
    (["load_from_part=clasify"], r"^load_from_part: ToyModel has no part 'clasify'\. Did you mean 'classify'"),
    (["load_from_part=features"], r"does not hold the weights of this Sequential: under no prefix .*Nearest: none"),
    (["load_from_part=classify", "+model.width=5"], r"another shape \(Linear <- checkpoint\) \(1\): weight \(1, 5\) <- \(1, 4\)"),
    (["load_from_part=classify", "load_from=None"], "^load_from_part: .*`load_from`, which is not set"),
    (["load_from_part=classify", "default_hooks.checkpoint=None"], "^load_from_part: it is the CheckpointHook that reads this"),
])
def test_a_part_that_cannot_be_filled_is_an_error(toy, trunk_file, options, said):
    with pytest.raises(ConfigError, match=said):
        toy("run", f"load_from={trunk_file}", *options)


# -------------------------------------------------------------------------------------------------------------------- seeds

def test_every_iteration_draws_other_numbers_and_the_seed_chooses_them(toy, toy_parts):
    frozen = ["optim_wrapper.optimizer.lr=0.0", "train_dataloader.dataset.length=2", "+train_dataloader.dataset.augment=False"]
    toy("a", *frozen, "train_cfg.max_epochs=4")
    losses = list(toy_parts.LOSSES)
    assert len(set(losses)) == 4                             # dropout and noise differ, all else is equal
    toy("b", *frozen, "train_cfg.max_epochs=4")
    assert losses == toy_parts.LOSSES
    toy("c", *frozen, "train_cfg.max_epochs=4", "randomness.seed=1")
    assert losses != toy_parts.LOSSES


# ----------------------------------------------------------------------------------------------------------------- stopping

def test_stopping_gives_the_signals_back(toy):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)]
    with pytest.raises(Stopped) as stopped:
        toy("run", "custom_hooks.0={'type': 'ToyRecorder', 'signal_at': 8}")
    assert stopped.value.exit_code == 0
    assert stopped.value.checkpoint.name == "iter_9.pth"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)] == before
    toy("run")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)] == before


def test_the_death_of_a_worker_does_not_interrupt_the_last_iteration():
    """Torch's handler of SIGCHLD raises wherever training is; workers that nobody prepared die of the same signal."""
    hook, before = StopHook(), signal.getsignal(signal.SIGCHLD)
    hook.before_train(None)
    signal.signal(signal.SIGCHLD, lambda *_: pytest.fail("in the middle of an iteration"))
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGCHLD)
        assert hook.asked == signal.SIGTERM
    finally:
        hook.release()
        signal.signal(signal.SIGCHLD, before)


def test_the_second_ctrl_c_stops_at_once(capfd):
    hook = StopHook()
    hook.before_train(None)
    try:
        signal.raise_signal(signal.SIGINT)
        assert hook.asked == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        hook.release()
    assert "Ctrl-C again to stop at once" in capfd.readouterr().err
    assert Stopped(signal.SIGINT, "x.pth").exit_code == 130


def test_gradients_that_are_being_added_up_are_not_cut_apart(toy):
    with pytest.raises(Stopped) as stopped:
        toy("run", "+optim_wrapper.accumulative_counts=4", "custom_hooks.0={'type': 'ToyRecorder', 'signal_at': 4}")
    assert stopped.value.checkpoint.name == "iter_8.pth"


@pytest.mark.parametrize("called, command", [
    (["python", "tools/train.py", "a b.py", "--amp"], "python tools/train.py 'a b.py' --amp --resume"),
    (["python", "t.py", "--resume", "x.pth", "--work-dir", "w", "c.py"], "python t.py --work-dir w c.py --resume"),
    (["python", "t.py", "c.py", "--resume", "--amp"], "python t.py c.py --amp --resume"),
    (["python", "t.py", "c.py", "--resume=auto"], "python t.py c.py --resume"),
])
def test_the_command_to_go_on(monkeypatch, called, command):
    monkeypatch.setattr(sys, "orig_argv", called)
    assert resume_command() == command
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "orig_argv", [called[0], "-u", *called[1:]])
    assert resume_command() == command.replace("python ", "torchrun --nproc-per-node=2 ", 1)


# ------------------------------------------------------------------------------------------------------------------ telling

def test_replaced_images_are_counted_and_named_each_epoch(toy):
    runner = toy("run", "+train_dataloader.dataset.broken=(1, 3, 5, 7, 8, 9)")
    log = log_of(runner)
    assert log.count("6 images could not be read in this epoch and were replaced") == 2
    assert re.search(r"image \d is cut short\n  and 1 more", log)
    assert runner.message_hub.get_scalar("train/replaced_images").data[0].tolist() == [6, 6]
    assert "could not be read" not in log_of(toy("clean"))


def test_speed_of_training_and_of_the_loader_stand_side_by_side(toy, tmp_path, toy_parts, monkeypatch):
    import time
    load = toy_parts.ToyData.__getitem__

    def slow(self, draw):
        time.sleep(0.01)
        return load(self, draw)
    monkeypatch.setattr(toy_parts.ToyData, "__getitem__", slow)
    runner = toy("run", "default_hooks.logger.interval=2", "train_dataloader.num_workers=2", "train_cfg.max_epochs=1")
    with open(os.path.join(runner.log_dir, "vis_data", "scalars.json")) as file:
        lines = [json.loads(line) for line in file]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert 0 < lines[-1]["images_per_s"] < np.inf
    assert 60 < lines[-1]["loader_images_per_s"] < 205       # two workers, each at most 100 a second
    assert "loader_images_per_s" in log_of(runner)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_and_a_file_plain_lines(toy, validation, monkeypatch):
    screen, stdout = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setenv("TERM", "xterm")
    runner = toy("run", "default_hooks.logger.interval=1", more=validation)
    assert "ETA" in screen.getvalue()
    assert "12/12" in screen.getvalue()
    assert "\x1b[?25h" in screen.getvalue()                  # the cursor is there again
    assert "\x1b" not in log_of(runner)
    assert "Epoch(train) [1][6/6]" in screen.getvalue()      # above the bar, by way of rich
    assert stdout in [getattr(handler, "stream", None) for handler in runner.logger.handlers]
    monkeypatch.setattr(sys, "stdout", io.StringIO())        # as with > log.txt
    toy("run", "default_hooks.logger.interval=1")
    assert "Epoch(train) [1][6/6]" in sys.stdout.getvalue()
    assert "\x1b[?25" not in sys.stdout.getvalue()           # mmengine colours its lines, but no bar is among them
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    toy("run")
    assert sys.stderr.getvalue() == ""


def test_tensorboard_gets_the_scalars_where_it_is_installed(toy):
    pytest.importorskip("tensorboard")
    runner = toy("run", "train_cfg.max_epochs=1")
    assert any("tfevents" in name for name in os.listdir(os.path.join(runner.log_dir, "vis_data")))


def test_the_end_says_where_things_are_and_the_config_is_with_them(toy, tmp_path):
    from visionkit.engine import load_config

    runner = toy("run", "train_cfg.max_epochs=1")
    assert re.search(rf"done\n  checkpoints: {tmp_path}/run\n  logs: {runner.log_dir}", log_of(runner))
    assert "seed 0" in log_of(runner)
    assert load_config(tmp_path / "run" / "toy.py").train_cfg.max_epochs == 1


# -------------------------------------------------------------------------------------------------------------- divergence

@pytest.mark.parametrize("interval", [1, 1000], ids=["at once", "before the checkpoint"])
def test_a_run_that_diverges_ends_before_it_is_saved(toy, tmp_path, interval):
    more = f"""
optim_wrapper = dict(optimizer=dict(lr=1e30))
param_scheduler = []
default_hooks = dict(divergence=dict(interval={interval}))
"""
    with pytest.raises(Diverged, match="no longer finite .*loss.* --resume and a lower learning rate"):
        toy("run", more=more)
    assert not names(tmp_path / "run")
