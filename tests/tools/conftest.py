import importlib.util
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from visionkit.models.base import Model
from visionkit.registry import MODELS
from visionkit.structures import InstanceData

TOOLS = Path(__file__).resolve().parents[2] / "tools"

CONFIG = """
pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSample")]
loader = dict(batch_size=2, num_workers=0, sampler=dict(type="DrawSampler", shuffle=False), dataset=dict(
    type="CocoDataset", data_root={root!r}, ann_file="truth.json", data_prefix=dict(img="images"),
    metainfo=dict(classes=("block", "newt")), pipeline=pipeline))
model = dict(type="WhiteBlock", num_classes=2)
train_dataloader = test_dataloader = val_dataloader = loader
train_cfg = dict(type="EpochLoop", max_epochs=1)
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1))
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
val_evaluator = test_evaluator = dict(type="CocoMetric")
custom_hooks = []
"""


@MODELS.register_module()
class WhiteBlock(Model):
    """Finds what is white in an image, as class 0."""

    def __init__(self, num_classes):
        super().__init__(dict(type="ImagePreprocessor", mean=(0, 0, 0), std=(1, 1, 1)))
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, images):
        return (images.tensor * self.weight.view(3, 1, 1)).min(1).values > 200

    def loss(self, images, samples):
        return {"loss": self.weight.sum()}

    def predict(self, images, samples):
        for white, sample in zip(self(images), samples, strict=True):
            rows, columns = white.any(1).nonzero().flatten(), white.any(0).nonzero().flatten()
            box = [[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]] if len(rows) else []
            sample.pred_instances = InstanceData(bboxes=torch.tensor(box, dtype=torch.float32).reshape(-1, 4),
                                                 scores=torch.ones(len(box)), labels=torch.zeros(len(box), dtype=torch.int64))
        return samples


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The current folder, with config.py, weights.pth and three images with a white block each; all of them are found."""
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for index in range(3):
        picture = np.full((48, 64, 3), 20, np.uint8)
        picture[8:24, 10 * index:10 * index + 16] = 255
        cv2.imwrite(str(tmp_path / "images" / f"{index}.png"), picture)
        images.append({"id": index + 1, "file_name": f"{index}.png", "width": 64, "height": 48})
        annotations.append({"id": index + 1, "image_id": index + 1, "category_id": 5, "bbox": [10 * index, 8, 16, 16], "area": 256,
                            "iscrowd": 0})
    categories = [{"id": 5, "name": "block"}, {"id": 9, "name": "newt"}]
    (tmp_path / "truth.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    (tmp_path / "config.py").write_text(CONFIG.format(root=str(tmp_path)))
    torch.save({"state_dict": WhiteBlock(2).state_dict()}, tmp_path / "weights.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tool(monkeypatch):
    """Runs tools/NAME.py with arguments in this process, which is faster than a new one; the exit code."""
    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        spec = importlib.util.spec_from_file_location(f"tools_{name}", TOOLS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main()
    return run
