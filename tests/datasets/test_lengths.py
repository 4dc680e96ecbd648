"""Lengths without images: what is told is what the pipeline gives."""
import random
import time

import cv2
import numpy as np
import pytest
import torch
from mmengine.dataset import ClassBalancedDataset, ConcatDataset, RepeatDataset

from visionkit.datasets import (
    CocoDataset,
    Draw,
    DrawSampler,
    ImageFolder,
    ImageTokens,
    PackedBatchSampler,
    ShapesDataset,
)
from visionkit.registry import LENGTHS, ConfigError
from visionkit.transforms import BrokenImageError, LoadImageFromFile

LOAD, PACK, ANY_SIZE = dict(type="LoadImageFromFile"), dict(type="PackSample"), dict(type="RandomNativeResize")


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch):
    """mmengine collects garbage for each data set, which takes most of the time here."""
    monkeypatch.setattr("gc.collect", lambda: 0)


def shapes(*transforms, **settings):
    return ShapesDataset(num_images=6, size=(90, 60), pipeline=[LOAD, *transforms, PACK], **settings)


def loaded(dataset, draw):
    return tuple(dataset[draw]["inputs"].shape[1:])


@pytest.mark.parametrize("size, patches", [((28, 28), 4), ((100, 333), 8 * 24), ((2000, 3000), 54 * 80), ((1, 1), 4), ((896, 896), 4096)])
def test_tokens_by_hand(size, patches):
    """Spec 10, (g) 6. 100 x 333 is filled up to 112 x 336. 2000 x 3000 has 142 x 214 = 30388 whole patches; both sides times
    sqrt(4096 / 30388) are 734 and 1101 pixels, filled up to 756 and 1120: 54 x 80 patches."""
    assert ImageTokens(max_patches=4096).of_size(*size) == patches
    assert ImageTokens(max_patches=4096, merged=True).of_size(*size) == patches / 4


def test_without_a_limit_or_merging_only_patches_count():
    assert ImageTokens().of_size(2000, 3000) == 144 * 216
    assert ImageTokens(patch_size=16, merge=1).of_size(33, 16) == 3


@pytest.mark.parametrize("transforms", [
    [], [dict(type="Resize", scale=(40, 70))], [dict(type="Resize", scale=(77, 33), keep_ratio=True)],
    [dict(type="Resize", scale_factor=0.7)],
    [dict(type="Resize", scale_factor=(0.5, 1.3))], [dict(type="ResizeToTokenLimit", limit=12)],
    [dict(type="RandomFlip", prob=0.5), dict(type="RandomCrop", size=(80, 50), min_size=(20, 20))],
    [dict(type="RandomResizedCrop", size=(48, 32)), dict(type="RandomShift"), dict(type="RandomCrop", size=(40, 30), min_size=(9, 9))],
    [ANY_SIZE, dict(type="PhotoMetricDistortion")], [dict(type="RandomCrop", size=(200, 40))],
], ids=["as it is", "resize", "fit", "factor", "factors", "limit", "flip, crop", "resized crop, shift, crop", "any size", "crop"])
def test_the_size_that_is_told_is_the_size_that_is_loaded(transforms):
    data = shapes(*transforms)
    draws = [Draw(index, seed=1000 + index) for index in range(6)]
    assert data.output_sizes(draws) == [loaded(data, draw) for draw in draws]
    drawn = any(getattr(transform, "random_size", False) for transform in data.pipeline.transforms)
    assert ImageTokens().varies(data) == drawn == (len(set(data.output_sizes(Draw(0, seed) for seed in range(20)))) > 1)


@pytest.mark.parametrize("transform", [ANY_SIZE, dict(type="RandomFlip", prob=0.5), dict(type="Resize", scale_factor=(0.5, 1.3))],
                         ids=["any size", "flip", "factors"])
def test_lengths_leave_the_generators_alone(transform):
    data = shapes(transform)
    states = np.random.get_state(), random.getstate(), torch.get_rng_state()
    data.output_sizes([Draw(0, seed=1), 1])
    np.testing.assert_equal(np.random.get_state(), states[0])
    assert random.getstate() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_size_that_cannot_be_known_is_an_error_that_says_what_to_do():
    with pytest.raises(ConfigError, match=r"what CenterCrop does to the size .* method output_size\(height, width\)"):
        shapes(dict(type="CenterCrop", crop_size=(20, 20))).output_sizes([0])
    with pytest.raises(ConfigError, match="NativeResize draws the size of the image after PhotoMetricDistortion .* put Random.* first"):
        shapes(dict(type="PhotoMetricDistortion"), ANY_SIZE).output_sizes([0])


