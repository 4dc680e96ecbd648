"""The command line of training."""
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOYS = ROOT / "tests" / "engine"
TRAIN = ROOT / "tools" / "train.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TOYS)]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

CARD = f"""
_base_ = {str(ROOT / "configs" / "_base_" / "runtime.py")!r}
custom_imports = dict(imports=["toy_parts"])
model = dict(type="ToyModel")
train_dataloader = dict(batch_size=2, num_workers=2, worker_init_fn=dict(type="worker_init"),
                        sampler=dict(type="DrawSampler"), dataset=dict(type="ToyData", length=400))
train_cfg = dict(type="EpochLoop", max_epochs=100)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1))
"""


@pytest.fixture
def card(tmp_path):
    path = tmp_path / "card.py"
    path.write_text(CARD)
    return path


def call(*arguments, **options):
    return subprocess.run([sys.executable, TRAIN, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False,
                          env=ENVIRONMENT, **options)


def test_help_answers_in_under_a_second():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = call("--help")
        seconds.append(time.perf_counter() - start)
    assert done.returncode == 0
    assert "--resume" in done.stdout
    assert statistics.median(seconds) < 1


def test_a_wrong_option_is_one_clear_line_and_exit_code_2(card):
    done = call(card, "--cfg-options", "train_cfg.max_epoch=1")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: train_cfg.max_epoch: --cfg-options")
    assert "Did you mean 'max_epochs'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_sigterm_to_it_and_its_workers_saves_exits_0_and_prints_a_command_that_goes_on(card, tmp_path):
    folder = tmp_path / "a folder"
    card.write_text(card.read_text().replace("length=400", "length=400, seconds=0.02"))        # the run waits for its workers, mostly
    process = subprocess.Popen([sys.executable, TRAIN, card, "--work-dir", folder, "--seed", "3"], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, start_new_session=True)
    said = ""
    for line in process.stdout:
        said += line
        if "Epoch(train)" in line:
            time.sleep(0.05)                                 # into the next iterations, of which the line tells nothing
            os.killpg(process.pid, signal.SIGTERM)
            break
    said += process.stdout.read()
    assert process.wait(60) == 0, said
    assert re.search(rf"stopped by SIGTERM; saved {folder}/iter_\d+\.pth", said), said
    assert "seed 3" in said
    command = shlex.split(re.search("To go on: (.*)", said)[1])
    assert command[-1] == "--resume"
    done = subprocess.run([*command, "--cfg-options", "train_cfg.max_epochs=1", "train_dataloader.dataset.seconds=0"],
                          capture_output=True, text=True, timeout=120, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming from" in done.stdout
    assert (folder / "epoch_1.pth").exists() or "epoch_" in "".join(os.listdir(folder))


def test_the_terminal_shows_the_run_and_the_log_file_its_environment(card, tmp_path):
    done = call(card, "--work-dir", tmp_path / "run", "--cfg-options", "train_cfg.max_epochs=1", "train_dataloader.dataset.length=4",
                "train_dataloader.num_workers=0")
    assert done.returncode == 0, done.stderr
    assert "seed 0" in done.stdout
    assert "saved epoch_1.pth" in done.stdout
    assert "System environment" not in done.stdout
    (log,) = (tmp_path / "run").glob("*/*.log")
    assert "System environment" in log.read_text()
    assert "saved epoch_1.pth" in log.read_text()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_message_and_where_to_go_on(tmp_path, workers):
    from visionkit.datasets import ShapesDataset
    ShapesDataset(num_images=4, size=(64, 64)).export(tmp_path / "shapes")
    pictures = sorted((tmp_path / "shapes" / "images").iterdir())
    for picture in pictures[1:]:
        picture.write_bytes(picture.read_bytes()[:300])
    card = tmp_path / "card.py"
    loader = f"""
train_dataloader = dict(batch_size=2, num_workers={workers}, persistent_workers=False, dataset=dict(_delete_=True, type="CocoDataset",
    data_root={str(tmp_path / "shapes")!r}, ann_file="annotations.json", data_prefix=dict(img="images"),
    pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSample")]), sampler=dict(shuffle=False))
"""
    card.write_text(f"_base_ = {str(ROOT / 'configs' / 'quickstart.py')!r}\n{loader}")
    done = call(card, "--work-dir", tmp_path / "run")
    assert done.returncode == 1, done.stderr
    assert "error: cannot read the image" in done.stderr
    assert "tools/check.py lists all such files" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_first_image_is_told_before_training_with_the_same_advice(project, tool, capfd):
    for picture in (project / "images").iterdir():
        picture.write_bytes(picture.read_bytes()[:60])
    assert tool("train", "config.py", "--work-dir", "work") == 2
    told = capfd.readouterr().err
    assert "error: train_dataloader.dataset.pipeline[0]: cannot read the image" in told
    assert "tools/check.py lists all such files" in told
