import builtins
import os
import sys
from collections import Counter

import numpy as np
import pytest
from mmengine.dataset import pseudo_collate
from torch.utils.data import DataLoader

from visionkit.datasets import DrawSampler, ShapesDataset
from visionkit.registry import ConfigError
from visionkit.transforms import Albumentations, build_pipeline

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
package = pytest.importorskip("albumentations")


def scene():
    boxes = np.array([[4, 6, 20, 18], [30, 20, 56, 36], [0, 0, 8, 4]], np.float32)
    masks = np.zeros((3, 40, 60), np.uint8)
    for number, (x1, y1, x2, y2) in enumerate(boxes.astype(int)):
        masks[number, y1:y2, x1:x2] = 1
    return {"img": (masks * np.array([80, 160, 240], np.uint8).reshape(3, 1, 1)).sum(0, dtype=np.uint8)[..., None].repeat(3, -1),
            "gt_bboxes": boxes, "gt_masks": masks, "gt_bboxes_labels": np.arange(3), "gt_ignore_flags": np.array([False, False, True])}


@pytest.mark.parametrize("transforms", [
    [dict(type="HorizontalFlip", p=1)], [dict(type="Crop", x_min=10, y_min=0, x_max=58, y_max=30)],
    [dict(type="Transpose", p=1)], [dict(type="OneOf", transforms=[dict(type="VerticalFlip", p=1), dict(type="RandomRotate90", p=1)], p=1)],
    [dict(type="RandomCrop", height=25, width=35)], [dict(type="GaussNoise", p=1)]], ids=lambda t: t[0]["type"])
def test_boxes_labels_flags_and_masks_stay_in_step(transforms):
    for seed in range(5):
        np.random.seed(seed)
        results = Albumentations(transforms)(scene())
        assert len(results["gt_bboxes"]) == len(results["gt_bboxes_labels"]) == len(results["gt_ignore_flags"]) == len(results["gt_masks"])
        assert results["gt_ignore_flags"].tolist() == (results["gt_bboxes_labels"] == 2).tolist()
        assert results["gt_masks"].shape[1:] == results["img"].shape[:2] == results["img_shape"]
        for box, mask, label in zip(results["gt_bboxes"], results["gt_masks"], results["gt_bboxes_labels"], strict=True):
            rows, columns = np.nonzero(mask)
            assert box == pytest.approx([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], abs=0.01)
            if transforms[0]["type"] != "GaussNoise":
                assert (results["img"][mask.astype(bool)] == 80 * (label + 1)).all()
        assert results["gt_bboxes"].dtype == np.float32
        assert results["gt_bboxes_labels"].dtype == np.int64


def test_boxes_outside_or_without_extent_are_cut_or_left_out_instead_of_raising():
    results = scene() | {"gt_bboxes": np.array([[-5, -5, 10, 10], [70, 4, 80, 8], [5, 5, 5, 9]], np.float32)}
    after = Albumentations([dict(type="HorizontalFlip", p=1)])(results)
    assert after["gt_bboxes"].tolist() == [[50, 0, 60, 10]]
    assert after["gt_bboxes_labels"].tolist() == [0]
    assert after["gt_masks"].shape == (1, 40, 60)


def test_an_image_without_objects_passes():
    empty = {"img": np.zeros((40, 60, 3), np.uint8), "gt_bboxes": np.zeros((0, 4), np.float32), "gt_bboxes_labels": np.zeros(0, np.int64),
             "gt_ignore_flags": np.zeros(0, bool), "gt_masks": np.zeros((0, 40, 60), np.uint8)}
    after = Albumentations([dict(type="Crop", x_max=30, y_max=20)])(empty)
    assert [after[key].shape for key in ("gt_bboxes", "gt_bboxes_labels", "gt_ignore_flags", "gt_masks")] == [
        (0, 4), (0,), (0,), (0, 20, 30)]
    assert "gt_bboxes" not in Albumentations([dict(type="Crop", x_max=30, y_max=20)])({"img": empty["img"]})


