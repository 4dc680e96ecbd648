import json
import os
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from visionkit.datasets import CocoInstancesAsPanoptic, CocoPanopticDataset, Draw
from visionkit.evaluation import PanopticQuality
from visionkit.registry import ConfigError
from visionkit.structures.panoptic_map import decode_png, encode_png
from visionkit.transforms import BoxesFromMasks, BrokenImageError, LoadPanopticAnnotations

ROOT = next((path for path in (os.environ.get("VISIONKIT_DATA"), "../shared/data") if path and Path(path, "coco_panoptic").is_dir()), None)
real_data = pytest.mark.skipif(ROOT is None, reason="needs data/coco_panoptic and data/nuclei; VISIONKIT_DATA names the folder that "
                                                    "holds them")
LOAD = [dict(type="LoadImageFromFile"), dict(type="LoadPanopticAnnotations", keep_map=True)]
PACK = dict(type="PackSample")
IDS = np.zeros((48, 64), np.int32)
IDS[:20], IDS[30:40, 10:30], IDS[30:40, 30:50], IDS[40:, :] = 9, 70000, 300, 5           # grass, a cat, a crowd of cats, a road


@pytest.fixture
def write_panoptic(write_coco):
    """Write a small panoptic data set: image 10 of three, with the segments of `IDS`, and return its folder."""
    def write(change=None):
        def as_panoptic(content):
            content["categories"] = [{"id": 3, "name": "grass", "isthing": 0}, {"id": 7, "name": "cat", "isthing": 1},
                                     {"id": 8, "name": "road", "isthing": 0}]
            content["annotations"] = [{"image_id": 10, "file_name": "0.png", "segments_info": [
                {"id": 9, "category_id": 3, "iscrowd": 0, "area": 1280, "bbox": [0, 0, 64, 20]},
                {"id": 70000, "category_id": 7, "iscrowd": 0, "area": 200, "bbox": [10, 30, 20, 10]},
                {"id": 300, "category_id": 7, "iscrowd": 1, "area": 200, "bbox": [30, 30, 20, 10]},
                {"id": 5, "category_id": 8, "iscrowd": 0, "area": 512, "bbox": [0, 40, 64, 8]}]}]
            if change is not None:
                change(content)
        folder = write_coco(as_panoptic)
        (folder / "maps").mkdir(exist_ok=True)
        (folder / "maps" / "0.png").write_bytes(encode_png(IDS))
        return folder
    return write


def panoptic(folder, pipeline=(*LOAD, PACK), **arguments):
    return CocoPanopticDataset(data_root=str(folder), ann_file="train.json", data_prefix=dict(img="images", seg="maps"), pipeline=pipeline,
                               **arguments)


def test_things_come_first_and_each_segment_is_an_object_with_a_mask(write_panoptic):
    dataset = panoptic(write_panoptic())
    assert dataset.metainfo == {"classes": ("cat", "grass", "road"), "category_ids": (7, 3, 8), "isthing": (True, False, False)}
    assert len(dataset) == 1                                 # the two images that nobody annotated are left out
    sample = dataset[0]["data_samples"]
    assert sample.gt_instances.labels.tolist() == [1, 0, 2]
    assert sample.gt_instances.bboxes.tolist() == [[0, 0, 64, 20], [10, 30, 30, 40], [0, 40, 64, 48]]
    assert sample.gt_instances.masks.sum((1, 2)).tolist() == [1280, 200, 512]
    assert sample.ignored_instances.bboxes.tolist() == [[30, 30, 50, 40]]
    assert np.array_equal(sample.panoptic.ids, IDS)
    assert [(one.id, one.isthing, one.iscrowd) for one in sample.panoptic.segments] == [
        (9, False, False), (70000, True, False), (300, True, True), (5, False, False)]


def test_the_box_of_stuff_is_the_extent_of_its_mask_not_what_the_file_says(write_panoptic):
    def wrong_box(content):
        content["annotations"][0]["segments_info"][0]["bbox"] = [5, 5, 5, 5]
    assert panoptic(write_panoptic(wrong_box))[0]["data_samples"].gt_instances.bboxes[0].tolist() == [0, 0, 64, 20]


