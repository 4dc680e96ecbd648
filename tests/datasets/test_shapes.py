import json
import time

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from visionkit.datasets import CocoDataset, Draw, ShapesDataset, shapes
from visionkit.registry import ConfigError

PIPELINE = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_mask=True), dict(type="RandomFlip", prob=0.5),
            dict(type="PackSample")]


def test_a_scene_is_a_function_of_seed_and_index_alone():
    first, again, longer = ShapesDataset(5, seed=3), ShapesDataset(5, seed=3), ShapesDataset(50, seed=3)
    for index in (4, 0):
        records = [dataset.get_data_info(index) for dataset in (first, again, longer)]
        for record in records[1:]:
            assert (record["img"] == records[0]["img"]).all()
            assert record["instances"] == records[0]["instances"]
    assert (first.get_data_info(0)["img"] != first.get_data_info(1)["img"]).any()
    assert (first.get_data_info(0)["img"] != ShapesDataset(5, seed=4).get_data_info(0)["img"]).any()


def test_boxes_and_masks_hold_what_can_be_seen():
    dataset = ShapesDataset(60, seed=1, num_objects=(6, 9))
    for index in range(60):
        record = dataset.get_data_info(index)
        masks = [coco_mask.decode(instance["mask"]) for instance in record["instances"]]
        for instance, mask in zip(record["instances"], masks, strict=True):
            rows, columns = np.nonzero(mask)
            assert instance["bbox"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert instance["area"] == mask.sum() > 0
        assert sum(masks).max() <= 1                         # no pixel belongs to two


def test_shapes_hide_each_other_but_never_more_than_half():
    occluded = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        drawn = shapes.draw_shapes(rng, np.zeros((160, 160, 3), np.uint8), range(4), (7, 7), (0.1, 0.24))
        visible = [shape.mask.sum() / shape.area for shape in drawn]
        assert min(visible) >= shapes.MIN_VISIBLE
        occluded += sum(part < 0.9 for part in visible)
    assert occluded > 40


def test_a_mask_lies_on_the_pixels_of_its_colour():
    for seed in range(20):
        image = np.zeros((96, 96, 3), np.uint8)
        shape, = shapes.draw_shapes(np.random.default_rng(seed), image, range(4), (1, 1), (0.2, 0.3))
        lit = image.max(-1) > 60
        assert (lit & shape.mask).sum() / (lit | shape.mask).sum() > 0.9


@pytest.mark.parametrize("size", [(160, 160), (320, 240), (32, 64)])
def test_scenes_have_the_size_asked_for(size):
    record = ShapesDataset(2, size=size).get_data_info(1)
    assert record["img"].shape == (size[1], size[0], 3)
    assert record["img"].dtype == np.uint8
    assert (record["width"], record["height"]) == size


def test_all_classes_and_the_asked_number_of_objects_appear():
    dataset = ShapesDataset(80, num_objects=(2, 4), shape_size=(0.05, 0.1))
    records = [dataset.get_data_info(index) for index in range(80)]
    assert {len(record["instances"]) for record in records} == {2, 3, 4}
    assert {instance["bbox_label"] for record in records for instance in record["instances"]} == {0, 1, 2, 3}


def test_classes_choose_and_order_the_shapes():
    dataset = ShapesDataset(20, metainfo=dict(classes=("star", "circle")))
    assert dataset.metainfo == {"classes": ("star", "circle"), "category_ids": (1, 2)}
    for index in range(20):
        record = dataset.get_data_info(index)
        for label, name in enumerate(("star", "circle")):
            assert (name in record["caption"]) == any(instance["bbox_label"] == label for instance in record["instances"])
        assert "triangle" not in record["caption"]
    with pytest.raises(ConfigError, match="no category 'square'"):
        ShapesDataset(2, metainfo=dict(classes=("square",)))


def test_captions_read_as_a_person_would_write_them():
    drawn = [shapes.Shape(label, color, 1.0, None) for label, color in [(3, "orange"), (0, "red"), (0, "red"), (2, "blue")]]
    assert shapes.caption(drawn) == "two red circles, a blue triangle and an orange star"
    assert shapes.caption(drawn[:1]) == "an orange star"
    assert shapes.caption([]) == "an empty scene"


def test_a_sample_carries_boxes_masks_and_the_caption():
    item = ShapesDataset(3, pipeline=PIPELINE)[Draw(1, seed=2)]
    sample = item["data_samples"]
    assert sample.gt_instances.masks.shape == (len(sample.gt_instances), 160, 160)
    for box, mask in zip(sample.gt_instances.bboxes, sample.gt_instances.masks, strict=True):
        rows, columns = mask.nonzero(as_tuple=True)
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert sample.caption
    assert item["inputs"].shape == (3, 160, 160)


def test_ground_truth_in_coco_form_is_what_pycocotools_reads(tmp_path):
    dataset = ShapesDataset(12, seed=5)
    coco = COCO()
    coco.dataset = dataset.to_coco()
    coco.createIndex()
    assert sorted(coco.getImgIds()) == list(range(1, 13))
    assert len(coco.anns) == sum(len(dataset.get_data_info(i)["instances"]) for i in range(12))        # no id twice
    for annotation in coco.anns.values():
        assert coco.annToMask(annotation).sum() == annotation["area"]


def test_nothing_is_written_unless_exported_and_the_export_reads_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = ShapesDataset(4, seed=6, pipeline=PIPELINE)
    dataset[0]
    dataset.to_coco()
    assert not list(tmp_path.iterdir())
    dataset.export(tmp_path / "shapes")
    back = CocoDataset(data_root=str(tmp_path / "shapes"), ann_file="annotations.json", data_prefix=dict(img="images"))
    assert back.metainfo["classes"] == dataset.metainfo["classes"]
    for index in range(4):
        assert (back.image(index) == dataset.image(index)).all()
        for one, other in zip(back.get_data_info(index)["instances"], dataset.get_data_info(index)["instances"], strict=True):
            assert all(one[key] == other[key] for key in ("bbox", "bbox_label", "area", "id", "mask"))
    assert json.loads((tmp_path / "shapes" / "annotations.json").read_text())["images"][0]["caption"]


def test_scenes_without_objects_can_be_left_out():
    dataset = ShapesDataset(30, num_objects=(0, 1))
    kept = ShapesDataset(30, num_objects=(0, 1), filter_cfg=dict(filter_empty_gt=True))
    empty = [i for i in range(30) if not dataset.get_data_info(i)["instances"]]
    assert empty
    assert len(kept) == 30 - len(empty)
    assert all(kept.get_data_info(i)["instances"] for i in range(len(kept)))


@pytest.mark.parametrize("arguments", [dict(num_images=0), dict(size=(16, 160)), dict(num_objects=(3, 2)), dict(shape_size=(0.2, 0.9))])
def test_arguments_that_make_no_scene_are_refused(arguments):
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=f"{name} must be"):
        ShapesDataset(**arguments)


def test_scenes_are_drawn_faster_than_a_model_trains_on_them():
    dataset, seconds = ShapesDataset(100), []
    for first in range(0, 100, 20):
        start = time.process_time()
        for index in range(first, first + 20):
            dataset.get_data_info(index)
        seconds.append(time.process_time() - start)
    assert 20 / min(seconds) > 120                           # about 400 on one core of 2026; slower machines get room
