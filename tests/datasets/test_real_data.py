"""Checks on real data, where it lies on this machine."""
import os
from pathlib import Path

import pytest

from visionkit.datasets import CocoDataset, Draw
from visionkit.datasets.report import report

ROOT = next((path for path in (os.environ.get("VISIONKIT_DATA"), "../shared/data") if path and Path(path, "bccd").is_dir()), None)
pytestmark = pytest.mark.skipif(ROOT is None, reason="needs data/bccd and data/nuclei; VISIONKIT_DATA names the folder that holds them")


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.setenv("VISIONKIT_DATA", str(Path(ROOT).resolve()))


def read(name, split, **arguments):
    return CocoDataset(data_root=f"data/{name}/", ann_file=f"{split}.json", data_prefix=dict(img="images/"), **arguments)


def test_blood_cells_are_sound():
    found = report(read("bccd", "val"))
    assert (found.images, found.image_sizes) == (87, {"640x480": 87})
    assert found.findings == {}
    assert set(found.boxes_per_class) == {"RBC", "WBC", "Platelets"}


@pytest.mark.skipif(ROOT is None or not Path(ROOT, "nuclei").is_dir(), reason="needs data/nuclei")
def test_masks_of_nuclei_fill_their_boxes_through_resize_and_flip():
    dataset = read("nuclei", "val", pipeline=[
        dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_mask=True), dict(type="Resize", scale=(512, 512)),
        dict(type="RandomFlip", prob=1.0), dict(type="PackSample")])
    sample = dataset[Draw(0, 0)]["data_samples"]
    assert len(sample.gt_instances) > 3
    for box, mask in zip(sample.gt_instances.bboxes, sample.gt_instances.masks, strict=True):
        rows, columns = mask.nonzero(as_tuple=True)
        around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert box.tolist() == pytest.approx([float(value) for value in around], abs=2.5)
