"""Each check is seen to pass on a sound transform and to fail on one that breaks exactly that promise."""
import random

import numpy as np
import pytest

from visionkit.testing import check_transform, example_results


class RandomMirror:
    """Mirrors left and right, half of the time."""

    def __call__(self, results):
        if random.random() < 0.5:
            width = results["img"].shape[1]
            results["img"] = results["img"][:, ::-1].copy()
            results["gt_bboxes"] = results["gt_bboxes"].copy()
            results["gt_bboxes"][:, [0, 2]] = width - results["gt_bboxes"][:, [2, 0]]
            if "gt_masks" in results:
                results["gt_masks"] = results["gt_masks"][:, :, ::-1].copy()
        return results


class CropRight:
    """Keeps the left 40 columns and what lies in them."""
    keep = ("gt_bboxes", "gt_bboxes_labels", "gt_ignore_flags", "gt_masks")

    def __call__(self, results):
        results["img"] = results["img"][:, :40]
        results["img_shape"] = results["img"].shape[:2]
        boxes = results["gt_bboxes"].clip(max=np.float32(40))
        kept = boxes[:, 2] > boxes[:, 0]
        results["gt_bboxes"] = boxes
        results["gt_masks"] = results["gt_masks"][:, :, :40]
        for key in self.keep:
            results[key] = results[key][kept]
        return results


class Drops:
    def __call__(self, results):
        return None


class ForgetsMasks(RandomMirror):
    def __call__(self, results):
        masks = results["gt_masks"]
        results = super().__call__(results)
        results["gt_masks"] = masks
        return results


class ForgetsLabels(CropRight):
    keep = ("gt_bboxes", "gt_masks", "gt_ignore_flags")


class ForgetsToCropMasks(CropRight):
    def __call__(self, results):
        results = super().__call__(results)
        results["gt_masks"] = np.pad(results["gt_masks"], ((0, 0), (0, 0), (0, 24)))
        return results


class ForgetsShape(CropRight):
    def __call__(self, results):
        shape = results["img_shape"]
        return {**super().__call__(results), "img_shape": shape}


class ForgetsToClip:
    def __call__(self, results):
        results["gt_bboxes"] = results["gt_bboxes"] + np.float32(20)
        results.pop("gt_masks")
        return {**results, "gt_masks": np.zeros((len(results["gt_bboxes"]), *results["img_shape"]), np.uint8)}


class SwapsCorners:
    def __call__(self, results):
        results["gt_bboxes"] = results["gt_bboxes"][:, [2, 1, 0, 3]]
        return results


class OwnRandomness:
    def __call__(self, results):
        results["img"] = np.random.default_rng().permutation(results["img"])
        return results


class Counts:
    def __init__(self):
        self.calls = 0

    def __call__(self, results):
        self.calls += 1
        results["calls"] = self.calls
        return results


class LosesKey:
    def __call__(self, results):
        return {key: value for key, value in results.items() if key != "img_id"}


class DoubleBoxes:
    def __call__(self, results):
        results["gt_bboxes"] = results["gt_bboxes"].astype(np.float64)
        return results


class FloatImage:
    def __call__(self, results):
        results["img"] = results["img"] / 255
        return results


class FlatImage:
    def __call__(self, results):
        results["img"] = results["img"][..., 0]
        return results


class InventsLabels:
    def __call__(self, results):
        results["gt_bboxes_labels"] = results["gt_bboxes_labels"] + 100
        return results


class NeedsInstances:
    def __call__(self, results):
        results["gt_bboxes"].max(axis=0)
        return results


class NotPicklable:
    def __init__(self):
        self.draw = lambda: 0

    def __call__(self, results):
        return results


class ReturnsImage:
    def __call__(self, results):
        return results["img"]


@pytest.mark.parametrize("sound", [RandomMirror, CropRight, Drops])
def test_a_sound_transform_passes(sound):
    check_transform(sound())


def test_results_of_ones_own_pass_too_and_are_not_changed():
    results = example_results(num_instances=2)
    results.pop("gt_masks")
    boxes = results["gt_bboxes"].copy()
    check_transform(RandomMirror(), results)
    assert (results["gt_bboxes"] == boxes).all()


@pytest.mark.parametrize("broken, message", [
    (ForgetsMasks, "has its mask at"),
    (ForgetsLabels, "out of step"),
    (ForgetsToCropMasks, "masks are uint8"),
    (ForgetsShape, "says img_shape"),
    (ForgetsToClip, "outside of the 48x64 image"),
    (SwapsCorners, "x2 < x1"),
    (OwnRandomness, "two results for seed 0"),
    (Counts, "two results for seed 0"),
    (LosesKey, "drops 'img_id'"),
    (DoubleBoxes, r"must be float32 \[N, 4\], got float64"),
    (FloatImage, "uint8 image into float64"),
    (FlatImage, "must stay an array"),
    (InventsLabels, "invents the labels"),
    (NeedsInstances, "fails on an image without instances"),
    (NotPicklable, "cannot be sent to a data-loader worker"),
    (ReturnsImage, "must return the results dict"),
], ids=lambda value: value.__name__ if isinstance(value, type) else "")
def test_a_broken_promise_is_named(broken, message):
    with pytest.raises(AssertionError, match=message):
        check_transform(broken())


def test_example_results_differ_by_seed_and_keep_their_own_contract():
    check_transform(RandomMirror(), example_results(size=(32, 40), num_instances=6, seed=3))
    assert not np.array_equal(example_results(seed=0)["img"], example_results(seed=1)["img"])
    assert len(example_results(num_instances=0)["gt_bboxes"]) == 0
