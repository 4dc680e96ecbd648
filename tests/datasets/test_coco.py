import json
import pickle
import random

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS as ROOT
from mmengine.registry import DefaultScope
from torch._utils import ExceptionWrapper

from visionkit.datasets import CocoDataset, Draw
from visionkit.registry import ConfigError
from visionkit.transforms import BrokenImageError

PIPELINE = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="RandomFlip", prob=0.5), dict(type="PackSample")]


def coco(folder, **arguments):
    return CocoDataset(data_root=str(folder), ann_file="train.json", data_prefix=dict(img="images"), **arguments)


def test_boxes_labels_and_flags_come_out_as_the_file_has_them(write_coco):
    dataset = coco(write_coco())
    assert dataset.metainfo == {"classes": ("cat", "dog"), "category_ids": (3, 7)}
    dog, crowd = dataset.get_data_info(0)["instances"]
    assert (dog["bbox"], dog["bbox_label"], dog["ignore_flag"], dog["area"], dog["id"]) == ([4, 5, 24, 15], 1, 0, 150, 1)
    assert dog["mask"] == [[4, 5, 24, 5, 24, 15, 4, 15]]
    assert (crowd["bbox"], crowd["bbox_label"], crowd["ignore_flag"]) == ([30, 20, 60, 40], 0, 1)
    assert dataset.get_data_info(1)["instances"][0]["area"] == 72            # the file gives none


def test_a_sample_separates_objects_from_crowd_and_keeps_the_original_annotations(write_coco):
    item = coco(write_coco(), pipeline=[*PIPELINE[:2], dict(type="Resize", scale=(128, 96)), PIPELINE[3]])[0]
    sample = item["data_samples"]
    assert item["inputs"].shape == (3, 96, 128)
    assert item["inputs"].dtype == torch.uint8
    assert sample.gt_instances.bboxes.tolist() == [[8, 10, 48, 30]]
    assert sample.gt_instances.labels.tolist() == [1]
    assert sample.ignored_instances.bboxes.tolist() == [[60, 40, 120, 80]]
    assert [instance["bbox"] for instance in sample.annotations] == [[4, 5, 24, 15], [30, 20, 60, 40]]
    assert (sample.img_id, sample.ori_shape, sample.img_shape, sample.scale_factor) == (10, (48, 64), (96, 128), (2.0, 2.0))


def test_mmengines_runner_builds_the_dataset_by_the_default_scope(write_coco):
    with DefaultScope.overwrite_default_scope("visionkit"):
        dataset = ROOT.build(dict(type="CocoDataset", data_root=str(write_coco()), ann_file="train.json"))
    assert isinstance(dataset, CocoDataset)


def test_classes_choose_and_order_the_labels(write_coco):
    folder = write_coco()
    dataset = coco(folder, metainfo=dict(classes=("dog", "cat")))
    assert dataset.metainfo["category_ids"] == (7, 3)
    assert [instance["bbox_label"] for instance in dataset.get_data_info(0)["instances"]] == [0, 1]
    only = coco(folder, metainfo=dict(classes=("cat",)))
    assert [len(only.get_data_info(i)["instances"]) for i in range(3)] == [1, 1, 0]


def test_a_class_that_the_file_lacks_is_an_error_with_its_categories(write_coco):
    with pytest.raises(ConfigError, match=r"metainfo.classes: .*train.json has no category 'dgo'. Did you mean 'dog'\? "
                                          r"Its 2 categories: cat, dog"):
        coco(write_coco(), metainfo=dict(classes=("cat", "dgo")))


def test_a_box_that_is_not_a_number_is_an_error_with_its_annotation(write_coco):
    folder = write_coco()
    file = folder / "train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][2] = float("nan")
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"annotation 1 of .*train.json has a `bbox` that is not finite"):
        coco(folder)


def test_a_class_named_twice_is_an_error(write_coco):
    with pytest.raises(ConfigError, match="metainfo.classes: a class stands twice in cat, cat"):
        coco(write_coco(), metainfo=dict(classes=("cat", "cat")))


def test_images_without_objects_stay_unless_asked_otherwise(write_coco):
    folder = write_coco(lambda content: content["annotations"].pop(0))      # leaves image 10 with nothing but crowd
    assert len(coco(folder)) == 3
    dataset = coco(folder, filter_cfg=dict(filter_empty_gt=True))
    assert [dataset.get_data_info(i)["img_id"] for i in range(len(dataset))] == [11]


def test_small_images_are_left_out_when_asked(write_coco):
    folder = write_coco(lambda content: content["images"][0].update(width=20))
    assert len(coco(folder, filter_cfg=dict(min_size=32))) == 2
    assert len(coco(folder, filter_cfg=dict(min_size=20))) == 3


def test_a_filter_that_leaves_nothing_is_an_error_that_names_it(write_coco):
    with pytest.raises(ConfigError, match=r"no records: .*train.json lists no image that passes filter_cfg=\{'min_size': 1000\}"):
        coco(write_coco(), filter_cfg=dict(min_size=1000))


