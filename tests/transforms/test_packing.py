import numpy as np
import pytest
import torch

from visionkit.structures import Sample
from visionkit.transforms import PackSample


def results(**changes):
    return {"img": np.arange(8 * 10 * 3, dtype=np.uint8).reshape(8, 10, 3), "img_id": 4, "img_path": "a.jpg", "ori_shape": (16, 20),
            "scale_factor": (0.5, 0.5), "instances": [{"id": 1}],
            "gt_bboxes": np.array([[0, 0, 4, 4], [2, 2, 6, 6], [1, 1, 3, 3]], np.float32),
            "gt_bboxes_labels": np.array([0, 1, 2]), "gt_ignore_flags": np.array([False, True, False]),
            "gt_masks": np.ones((3, 8, 10), np.uint8), **changes}


def test_a_sample_has_objects_crowd_and_meta_information():
    packed = PackSample()(results())
    image, sample = packed["inputs"], packed["data_samples"]
    assert isinstance(sample, Sample)
    assert image.dtype == torch.uint8
    assert (image.permute(1, 2, 0).numpy() == results()["img"]).all()
    assert sample.gt_instances.labels.tolist() == [0, 2]
    assert sample.gt_instances.labels.dtype == torch.int64
    assert sample.gt_instances.bboxes.dtype == torch.float32
    assert sample.gt_instances.masks.shape == (2, 8, 10)
    assert sample.gt_instances.masks.dtype == torch.bool
    assert sample.ignored_instances.labels.tolist() == [1]
    assert (sample.img_id, sample.img_path, sample.ori_shape, sample.img_shape) == (4, "a.jpg", (16, 20), (8, 10))
    assert (sample.scale_factor, sample.flip, sample.flip_direction, sample.annotations) == ((0.5, 0.5), False, None, [{"id": 1}])


def test_an_image_alone_packs_without_ground_truth():
    sample = PackSample()({"img": np.zeros((4, 6), np.uint8)})
    assert sample["inputs"].shape == (3, 4, 6)
    assert "gt_instances" not in sample["data_samples"]
    assert sample["data_samples"].scale_factor == (1.0, 1.0)


def test_objects_outside_the_image_or_without_extent_are_left_out():
    boxes = np.array([[12, 0, 14, 4], [9, 7, 20, 20], [3, 3, 3, 6]], np.float32)
    sample = PackSample()(results(gt_bboxes=boxes, gt_ignore_flags=np.zeros(3, bool)))["data_samples"]
    assert sample.gt_instances.labels.tolist() == [1]
    assert sample.gt_instances.bboxes.tolist() == [[9, 7, 20, 20]]           # not cut: that is for the geometric transforms


@pytest.mark.parametrize("changes, message", [
    (dict(gt_bboxes_labels=np.array([0])), "number of objects .*'labels': 1"),
    (dict(gt_ignore_flags=np.zeros(2, bool)), "'ignore flags': 2"),
    (dict(gt_masks=np.ones((3, 16, 20), np.uint8)), r"masks of \(16, 20\) pixels do not lie on the image of \(8, 10\)")])
def test_arrays_out_of_step_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PackSample()(results(**changes))


def test_further_keys_are_kept_when_asked_for():
    sample = PackSample(meta_keys=("camera",))(results(camera="left", caption="a cat", replaced=["b.jpg"]))["data_samples"]
    assert (sample.camera, sample.caption, sample.replaced) == ("left", "a cat", ["b.jpg"])
    with pytest.raises(ValueError, match="PackSample is to keep 'camera', but the pipeline's dict has only .*img_id"):
        PackSample(meta_keys=("camera",))(results())


def test_the_class_of_a_whole_image_is_packed():
    sample = PackSample()({"img": np.zeros((4, 6, 3), np.uint8), "gt_label": 7})["data_samples"]
    assert sample.gt_label.dtype == torch.int64
    assert sample.gt_label.item() == 7
