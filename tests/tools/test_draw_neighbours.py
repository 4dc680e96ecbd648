import re

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from visionkit.registry import MODELS

CARD = """
model = dict(type="ImageClassifier", num_classes=2, backbone=dict(type="ResNet", depth=18, out_stages=(2,)))
test_dataloader = dict(batch_size=2, sampler=dict(type="DrawSampler", shuffle=False), dataset=dict(
    type="ImageFolder", data_root={root!r}, pipeline=[dict(type="LoadImageFromFile"), dict(type="PackSample")]))
test_cfg = dict(type="ProbeLoop", points=dict(first=dict(feature="map0", pool=2), last=dict(feature="map0", pool=1)))
"""


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Six images of two classes, and a checkpoint."""
    rng = np.random.default_rng(0)
    for name in ("bright", "dark"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(3):
            image = rng.integers(0, 60, (32, 32, 3)) + 190 * (name == "bright")
            cv2.imwrite(str(tmp_path / "photos" / name / f"{index}.png"), image)
    (tmp_path / "card.py").write_text(CARD.format(root=str(tmp_path / "photos")))
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": MODELS.build(Config.fromfile("card.py").model).state_dict()}, "weights.pth")
    return tmp_path


@pytest.mark.parametrize("arguments", [["weights.pth"], ["--random"], ["weights.pth", "--point", "first", "--images", "4"]])
def test_a_row_a_query_comes_out(folders, tool, capsys, arguments):
    assert tool("draw_neighbours", "card.py", *arguments, "--out", "found/near.png", "--queries", "3", "--neighbours", "2", "--device",
                "cpu") == 0
    assert "found/near.png" in capsys.readouterr().out
    height, width = cv2.imread("found/near.png").shape[:2]
    assert width == 10 + 3 * (128 + 10)
    assert 3 * 128 < height < 4 * 170


def test_bright_images_are_near_bright_ones(folders, tool, monkeypatch):
    drawn = []
    monkeypatch.setattr("visionkit.engine.neighbours.draw_neighbours",
                        lambda images, labels, classes: drawn.append((labels, classes)) or np.zeros((4, 4, 3), np.uint8))
    assert tool("draw_neighbours", "card.py", "--random", "--queries", "6", "--neighbours", "2", "--device", "cpu") == 0
    (labels, classes), = drawn
    assert classes == ("bright", "dark")
    assert sorted(labels) == [[0, 0, 0]] * 3 + [[1, 1, 1]] * 3


@pytest.mark.parametrize("arguments, said", [
    ([], "give a checkpoint, or --random"), (["nowhere.pth"], "no checkpoint 'nowhere.pth'"),
    (["--random", "--point", "lst"], "no point 'lst'. Did you mean 'last'"),
    (["--random", "--neighbours", "6"], "6 neighbours .* among 6 images"),
    (["--random", "--queries", "0"], "at least one query")])
def test_a_users_error_is_one_message_and_exit_code_2(folders, tool, capsys, arguments, said):
    assert tool("draw_neighbours", "card.py", *arguments, "--device", "cpu") == 2
    assert re.search(said, capsys.readouterr().err)
