"""Checkpoints: whole or not at all, verified, and never executed."""
import os
import pickle
import random
import shutil
import signal
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader, save_checkpoint
from torch import nn

from visionkit.engine import load_config, train
from visionkit.engine.checkpoint import (
    RESNETS,
    CheckpointError,
    check_fit,
    find_resumable,
    load_weights,
    read_checkpoint,
    saved_ns,
    sweep_partial_files,
    to_history,
    to_plain,
    write_atomically,
    write_average,
)
from visionkit.registry import ConfigError

ROWS = 200


def run_state(number: int) -> dict:
    return {"meta": {"epoch": number, "iter": number}, "message_hub": {}, "optimizer": {},
            "state_dict": {"weight": torch.full((ROWS, ROWS), float(number))}}


def save(folder, number: int):
    path = folder / f"epoch_{number}.pth"
    save_checkpoint(run_state(number), str(path))
    return path


def test_a_saved_checkpoint_is_a_plain_torch_file_with_a_seal(tmp_path):
    before = time.time_ns()
    path = save(tmp_path, 3)
    assert torch.load(path, weights_only=True)["meta"]["epoch"] == 3      # anybody's torch.load reads it
    assert torch.load(path, weights_only=True, mmap=True)["state_dict"]["weight"][0, 0] == 3
    assert b"sha256:" in zipfile.ZipFile(path).comment
    assert before <= saved_ns(path) <= time.time_ns()
    assert read_checkpoint(path)["meta"] == {"epoch": 3, "iter": 3}


def test_a_flipped_bit_is_refused_wherever_it_is(tmp_path):
    path = save(tmp_path, 1)
    data = path.read_bytes()
    generator = random.Random(0)
    weights = data.index(torch.full((4,), 1.0).numpy().tobytes())         # where plain torch.load would notice nothing
    seal = range(len(data) - 113, len(data))                 # with the two bytes of its length
    for place in [0, weights, *seal, *(generator.randrange(len(data)) for _ in range(20))]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            read_checkpoint(path)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1, -10, -64, -100, -110, -111, -112, -120])
def test_a_truncated_file_is_refused_and_passed_over(tmp_path, keep):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    size = newer.stat().st_size
    os.truncate(newer, int(keep * size) if isinstance(keep, float) else keep if keep >= 0 else size + keep)
    with pytest.raises(CheckpointError):
        read_checkpoint(newer)
    found = find_resumable(tmp_path)
    assert found.path == older
    assert list(found.passed_over) == ["epoch_2.pth"]
    assert "passed over epoch_2.pth: " in found.describe()


def test_resuming_takes_the_newest_by_when_it_was_saved(tmp_path):
    save(tmp_path, 10)
    newest = save(tmp_path, 9)                               # a new run in an old folder
    for age, path in enumerate(sorted(tmp_path.iterdir())):
        os.utime(path, (age, age))                           # as after copying
    write_atomically(tmp_path / "last_checkpoint", b"epoch_7.pth")        # pruned, or never written
    assert find_resumable(tmp_path).path == newest
    save_checkpoint({"state_dict": {}, "meta": {}}, str(tmp_path / "best.pth"))
    found = find_resumable(tmp_path)
    assert found.path == newest
    assert "weights only" in found.passed_over["best.pth"]
    assert find_resumable(tmp_path / "empty").path is None


class Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_malicious_checkpoint_runs_nothing(tmp_path, legacy):
    ran = tmp_path / "ran"
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": Evil(f"touch {ran}")}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="could run what is in it"):
        CheckpointLoader.load_checkpoint(str(path))
    path.write_bytes(pickle.dumps(Evil(f"touch {ran}")))
    with pytest.raises(CheckpointError):
        CheckpointLoader.load_checkpoint(str(path))
    assert not ran.exists()
    pickle.loads(path.read_bytes())                          # the trap is a working one
    assert ran.exists()


