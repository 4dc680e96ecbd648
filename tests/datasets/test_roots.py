import pytest

from visionkit.datasets import CocoDataset, resolve
from visionkit.datasets.roots import require
from visionkit.registry import ConfigError


def test_one_variable_moves_everything_below_data(monkeypatch):
    monkeypatch.setenv("VISIONKIT_DATA", "/big/disk")
    assert resolve("data/bccd/train.json") == "/big/disk/bccd/train.json"
    assert resolve("./data/bccd/") == "/big/disk/bccd"
    assert resolve("database/train.json") == "database/train.json"
    assert resolve("/data/bccd/train.json") == "/data/bccd/train.json"
    monkeypatch.delenv("VISIONKIT_DATA")
    assert resolve("data/bccd/train.json") == "data/bccd/train.json"


def test_a_dataset_moves_its_annotations_and_its_images(write_coco, monkeypatch, tmp_path):
    folder = write_coco()
    monkeypatch.setenv("VISIONKIT_DATA", str(folder.parent))
    dataset = CocoDataset(data_root=f"data/{folder.name}/", ann_file="train.json", data_prefix=dict(img="images/"))
    assert dataset.image(0).shape == (48, 64, 3)
    absolute = CocoDataset(data_root="data/elsewhere", ann_file=str(folder / "train.json"), data_prefix=dict(img=str(folder / "images")))
    assert absolute.image(0).shape == (48, 64, 3)


def test_a_missing_file_says_where_it_looked_what_moves_it_and_where_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("VISIONKIT_DATA", str(tmp_path))
    (tmp_path / "bccd").mkdir()
    (tmp_path / "bccd" / "val.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        CocoDataset(data_root="data/bccd/", ann_file="train.json")
    message = str(caught.value)
    for part in ("ann_file: no annotation file at", f"{tmp_path}/bccd/train.json", "data/bccd/train.json", f"VISIONKIT_DATA={tmp_path}",
                 "has: val.json", "https://github.com/Shenggan/BCCD_Dataset"):
        assert part in message


def test_without_the_variable_the_error_tells_of_it(monkeypatch, tmp_path):
    monkeypatch.delenv("VISIONKIT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="set VISIONKIT_DATA to the folder that stands for data/.*cocodataset.org"):
        require("data/coco2017/x.json", "annotation file", asked="data/coco2017/x.json", key="ann_file")


def test_a_place_outside_data_gets_no_advice_that_would_not_help(tmp_path):
    with pytest.raises(ConfigError) as caught:
        CocoDataset(data_root=str(tmp_path), ann_file="train.json")
    assert "VISIONKIT_DATA" not in str(caught.value)
    assert "Where to get" not in str(caught.value)