@pytest.mark.parametrize("arguments, message", [
    (dict(filter_cfg=dict(filter_empty=True)), "filter_cfg.filter_empty: .*Did you mean 'filter_empty_gt'"),
    (dict(on_error="ignore"), "on_error: on_error must be 'raise' or 'skip', got 'ignore'"),
    (dict(on_error="skip", test_mode=True), "on_error: an evaluation cannot replace images"),
    (dict(pipeline=[dict(type="LoadImageFromFile"), dict(type="RandomFlip", probs=1)]),
     r"pipeline\[1\].probs: RandomFlip has no argument 'probs'. Did you mean 'prob'"),
    (dict(pipeline=[dict(type="LoadImage")]), r"pipeline\[0\].type: no transform named 'LoadImage'. Did you mean 'LoadImageFromFile'"),
    (dict(pipeline=[dict(type="Resize")]), r"pipeline\[0\]: Resize: Resize needs either scale"),
    (dict(pipeline=[dict(type="CenterCrop", crop_size="big")]), r"pipeline\[0\]: CenterCrop: "),
], ids=["filter", "on_error", "skip in a test", "argument", "transform", "value", "value of mmcv's"])
def test_a_wrong_argument_is_named_with_its_place(write_coco, arguments, message):
    with pytest.raises(ConfigError, match=message):
        coco(write_coco(), **arguments)


def test_a_wrong_prefix_is_named(write_coco):
    with pytest.raises(ConfigError, match="data_prefix.image: data_prefix has no 'image'. Did you mean 'img'"):
        CocoDataset(data_root=str(write_coco()), ann_file="train.json", data_prefix=dict(image="images"))


@pytest.mark.parametrize("change, message", [
    (lambda c: c.clear(), "not in COCO's format.*found nothing$"),
    (lambda c: c.pop("categories"), "not in COCO's format.*found images, annotations"),
    (lambda c: c["images"][1].pop("width"), r"images\[1\] of .*train.json has no 'width'"),
    (lambda c: c["annotations"][0].pop("bbox"), "annotation 1 of .* has no `bbox`"),
    (lambda c: c["annotations"][0].update(category_id=99), "annotation 1 of .* has category_id 99, which its categories do not list"),
    (lambda c: c["images"][1].update(id=10), "gives the image id 10 to two files"),
    (lambda c: c["categories"][0].update(name="cat"), "ann_file: .*more than one category called 'cat'"),
    (lambda c: c["images"].clear(), "has no records: .* lists no image"),
], ids=["nothing", "no categories", "no width", "no bbox", "unknown category", "one id for two files", "one name for two categories",
        "no images"])
def test_a_file_that_cannot_be_used_is_an_error_that_says_why(write_coco, change, message):
    with pytest.raises(ConfigError, match=message):
        coco(write_coco(change))


def test_a_file_that_is_not_json_is_an_error(tmp_path):
    (tmp_path / "train.json").write_text("{")
    with pytest.raises(ConfigError, match=r"ann_file: .*train.json is not JSON"):
        coco(tmp_path)


def test_a_file_without_annotations_is_for_testing(write_coco):
    dataset = coco(write_coco(lambda content: content.pop("annotations")))
    assert [dataset.get_data_info(i)["instances"] for i in range(3)] == [[], [], []]


@pytest.mark.parametrize("change, warning, boxes", [
    (lambda c: c["annotations"].append(dict(c["annotations"][0], id=9, image_id=77)), "1 annotations of images that it does not list", 2),
    (lambda c: c["annotations"].append(c["annotations"][0]), "1 annotation ids that stand twice", 3),
    (lambda c: c["annotations"][0].update(bbox=[50, 5, 20, 10]), "1 boxes that reach outside", 2),
    (lambda c: c["annotations"][0].update(bbox=[5, 5, 0, 10]), "1 boxes that reach outside their image or have no extent", 2),
    (lambda c: c["images"].append(c["images"][0]), "lists 1 images twice", 2),
], ids=["image not listed", "annotation twice", "outside", "no extent", "image twice"])
def test_what_is_odd_is_tolerated_with_a_warning_that_counts_it(write_coco, monkeypatch, change, warning, boxes):
    logged = []
    monkeypatch.setattr(CocoDataset, "_log", lambda self, message, level=0: logged.append(message))
    dataset = coco(write_coco(change))
    assert any(warning in message for message in logged), logged
    assert len(dataset) == 3
    assert len(dataset.get_data_info(0)["instances"]) == boxes


def test_a_sound_file_logs_nothing(write_coco, monkeypatch):
    monkeypatch.setattr(CocoDataset, "_log", lambda self, message, level=0: pytest.fail(message))
    coco(write_coco())