def test_categories_that_are_not_chosen_become_void(write_panoptic):
    sample = panoptic(write_panoptic(), metainfo=dict(classes=("cat", "road")))[0]["data_samples"]
    assert sample.gt_instances.labels.tolist() == [0, 1]
    assert np.array_equal(sample.panoptic.ids, np.where(IDS == 9, 0, IDS))


def test_masks_and_boxes_follow_resize_flip_and_crop(write_panoptic):
    pipeline = [*LOAD, dict(type="Resize", scale=(128, 96)), dict(type="RandomFlip", prob=1.0), dict(type="RandomCrop", size=(70, 50)),
                dict(type="BoxesFromMasks"), PACK]
    dataset = panoptic(write_panoptic(), pipeline)
    for seed in range(5):
        item = dataset[Draw(0, seed)]
        sample = item["data_samples"]
        assert item["inputs"].shape == (3, 50, 70)
        assert sample.panoptic.ids.shape == (48, 64)         # the metric's map stays as it was
        assert len(sample.gt_instances)
        masks = [*sample.gt_instances.masks, *sample.ignored_instances.masks]
        boxes = [*sample.gt_instances.bboxes.tolist(), *sample.ignored_instances.bboxes.tolist()]
        assert sum(mask.int() for mask in masks).max() == 1  # they still do not overlap
        for mask, box in zip(masks, boxes, strict=True):
            rows, columns = mask.nonzero(as_tuple=True)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_what_shrinking_makes_vanish_is_left_out(write_panoptic):
    pipeline = [*LOAD, dict(type="Resize", scale=(3, 2)), dict(type="BoxesFromMasks"), PACK]
    sample = panoptic(write_panoptic(), pipeline)[0]["data_samples"]
    assert len(sample.gt_instances) + len(sample.ignored_instances) < 4
    assert all(mask.any() for mask in sample.gt_instances.masks)


def test_a_training_pipeline_does_not_carry_the_map(write_panoptic):
    pipeline = [LOAD[0], dict(type="LoadPanopticAnnotations"), PACK]
    assert "panoptic" not in panoptic(write_panoptic(), pipeline)[0]["data_samples"]


def test_a_map_that_does_not_fit_its_description_is_named(write_panoptic):
    folder = write_panoptic()
    (folder / "maps" / "0.png").write_bytes(encode_png(np.where(IDS == 9, 8, IDS)))
    with pytest.raises(BrokenImageError, match=r"0.png \(image id 10, annotation ids 9, .*nobody describes: \[8\]"):
        panoptic(folder)[0]
    (folder / "maps" / "0.png").write_bytes(encode_png(IDS[:40]))
    with pytest.raises(BrokenImageError, match=r"it has \[40, 64\] pixels, the image \[48, 64\]"):
        panoptic(folder)[0]
    (folder / "maps" / "0.png").unlink()
    with pytest.raises(BrokenImageError, match="the file does not exist"):
        panoptic(folder)[0]


def test_a_wrong_file_or_order_of_classes_is_named(write_panoptic, write_coco):
    with pytest.raises(ConfigError, match="metainfo.classes: things come before stuff, but the stuff 'grass' stands before a thing"):
        panoptic(write_panoptic(), metainfo=dict(classes=("grass", "cat")))
    with pytest.raises(ConfigError, match="has no 'file_name', 'segments_info'"):
        panoptic(write_coco())
    with pytest.raises(ValueError, match="neither `seg_path` nor `background_label`"):
        LoadPanopticAnnotations()({"img_path": "a.png", "instances": [], "ori_shape": (4, 4)})
    with pytest.raises(ValueError, match="needs `gt_masks`"):
        BoxesFromMasks()({"img_path": "a.png"})


# --------------------------------------------------------------------------------------------------------- instances as panoptic