def test_min_visible_leaves_out_what_is_hardly_left():
    crop = [dict(type="Crop", x_min=16, x_max=60, y_max=40)]                 # a quarter of the first box is left, none of the third
    assert Albumentations(crop)(scene())["gt_bboxes_labels"].tolist() == [0, 1]
    assert Albumentations(crop, min_visible=0.5)(scene())["gt_bboxes_labels"].tolist() == [1]


def test_two_transforms_decide_independently():
    flips = Albumentations([dict(type="HorizontalFlip", p=0.5), dict(type="VerticalFlip", p=0.5)])
    corners = np.zeros((2, 2, 3), np.uint8)
    corners[..., 0] = [[1, 2], [3, 4]]
    np.random.seed(0)
    counts = Counter(int(flips({"img": corners})["img"][0, 0, 0]) for _ in range(400))
    assert sorted(counts) == [1, 2, 3, 4]
    assert min(counts.values()) > 60


def test_augmentation_is_reproducible_and_differs_between_workers_images_and_epochs():
    dataset = ShapesDataset(8, size=(48, 48), pipeline=[
        dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="FillOne"),
        dict(type="Albumentations", transforms=[dict(type="GaussNoise", p=1.0)]), dict(type="PackSample")])

    def epoch(number, num_workers):
        sampler = DrawSampler(dataset, shuffle=False, seed=1)
        sampler.set_epoch(number)
        loader = DataLoader(dataset, batch_size=2, sampler=sampler, num_workers=num_workers, collate_fn=pseudo_collate)
        return [image.long().sum().item() for batch in loader for image in batch["inputs"]]

    first = epoch(0, 2)
    assert first == epoch(0, 0) == epoch(0, 1)
    assert len(set(first)) == 8                              # the same grey picture each time: only the noise differs
    assert not set(first) & set(epoch(1, 2))


@pytest.fixture(autouse=True)
def fill_one():
    """A transform that makes all pictures the same."""
    from visionkit.registry import TRANSFORMS

    def FillOne():
        return lambda results: results | {"img": np.full((48, 48, 3), 128, np.uint8)}

    TRANSFORMS.register_module(name="FillOne", module=FillOne)
    yield
    TRANSFORMS._module_dict.pop("FillOne")


@pytest.mark.parametrize("transform, message", [
    (dict(type="HorizontalFlp"), r"pipeline\[0\].transforms\[0\].type: .* no transform .*. Did you mean 'HorizontalFlip'"),
    (dict(type="HorizontalFlip", prob=0.5), r"pipeline\[0\].transforms\[0\].prob: HorizontalFlip has no argument 'prob'"),
    (dict(type="OneOf", transforms=[dict(type="Blur", blur=3)]), r"transforms\[0\].transforms\[0\].blur: Blur has no argument 'blur'"),
    (dict(type="RandomCrop", height=-3, width=3), r"pipeline\[0\].transforms\[0\]: albumentations' RandomCrop: .*greater than"),
    (dict(type="RandomCrop"), r"RandomCrop needs the arguments 'height', 'width'"),
    ("HorizontalFlip", r"transforms\[0\]: wanted dict\(type=..., ...\)")],
    ids=["name", "argument", "nested argument", "value", "missing", "no dict"])
def test_what_the_package_would_only_warn_about_is_an_error_with_its_place(transform, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        build_pipeline([dict(type="Albumentations", transforms=[transform])])


def test_key_points_are_refused_because_they_would_not_be_moved():
    with pytest.raises(ValueError, match="does not carry `gt_keypoints`"):
        Albumentations([dict(type="HorizontalFlip")])(scene() | {"gt_keypoints": np.zeros((1, 1, 3))})


def test_a_missing_package_is_an_error_that_says_how_to_install_it(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "albumentations":
            raise ImportError("No module named 'albumentations'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'visionkit\[albumentations\]'"):
        Albumentations([dict(type="HorizontalFlip")])


def test_no_look_up_on_the_network_at_import(monkeypatch):
    monkeypatch.delenv("NO_ALBUMENTATIONS_UPDATE")
    Albumentations([dict(type="HorizontalFlip")])
    assert os.environ["NO_ALBUMENTATIONS_UPDATE"] == "1"
    assert "albumentations" in sys.modules