def test_a_draw_decides_all_randomness_and_leaves_the_process_alone(write_coco):
    dataset = coco(write_coco(), pipeline=PIPELINE)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    flips = [dataset[Draw(0, seed)]["data_samples"].flip for seed in range(20)]
    assert len(set(flips)) == 2
    assert flips == [dataset[Draw(0, seed)]["data_samples"].flip for seed in range(20)]
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert (torch.get_rng_state() == before[2]).all()


def test_a_plain_index_takes_randomness_from_where_it_stands(write_coco):
    dataset = coco(write_coco(), pipeline=PIPELINE)
    np.random.seed(0)
    assert len({dataset[0]["data_samples"].flip for _ in range(20)}) == 2


def test_a_pickled_dataset_still_loads(write_coco):
    dataset = pickle.loads(pickle.dumps(coco(write_coco(), pipeline=PIPELINE)))
    assert dataset[Draw(0, 1)]["inputs"].shape == (3, 48, 64)


def test_indices_choose_records(write_coco):
    assert [coco(write_coco(), indices=[2, 0]).get_data_info(i)["img_id"] for i in range(2)] == [12, 10]


# --------------------------------------------------------------------------------------------------------- images that are broken

def test_a_missing_image_is_named_with_its_ids(write_coco):
    folder = write_coco()
    (folder / "images" / "0.jpg").unlink()
    with pytest.raises(BrokenImageError, match=r"images/0.jpg \(image id 10, annotation ids 1, 2\): the file does not exist"):
        coco(folder, pipeline=PIPELINE)[0]


@pytest.mark.parametrize("on_draw", [False, True])
def test_skip_replaces_a_broken_image_and_says_which(write_coco, on_draw):
    folder = write_coco()
    data = (folder / "images" / "0.jpg").read_bytes()
    (folder / "images" / "0.jpg").write_bytes(data[: len(data) // 2])
    dataset = coco(folder, pipeline=PIPELINE, on_error="skip")
    index = Draw(0, 5) if on_draw else 0
    sample = dataset[index]["data_samples"]
    assert sample.img_id in (11, 12)
    assert any("0.jpg" in line and "image id 10, annotation ids 1, 2" in line and "truncated" in line for line in sample.replaced)
    assert dataset[index]["data_samples"].img_id == sample.img_id
    assert on_draw or dataset[-3]["data_samples"].img_id == sample.img_id     # the same image, counted from the end
    assert "replaced" not in dataset[1]["data_samples"]


def test_the_augmentation_of_a_replacement_follows_the_draw_too(write_coco):
    folder = write_coco()
    (folder / "images" / "0.jpg").unlink()
    dataset = coco(folder, pipeline=PIPELINE, on_error="skip")
    flips = [[dataset[Draw(0, seed)]["data_samples"].flip for seed in range(16)] for _ in range(2)]
    assert flips[0] == flips[1]
    assert len(set(flips[0])) == 2


def test_different_draws_of_a_broken_image_get_different_replacements(write_coco):
    folder = write_coco(num_images=6)
    (folder / "images" / "0.jpg").unlink()
    dataset = coco(folder, pipeline=PIPELINE, on_error="skip")
    assert len({dataset[Draw(0, seed)]["data_samples"].img_id for seed in range(30)}) == 5


def test_skip_gives_up_when_no_image_can_be_read(write_coco):
    folder = write_coco()
    for i in range(3):
        (folder / "images" / f"{i}.jpg").write_bytes(b"")
    with pytest.raises(BrokenImageError, match="no usable image in 21 draws; 21 could not be read, the last: .*the file is empty"):
        coco(folder, pipeline=PIPELINE, on_error="skip")[0]


def test_a_broken_image_reaches_the_main_process_by_name(write_coco):
    folder = write_coco()
    (folder / "images" / "2.jpg").write_text("not an image")
    with pytest.raises(BrokenImageError) as caught:
        coco(folder, pipeline=PIPELINE)[2]
    carried = pickle.loads(pickle.dumps(ExceptionWrapper((caught.type, caught.value, caught.tb))))     # as a worker sends it
    with pytest.raises(BrokenImageError, match=r"2.jpg \(image id 12, no annotations\): the content is not an image"):
        carried.reraise()


def test_the_original_picture_comes_in_rgb(write_coco):
    folder = write_coco()
    red = np.zeros((48, 64, 3), np.uint8)
    red[..., 2] = 255
    cv2.imwrite(str(folder / "images" / "0.jpg"), red)
    assert coco(folder).image(0)[20, 20].argmax() == 0


def test_an_annotation_file_of_other_image_order_gives_the_same_records(write_coco):
    folder = write_coco()
    content = json.loads((folder / "train.json").read_text())
    expected = coco(folder).get_data_info(0)
    content["annotations"].reverse()
    (folder / "train.json").write_text(json.dumps(content))
    found = coco(folder).get_data_info(0)
    assert found["instances"] == expected["instances"][::-1]
