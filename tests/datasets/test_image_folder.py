import logging
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from visionkit.datasets import ImageFolder
from visionkit.registry import DATASETS, ConfigError
from visionkit.transforms import BrokenImageError

PIPELINE = [dict(type="LoadImageFromFile"), dict(type="PackSample")]
FILES = ("dog/b.png", "dog/a.PNG", "cat/old/2001/z.png", "cat/k.png", "ant/1.png")


@pytest.fixture
def folder(tmp_path):
    """Five images in three classes, the brightness of each its place in FILES, and files that are none."""
    for brightness, name in enumerate(FILES):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), np.full((6, 8, 3), 40 * brightness, np.uint8))
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "ant" / "._1.png").write_bytes(b"what a Mac leaves behind")
    return tmp_path


def records(dataset):
    return [dataset.get_data_info(index) for index in range(len(dataset))]


def test_folders_are_classes_by_name_and_images_lie_at_any_depth_below(folder):
    dataset = ImageFolder(data_root=str(folder), pipeline=PIPELINE)
    assert dataset.metainfo["classes"] == ("ant", "cat", "dog")
    assert [(one["img_id"], one["gt_label"]) for one in records(dataset)] == [
        ("ant/1.png", 0), ("cat/k.png", 1), ("cat/old/2001/z.png", 1), ("dog/a.PNG", 2), ("dog/b.png", 2)]
    for item, one in zip(dataset, records(dataset), strict=True):
        assert item["data_samples"].gt_label.item() == one["gt_label"]
        assert item["inputs"].unique().tolist() == [40 * FILES.index(one["img_id"])]
    assert [dataset.get_cat_ids(index) for index in range(5)] == [[0], [1], [1], [2], [2]]


def test_the_order_is_not_the_file_systems(folder, monkeypatch):
    expected = [one["img_id"] for one in records(ImageFolder(data_root=str(folder)))]
    walk, scan = os.walk, os.scandir
    monkeypatch.setattr("os.scandir", lambda path: list(scan(path))[::-1] if Path(path) == folder else scan(path))
    monkeypatch.setattr("os.walk", lambda *a, **k: ((parent, folders, files[::-1]) for parent, folders, files in walk(*a, **k)))
    assert [one["img_id"] for one in records(ImageFolder(data_root=str(folder)))] == expected


def test_classes_choose_folders_and_the_order_of_their_labels(folder):
    dataset = ImageFolder(data_root=str(folder.parent), data_prefix=dict(img=folder.name), metainfo=dict(classes=["dog", "ant"]))
    assert [(one["img_id"], one["gt_label"]) for one in records(dataset)] == [("ant/1.png", 1), ("dog/a.PNG", 0), ("dog/b.png", 0)]


def test_a_folder_of_images_alone_has_no_labels(folder):
    dataset = ImageFolder(data_root=str(folder / "dog"), pipeline=PIPELINE)
    assert [one["img_id"] for one in records(dataset)] == ["a.PNG", "b.png"]
    assert "gt_label" not in dataset[0]["data_samples"]
    assert "classes" not in dataset.metainfo
    assert dataset.get_cat_ids(0) == []


def test_images_beside_the_classes_are_told_of(folder, monkeypatch):
    said = []
    monkeypatch.setattr(ImageFolder, "_log", lambda self, text, level=logging.INFO: said.append(text))
    (folder / "stray.jpg").write_bytes(b"")
    assert len(ImageFolder(data_root=str(folder))) == 5
    assert said == [f"1 images in {folder} lie in no class's folder and are left out, such as stray.jpg"]


def test_the_root_is_moved_by_the_environment(folder, monkeypatch):
    monkeypatch.setenv("VISIONKIT_DATA", str(folder.parent))
    dataset = DATASETS.build(dict(type="ImageFolder", data_root=f"data/{folder.name}/"))
    assert os.path.isfile(dataset.get_data_info(0)["img_path"])


@pytest.mark.parametrize("change, said", [
    (dict(data_root="nowhere"), "data_root: no folder of images at .*nowhere"),
    (dict(data_root="{}/ant/1.png"), "data_root: .*1.png is a file; a folder"),
    (dict(data_root="{}/.cache"), "data_root: no image and no folder in .*images are .jpg"),
    (dict(metainfo=dict(classes=("dgo",))), r"metainfo.classes: .* has no folder 'dgo'. Did you mean 'dog'\? Its folders: ant, cat, dog"),
    (dict(metainfo=dict(classes=("dog", "dog"))), "metainfo.classes: a class stands twice"),
    (dict(data_prefix=dict(image="x")), "data_prefix.image: data_prefix has no 'image'"),
])
def test_what_cannot_be_used_is_an_error_with_its_place(folder, change, said):
    arguments = {"data_root": str(folder), **change}
    arguments["data_root"] = arguments["data_root"].format(folder)
    with pytest.raises(ConfigError, match=said):
        ImageFolder(**arguments)


def test_a_class_without_an_image_is_an_error(folder):
    (folder / "ant" / "1.png").unlink()
    with pytest.raises(ConfigError, match="metainfo.classes: the class 'ant' has no image in .*ant .*name the classes that you want"):
        ImageFolder(data_root=str(folder))
    assert len(ImageFolder(data_root=str(folder), metainfo=dict(classes=("cat", "dog")))) == 4


def test_a_broken_image_is_named(folder):
    (folder / "ant" / "1.png").write_bytes(b"")
    with pytest.raises(BrokenImageError, match="1.png .*the file is empty"):
        ImageFolder(data_root=str(folder), pipeline=PIPELINE)[0]