def test_text_in_meta_config_is_not_run(toy, toy_file, tmp_path):
    toy("run")
    ran = tmp_path / "ran"
    path = tmp_path / "run" / "epoch_2.pth"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["meta"]["config"] = f"import os\nos.mkdir({str(ran)!r})\n"
    torch.save(checkpoint, path)
    assert "config" not in read_checkpoint(path)["meta"]
    train(load_config(toy_file(), ["train_cfg.max_epochs=3"]), work_dir=tmp_path / "run", resume=str(path))
    assert not ran.exists()
    assert (tmp_path / "run" / "epoch_3.pth").exists()


def test_urls_are_loaded_as_safely_as_files(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, file: torch.save(Evil(f"touch {ran}"), file))
    for url in ("https://example.org/evil.pth", "http://example.org/evil.pth", "s3://evil", "open-mmlab://evil", "pavi://evil"):
        with pytest.raises(CheckpointError):
            CheckpointLoader.load_checkpoint(url)
    assert not ran.exists()
    assert (tmp_path / "hub" / "checkpoints" / "evil.pth").exists()


def test_torchvisions_resnets_are_found_without_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, file: (asked.append(url), torch.save({"a": torch.ones(1)}, file)))
    monkeypatch.setitem(sys.modules, "torchvision", None)                   # not installed
    CheckpointLoader.load_checkpoint("torchvision://resnet50")
    assert asked == [RESNETS["resnet50"]]
    with pytest.raises(CheckpointError, match="pip install torchvision. Without it there are resnet18, resnet34, resnet50, resnet101"):
        CheckpointLoader.load_checkpoint("torchvision://vgg16")


def test_torchvision_agrees_where_its_resnets_are_and_a_wrong_name_is_told():
    models = pytest.importorskip("torchvision", reason="the oracle").models
    for name, url in RESNETS.items():
        assert models.get_model_weights(name)["IMAGENET1K_V1"].url == url
    with pytest.raises(CheckpointError, match="no weights named 'resnet5'. Did you mean 'resnet50'"):
        CheckpointLoader.load_checkpoint("torchvision://resnet5")