def test_wrappers_lead_to_the_image_that_they_give():
    small, large = shapes(ANY_SIZE), shapes(dict(type="Resize", scale=(300, 200)))
    length = ImageTokens()
    for both, varies in ((ConcatDataset([small, large, small]), True), (RepeatDataset(large, times=2), False)):
        draws = [Draw(index, seed=50 + index) for index in range(len(both))][::-1]
        assert length.varies(both) == varies
        assert length.of_draws(both, draws) == [length.of_size(*loaded(both, draw)) for draw in draws]


def test_a_wrapper_that_drops_the_seed_is_refused_where_it_matters():
    still = ClassBalancedDataset(shapes(), oversample_thr=0.1)
    assert ImageTokens()(still, Draw(0, seed=1)) == ImageTokens().of_size(60, 90)
    with pytest.raises(ConfigError, match="ClassBalancedDataset drops; use a wrapper that keeps it"):
        ImageTokens()(ClassBalancedDataset(shapes(ANY_SIZE), oversample_thr=0.1), Draw(0, seed=1))


def test_annotated_sizes_are_taken_and_no_file_is_read(write_coco, monkeypatch):
    folder = write_coco(lambda content: content["images"][1].update(width=200))
    data = CocoDataset(data_root=str(folder), ann_file="train.json", data_prefix=dict(img="images"), pipeline=[LOAD])
    monkeypatch.setattr("builtins.open", lambda *a, **k: pytest.fail("a file was opened"))
    assert [data.image_size(index) for index in range(3)] == [(48, 64), (48, 200), (48, 64)]


def test_generated_scenes_are_not_drawn_and_files_not_decoded(monkeypatch, tmp_path):
    monkeypatch.setattr(ShapesDataset, "draw", lambda self, scene: pytest.fail("drawn"))
    assert shapes().image_size(2) == (60, 90)
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((5, 9, 3), np.uint8))
    monkeypatch.setattr(LoadImageFromFile, "transform", lambda self, results: pytest.fail("decoded"))
    assert ImageFolder(data_root=str(tmp_path)).image_size(0) == (5, 9)


def test_a_file_without_a_head_is_told_with_its_name(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(BrokenImageError, match=r"cannot read the size of the image .*a\.png"):
        ImageFolder(data_root=str(tmp_path)).image_size(0)


def test_records_without_sizes_and_data_sets_without_the_method_are_told():
    class Plain(ShapesDataset):
        def load_data_list(self):
            return [{key: value for key, value in record.items() if key != "width"} for record in super().load_data_list()]

    with pytest.raises(ConfigError, match="the records of Plain have no `height` and `width`"):
        Plain(num_images=2, pipeline=[LOAD]).image_size(0)
    with pytest.raises(ConfigError, match=r"list does not tell the size of an image .* output_sizes\(indices\)"):
        ImageTokens()([0, 1], 0)


def test_packs_of_drawn_sizes_hold_what_was_planned(monkeypatch):
    """The images of every batch, loaded, have the tokens that were planned from the seeds alone: 12 of 12 images."""
    data = shapes(ANY_SIZE, dict(type="RandomFlip", prob=0.5))
    batches = PackedBatchSampler(DrawSampler(data, seed=4), max_tokens=100, length=dict(type="ImageTokens"))
    for epoch in range(2):
        batches.sampler.set_epoch(epoch)
        for batch in batches:
            tokens = sum(ImageTokens().of_size(*loaded(data, draw)) for draw in batch)
            assert tokens == batches.handed_out.popleft().tokens <= 100


def test_a_length_costs_little():
    """Microseconds a sample, on a machine with much other work: 30 from records, 60 where a size is drawn. Without the generators being
    kept once for all it would be 1000 more."""
    draws = [Draw(index % 6, seed=index) for index in range(300)]
    for transforms in ((), (ANY_SIZE,)):
        data = shapes(*transforms)
        start = time.perf_counter()
        ImageTokens().of_draws(data, draws)
        assert (time.perf_counter() - start) / len(draws) * 1e6 < 500


@pytest.mark.parametrize("wrong", [dict(patch_size=0), dict(merge=0), dict(max_patches=0)], ids=str)
def test_wrong_settings_are_told(wrong):
    with pytest.raises(ConfigError, match="are 1 or more, got"):
        LENGTHS.build(dict(type="ImageTokens", **wrong))