def instances(folder, **arguments):
    return CocoInstancesAsPanoptic(data_root=str(folder), ann_file="train.json", data_prefix=dict(img="images"), pipeline=[*LOAD, PACK],
                                   **arguments)


def with_masks(content):
    """Two cats that overlap in image 10, one of them small, and none in the others."""
    masks = np.zeros((2, 48, 64), np.uint8)
    masks[0, 5:15, 4:24], masks[1, 10:20, 20:26] = 1, 1
    content["annotations"] = [
        {"id": index, "image_id": 10, "category_id": 3, "bbox": coco_mask.toBbox(rle).tolist(), "iscrowd": 0,
         "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}
        for index, rle in enumerate(map(coco_mask.encode, map(np.asfortranarray, masks)), 1)]


def test_objects_are_things_on_one_background(write_coco):
    dataset = instances(write_coco(with_masks))
    assert dataset.metainfo == {"classes": ("cat", "dog", "background"), "category_ids": (3, 7, 8), "isthing": (True, True, False)}
    sample = dataset[0]["data_samples"]
    assert sample.gt_instances.labels.tolist() == [0, 0, 2]
    areas = sample.gt_instances.masks.sum((1, 2)).tolist()
    assert areas == [200 - 5 * 4, 60, 48 * 64 - 240]         # the smaller of two lies on top
    assert sample.gt_instances.bboxes[2].tolist() == [0, 0, 64, 48]
    empty = dataset[1]["data_samples"].gt_instances
    assert (empty.labels.tolist(), empty.bboxes.tolist()) == ([2], [[0, 0, 64, 48]])


def test_a_class_of_the_name_background_is_refused(write_coco):
    def rename(content):
        content["categories"][0]["name"] = "background"
    with pytest.raises(ConfigError, match="has one of that name"):
        instances(write_coco(rename))


# ------------------------------------------------------------------------------------------------------------------- real data

@real_data
def test_coco_s_own_sample_is_read_whole(monkeypatch):
    monkeypatch.setenv("VISIONKIT_DATA", str(Path(ROOT).resolve()))
    dataset = CocoPanopticDataset(data_root="data/coco_panoptic/sample_data/", ann_file="panoptic_examples.json",
                                  data_prefix=dict(img="input_images/", seg="panoptic_examples/"), pipeline=[*LOAD, PACK])
    assert sum(dataset.metainfo["isthing"]) == 80            # of 133, the first
    assert dataset.metainfo["isthing"] == (True,) * 80 + (False,) * 53
    for index in range(2):
        sample = dataset[index]["data_samples"]
        boxes = sample.gt_instances.bboxes.tolist() + sample.ignored_instances.bboxes.tolist()
        given = sorted(dataset.get_data_info(index)["instances"], key=lambda one: one["ignore_flag"])
        assert boxes == [one["bbox"] for one in given]       # COCO's boxes are the extents of the masks too
        assert sample.gt_instances.masks.sum((1, 2)).tolist() == [one["area"] for one in given if not one["ignore_flag"]]


@real_data
def test_nuclei_against_themselves_have_a_panoptic_quality_of_1(monkeypatch, tmp_path):
    monkeypatch.setenv("VISIONKIT_DATA", str(Path(ROOT).resolve()))
    dataset = CocoInstancesAsPanoptic(data_root="data/nuclei/", ann_file="val.json", data_prefix=dict(img="images/"), indices=2,
                                      pipeline=[*LOAD, PACK])
    metric = PanopticQuality(outfile_prefix=str(tmp_path / "nuclei"))
    metric.dataset_meta = dataset.metainfo
    for index in range(2):
        sample = dataset[index]["data_samples"]
        sample.pred_panoptic = sample.panoptic
        metric.process(None, [sample.to_dict()])
    assert set(metric.evaluate(2).values()) == {1.0}
    written = json.loads((tmp_path / "nuclei.json").read_text())["annotations"][0]
    assert len(np.unique(decode_png((tmp_path / "nuclei" / written["file_name"]).read_bytes()))) == len(written["segments_info"])