def test_the_average_of_checkpoints_is_the_mean_of_their_tensors(tmp_path):
    """Spec 07, item 8: equal."""
    paths = []
    for number in (1, 2, 6):
        paths.append(tmp_path / f"{number}.pth")
        torch.save({"state_dict": {"weight": torch.full((2, 3), float(number)), "seen": torch.tensor(number)}}, paths[-1])
    assert write_average(tmp_path / "mean.safetensors", paths) == 2
    mean = read_checkpoint(tmp_path / "mean.safetensors")["state_dict"]
    assert torch.equal(mean["weight"], torch.full((2, 3), 3.0))
    assert mean["seen"].item() == 6                                         # a count has no mean
    torch.save({"state_dict": {"weight": torch.zeros(3), "seen": torch.tensor(1)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other.pth and .*1.pth are not of one model: they differ in weight"):
        write_average(tmp_path / "mean.safetensors", [*paths, tmp_path / "other.pth"])
    with pytest.raises(CheckpointError, match="two checkpoints or more"):
        write_average(tmp_path / "mean.safetensors", paths[:1])


def test_a_killed_write_leaves_the_old_file_and_a_leftover_to_sweep(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    old = path.read_bytes()

    def killed(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 1)
    assert path.read_bytes() == old
    assert len(sweep_partial_files(tmp_path)) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["epoch_1.pth"]


def test_killed_at_random_moments_of_saving_20_times_nothing_is_lost(toy, tmp_path):
    """A real run's hook saves, points and prunes in a forked child, as fast as it can; it is killed with SIGKILL."""
    runner = toy("run", "default_hooks.checkpoint.max_keep_ckpts=2")
    saver = next(hook for hook in runner.hooks if type(hook).__name__ == "CheckpointHook")
    weight = runner.model.classify.weight
    generator = random.Random(0)
    number = killed_in_mid_write = 0
    for _ in range(20):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                saver.before_train(runner)                   # sweeps, as a resumed run does
                while True:
                    number += 1
                    weight.data.fill_(number)
                    saver.save(runner, epoch=0, iteration=number)
                    os.write(writing, b"%d\n" % number)
            finally:
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading, "rb") as reports:
            complete = [reports.readline()]                  # at least one
            time.sleep(generator.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            complete += reports.readlines()
        number = int(complete[-1])
        killed_in_mid_write += any(file.name.endswith(".partial") for file in (tmp_path / "run").iterdir())
        found = find_resumable(tmp_path / "run")
        checkpoint = read_checkpoint(found.path)
        assert not found.passed_over                         # a file that has its name is whole
        assert checkpoint["meta"]["iter"] in (number, number + 1)          # it may have died before it could report
        assert bool((checkpoint["state_dict"]["classify.weight"] == checkpoint["meta"]["iter"]).all())
        pointer = tmp_path / "run" / (tmp_path / "run" / "last_checkpoint").read_text()
        assert read_checkpoint(pointer)["meta"]["iter"] >= number - 1
        number = checkpoint["meta"]["iter"]
        runner.message_hub.update_info("kept_checkpoints", checkpoint["message_hub"]["runtime_info"]["kept_checkpoints"])
        assert len(list((tmp_path / "run").glob("iter_*.pth"))) <= 3       # two, and one that was to be pruned
    assert killed_in_mid_write                               # the moments were the interesting ones


def test_a_moved_work_folder_resumes(toy, tmp_path):
    toy("run")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert (tmp_path / "moved" / "last_checkpoint").read_text() == "epoch_2.pth"
    runner = toy("moved", "train_cfg.max_epochs=3", resume=True)
    assert runner.iter == 18
    assert not (tmp_path / "run").exists()


def test_resuming_says_which_checkpoint_and_which_was_passed_over(toy, tmp_path):
    toy("run")
    os.truncate(tmp_path / "run" / "epoch_2.pth", 1000)
    runner = toy("run", resume=True)
    log = next((tmp_path / "run").glob(f"{runner.timestamp}/*.log")).read_text()
    assert "resuming from" in log
    assert "epoch_1.pth" in log
    assert "passed over epoch_2.pth" in log
    for path in (tmp_path / "run").glob("*.pth"):
        os.truncate(path, 1000)
    with pytest.raises(CheckpointError, match="no checkpoint to resume from(.|\n)*leave out --resume"):
        toy("run", resume=True)


def test_plain_values_come_back_as_they_were(tmp_path):
    value = {"a": np.float32(1.5), "b": [np.int64(2), (1, "x")], "f": len, "h": {"loss": HistoryBuffer([1.0, 2.0], [1, 3])}}
    torch.save(to_plain(value), tmp_path / "x.pth")
    loaded = torch.load(tmp_path / "x.pth", weights_only=True)
    assert (loaded["a"], loaded["b"], set(loaded)) == (1.5, [2, (1, "x")], {"a", "b", "h"})
    history = to_history(loaded["h"])["loss"]
    history.update(3.0)
    assert [part.tolist() for part in history.data] == [[1.0, 2.0, 3.0], [1, 3, 1]]


# ----------------------------------------------------------------------------------------------------------------- weights

@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10), nn.Linear(10, 2))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_are_loaded_from_both_formats(net, tmp_path, suffix):
    from safetensors.torch import save_file

    path = tmp_path / f"weights.{suffix}"
    state = {key: value + 1 for key, value in net.state_dict().items()}
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    load_weights(net, path)
    assert all(torch.equal(net.state_dict()[key], state[key]) for key in state)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_what_a_checkpoint_wrapper_puts_into_names_is_taken_out(net, tmp_path, suffix):
    """torch itself leaves it in the names of `named_buffers`, and other trainers save what they see."""
    from safetensors.torch import save_file
    path = tmp_path / f"wrapped.{suffix}"
    names = {key: key.replace("1.", "1._checkpoint_wrapped_module.") for key in net.state_dict()}
    assert any(key != name for key, name in names.items())
    wrapped = {names[key]: torch.full_like(value, 3) for key, value in net.state_dict().items()}
    save_file(wrapped, path) if suffix == "safetensors" else torch.save({"state_dict": wrapped}, path)
    load_weights(net, path)
    assert all((value == 3).all() for value in net.state_dict().values())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod."])
def test_weights_of_a_compiled_model_are_those_of_the_model(net, tmp_path, prefix):
    torch.save({f"{prefix}{key}": torch.full_like(value, 3) for key, value in net.state_dict().items()}, tmp_path / "compiled.pth")
    load_weights(net, tmp_path / "compiled.pth")
    assert all((value == 3).all() for value in net.state_dict().values())
    torch.save({"state_dict": net.state_dict()}, tmp_path / "plain.pth")
    assert read_checkpoint(tmp_path / "plain.pth")["state_dict"]._metadata == net.state_dict()._metadata     # where nothing is to be done
    outer = torch.nn.ModuleDict({"part": torch.compile(net), "head": torch.nn.Linear(1, 1)})        # is saved and read as it is
    torch.save({key: torch.full_like(value, 4) for key, value in outer.state_dict().items()}, tmp_path / "part.pth")
    load_weights(outer, tmp_path / "part.pth")
    assert all((value == 4).all() for value in net.state_dict().values())


def test_weights_that_fill_under_90_percent_are_an_error_that_lists_why(net, tmp_path):
    state = net.state_dict()
    state["head.weight"] = state.pop("2.weight")
    state["1.weight"] = torch.ones(3)
    del state["0.bias"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"(?s)fills 76\.\d% .*missing in the file \(2\): 0\.bias, 2\.weight.*"
                                              r"another shape.*1\.weight \(10,\) <- \(3,\).*in the file only \(1\): head\.weight.*"
                                              r"load_from_strict=False"):
        load_weights(net, tmp_path / "w.pth")
    net[0].weight.data.zero_()
    load_weights(net, tmp_path / "w.pth", strict=False)
    assert torch.equal(net[0].weight, state["0.weight"])


def test_a_few_missing_values_are_no_error_but_every_one_is_when_resuming(net):
    state = net.state_dict()
    del state["2.bias"]
    check_fit(net, state, "w.pth")
    with pytest.raises(CheckpointError, match="A run is resumed with the model it was started with"):
        check_fit(net, state, "w.pth", share=1.0)


def test_load_from_in_a_config_is_checked_unless_it_says_otherwise(toy, tmp_path):
    torch.save({"classify.bias": torch.zeros(1)}, tmp_path / "w.pth")
    load_from = f"load_from={tmp_path / 'w.pth'}"
    with pytest.raises(CheckpointError, match="at least 90% are wanted"):
        toy("run", load_from)
    toy("run", load_from, "load_from_strict=False")
    with pytest.raises(ConfigError, match=r"w\.pht"):
        toy("run", f"load_from={tmp_path / 'w.pht'}")
    with pytest.raises(CheckpointError, match=r"no checkpoint '.*w\.pht'\. Did you mean 'w\.pth'"):
        read_checkpoint(tmp_path / "w.pht")


def test_resuming_another_model_is_an_error(toy):
    toy("run")
    with pytest.raises(CheckpointError, match="A run is resumed with the model it was started with"):
        toy("run", "+model.width=5", resume=True)


def test_a_truncated_safetensors_file_is_named(tmp_path):
    from safetensors.torch import save_file
    save_file({"weight": torch.zeros(100)}, tmp_path / "whole.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "whole.safetensors").read_bytes()[:40])
    with pytest.raises(CheckpointError, match="cut.safetensors cannot be read, it may be cut short"):
        read_checkpoint(cut)
