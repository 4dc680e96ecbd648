import cv2
import numpy as np
import pytest

from visionkit.transforms import PhotoMetricDistortion
from visionkit.transforms.color import change_color, shift_and_scale

PICTURE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def test_brightness_and_contrast_are_cut_at_the_ends():
    image = np.array([[[0, 100, 250]]], np.uint8)
    assert shift_and_scale(image, 10, 1.0).tolist() == [[[10, 110, 255]]]
    assert shift_and_scale(image, -20, 2.0).tolist() == [[[0, 160, 255]]]


def test_a_third_of_a_circle_turns_red_to_green_to_blue():
    red = np.array([[[255, 0, 0]]], np.uint8)
    green = change_color(red, 1.0, 120)
    assert np.abs(green.astype(int) - [0, 255, 0]).max() <= 6
    assert np.abs(change_color(red, 1.0, -120).astype(int) - [0, 0, 255]).max() <= 6


def test_no_saturation_is_grey():
    grey = change_color(PICTURE, 0.0, 0)
    assert np.ptp(grey, axis=-1).max() == 0


def test_a_colour_that_is_not_changed_stays():
    assert change_color(PICTURE, 1.0, 0) is PICTURE
    assert shift_and_scale(PICTURE, 0, 1.0) is PICTURE


def test_the_distortion_follows_numpys_seed_and_leaves_its_input():
    distort = PhotoMetricDistortion()
    before = PICTURE.copy()
    results = []
    for seed in (3, 3, 4):
        np.random.seed(seed)
        results.append(distort({"img": PICTURE})["img"])
    assert (results[0] == results[1]).all()
    assert (results[0] != results[2]).any()
    assert (before == PICTURE).all()
    assert all(result.dtype == np.uint8 and result.shape == PICTURE.shape for result in results)


def test_each_change_happens_half_of_the_time_and_all_at_once_with_prob():
    distort = PhotoMetricDistortion(contrast_range=(1, 1), saturation_range=(1, 1), hue_delta=0)
    changed = np.mean([(distort({"img": PICTURE})["img"] != PICTURE).any() for _ in range(300)])
    assert changed == pytest.approx(0.5, abs=0.1)
    assert not any((PhotoMetricDistortion(prob=0)({"img": PICTURE})["img"] != PICTURE).any() for _ in range(30))


def test_saturation_and_hue_are_drawn_from_their_ranges():
    grey = PhotoMetricDistortion(brightness_delta=0, contrast_range=(1, 1), saturation_range=(0, 0), hue_delta=0)
    assert np.mean([np.ptp(grey({"img": PICTURE})["img"], axis=-1).max() == 0 for _ in range(200)]) == pytest.approx(0.5, abs=0.12)
    red = np.full((1, 1, 3), (200, 0, 0), np.uint8)
    turned = PhotoMetricDistortion(brightness_delta=0, contrast_range=(1, 1), saturation_range=(1, 1), hue_delta=60)
    colors = np.array([turned({"img": red})["img"][0, 0] for _ in range(200)])
    assert colors[:, 0].min() > 190                          # up to yellow and magenta, red stays
    assert colors[:, 1].max() > 100
    assert colors[:, 2].max() > 100


def test_the_draws_consumed_do_not_depend_on_what_is_applied():
    states = set()
    for prob in (0.0, 1.0):
        np.random.seed(0)
        PhotoMetricDistortion(prob=prob)({"img": PICTURE})
        states.add(np.random.rand())
    assert len(states) == 1


@pytest.mark.parametrize("arguments, message", [(dict(contrast_range=(2, 1)), "contrast_range"), (dict(hue_delta=400), "hue_delta=400"),
                                                    (dict(prob=2), "prob=2")])
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PhotoMetricDistortion(**arguments)


def test_hue_wraps_around_the_circle():
    once = change_color(cv2.GaussianBlur(PICTURE, (5, 5), 2), 1.0, 90)
    back = change_color(once, 1.0, -90)
    assert np.abs(back.astype(int) - cv2.GaussianBlur(PICTURE, (5, 5), 2)).mean() < 4
