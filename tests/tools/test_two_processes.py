"""What two processes do is what one does: Faster R-CNN on generated shapes, and packs of images of mixed sizes."""
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SMALL = """
_base_ = {quickstart!r}
model = dict(
    backbone=dict(norm="FrozenBN"),
    rpn=dict(sampler=dict(type="BalancedSampler", num=64, positive_fraction=0.5, shuffle=False), post_nms=(100, 50)),
    roi=dict(sampler=dict(num=32, shuffle=False), hidden_channels=(64,)),
)
train_dataloader = dict(batch_size={batch_size}, num_workers=0, persistent_workers=False, dataset=dict(num_images=24, size=(64, 64)))
val_dataloader = dict(batch_size={batch_size}, num_workers=0, dataset=dict(num_images=13, size=(64, 64)))
test_dataloader = dict(batch_size={batch_size}, num_workers=0, dataset=dict(num_images=13, size=(64, 64)))
optim_wrapper = dict(optimizer=dict(_delete_=True, type="SGD", lr=0.01, momentum=0.9))
default_hooks = dict(logger=dict(interval=1))
custom_hooks = []
train_cfg = dict(max_epochs=2, val_interval=2)
"""
PACKED = """
_base_ = {runtime!r}
model = dict(
    type="ImageClassifier",
    data_preprocessor=dict(type="NativeResolutionPreprocessor"),
    backbone=dict(type="MoonViT", channels=16, num_layers=2, num_heads=2, hidden_channels=32, position_grid=(4, 4)),
    num_classes=2,
)
train_dataloader = dict(
    batch_size={batch_size},
    num_workers=0,
    sampler=dict(type="DrawSampler"),
    batch_sampler=dict(type="PackedBatchSampler", max_tokens=40, length=dict(type="ImageTokens")),
    dataset=dict(type="ImageFolder", data_root={images!r}, pipeline=[
        dict(type="LoadImageFromFile"), dict(type="RandomNativeResize", multiple=28, low=28, high=84), dict(type="PackSample")]),
)
custom_hooks = [dict(type="PackingHook")]
default_hooks = dict(logger=dict(interval=1))
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1, momentum=0.9))
train_cfg = dict(type="EpochLoop", max_epochs=2)
"""


def run(*command: str | Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def logged(work_dir: Path) -> list[dict]:
    (file,) = work_dir.glob("*/vis_data/scalars.json")
    return [json.loads(line) for line in file.read_text().splitlines()]


def steps(work_dir: Path) -> list[dict]:
    return [line for line in logged(work_dir) if "loss" in line]


def scalars(work_dir: Path) -> tuple[list[float], dict[str, float]]:
    """The loss of every iteration, and the numbers of the COCO table."""
    lines = logged(work_dir)
    (table,) = [{key: value for key, value in line.items() if key.startswith("coco/")} for line in lines if "coco/bbox_mAP" in line]
    return [line["loss"] for line in steps(work_dir)], table


@pytest.mark.slow
def test_two_processes_train_and_score_as_one(tmp_path):
    train = ROOT / "tools" / "train.py"
    for name, batch_size in (("one", 8), ("two", 4)):
        (tmp_path / f"{name}.py").write_text(SMALL.format(quickstart=str(ROOT / "configs" / "quickstart.py"), batch_size=batch_size))
    run(train, tmp_path / "one.py", "--work-dir", tmp_path / "one")
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", train, tmp_path / "two.py", "--launcher", "pytorch",
        "--work-dir", tmp_path / "two")
    (one, one_table), (two, _) = scalars(tmp_path / "one"), scalars(tmp_path / "two")
    assert len(one) == 6
    assert one[0] > one[-1]
    assert two == pytest.approx(one, abs=1e-4)

    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", ROOT / "tools" / "test.py", tmp_path / "two.py",
        tmp_path / "one" / "epoch_2.pth", "--launcher", "pytorch", "--work-dir", tmp_path / "tested")
    (file,) = (tmp_path / "tested").glob("*/*.json")
    tested = {key: value for key, value in json.loads(file.read_text()).items() if key.startswith("coco/")}
    assert len(tested) >= 12
    assert tested == pytest.approx(one_table, abs=1e-9)


@pytest.mark.slow
def test_two_processes_train_packs_as_one(tmp_path):
    """Their packs hold different numbers of images, each of which counts the same."""
    noise = np.random.default_rng(0)
    for index in range(16):
        file = tmp_path / "images" / "ab"[index % 2] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(file), noise.integers(0, 128, (40, 40, 3), np.uint8) + np.uint8(index % 2 * 127))
    train = ROOT / "tools" / "train.py"
    for name, batch_size in (("one", 2), ("two", 1)):
        (tmp_path / f"{name}.py").write_text(PACKED.format(runtime=str(ROOT / "configs" / "_base_" / "runtime.py"),
                                                           images=str(tmp_path / "images"), batch_size=batch_size))
    run(train, tmp_path / "one.py", "--work-dir", tmp_path / "one")
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", train, tmp_path / "two.py", "--launcher", "pytorch",
        "--work-dir", tmp_path / "two")
    one, two = ([step["loss"] for step in steps(tmp_path / name)] for name in ("one", "two"))
    assert len(one) > 8
    assert two == pytest.approx(one, abs=1e-4)
    assert one[-1] < one[0]
