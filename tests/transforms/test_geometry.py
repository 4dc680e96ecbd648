import numpy as np
import pytest

from visionkit.registry import TRANSFORMS, ConfigError
from visionkit.transforms import RandomCrop, RandomFlip, Resize, build_pipeline


def scene(height=40, width=60):
    """An image of three rectangles, with boxes and masks that lie exactly on them."""
    boxes = np.array([[4, 6, 20, 18], [30, 20, 56, 36], [0, 0, 8, 4]], np.float32)
    masks = np.zeros((3, height, width), np.uint8)
    image = np.zeros((height, width, 3), np.uint8)
    for number, (x1, y1, x2, y2) in enumerate(boxes.astype(int)):
        masks[number, y1:y2, x1:x2] = 1
        image[y1:y2, x1:x2] = 80 * (number + 1)
    return {"img": image, "img_shape": (height, width), "ori_shape": (height, width), "gt_bboxes": boxes, "gt_masks": masks,
            "gt_bboxes_labels": np.arange(3), "gt_ignore_flags": np.array([False, False, True])}


def assert_in_step(results, tolerance=0.0):
    """Boxes lie around their masks, and masks on the pixels of their object."""
    for box, mask, label in zip(results["gt_bboxes"], results["gt_masks"], results["gt_bboxes_labels"], strict=True):
        rows, columns = np.nonzero(mask)
        around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert box == pytest.approx(around, abs=tolerance)
        same_color = (results["img"][mask.astype(bool)] == 80 * (label + 1)).mean()
        assert same_color > (0.6 if tolerance else 0.99)     # a resize blends the border
    assert len(results["gt_ignore_flags"]) == len(results["gt_bboxes"])
    assert results["gt_masks"].dtype == np.uint8
    assert results["gt_masks"].shape[1:] == results["img"].shape[:2] == tuple(results["img_shape"])


@pytest.mark.parametrize("direction", ["horizontal", "vertical", "diagonal"])
def test_a_flip_takes_boxes_and_masks_along(direction):
    before = scene()
    after = RandomFlip(prob=1, direction=direction)(scene())
    assert_in_step(after)
    assert (after["img"] != before["img"]).any()
    assert (after["flip"], after["flip_direction"]) == (True, direction)
    assert (RandomFlip(prob=1.0, direction=direction)(after)["img"] == before["img"]).all()


def test_no_flip_changes_nothing():
    after = RandomFlip(prob=0)(scene())
    assert (after["gt_masks"] == scene()["gt_masks"]).all()
    assert after["flip"] is False


def test_several_directions_share_the_probability():
    np.random.seed(0)
    flip = RandomFlip(prob=(0.3, 0.2), direction=("horizontal", "vertical"))
    drawn = [flip(scene())["flip_direction"] for _ in range(300)]
    assert [drawn.count(name) / 300 for name in ("horizontal", "vertical", None)] == pytest.approx([0.3, 0.2, 0.5], abs=0.08)


@pytest.mark.parametrize("arguments, message", [
    (dict(prob=1.5), "between 0 and 1"), (dict(prob=(0.6, 0.6), direction=("horizontal", "vertical")), "sum to 1 at most"),
    (dict(prob=(0.5,), direction=("horizontal", "vertical")), "one probability a direction"), (dict(direction="up"), "got 'up'")])
def test_a_wrong_flip_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomFlip(**arguments)


@pytest.mark.parametrize("scale", [(120, 80), (30, 20), (90, 40)])
def test_a_resize_takes_boxes_and_masks_along(scale):
    results = Resize(scale=scale)(scene())
    assert results["img"].shape == (scale[1], scale[0], 3)
    assert results["gt_bboxes"].dtype == np.float32
    assert_in_step(results, tolerance=1.0)


def test_keeping_the_ratio_fits_the_image_into_the_scale():
    results = Resize(scale=(90, 90), keep_ratio=True)(scene())
    assert results["img_shape"] == (60, 90)
    assert results["scale_factor"] == (1.5, 1.5)
    assert_in_step(results, tolerance=1.0)


def test_two_resizes_keep_the_factor_from_the_original():
    results = Resize(scale=(30, 40))(Resize(scale=(120, 80))(scene()))
    assert results["scale_factor"] == (0.5, 1.0)
    assert results["gt_bboxes"][1].tolist() == pytest.approx([15, 20, 28, 36])


def test_boxes_are_cut_at_the_border_unless_asked_otherwise():
    results = scene() | {"gt_bboxes": np.array([[-10, 4, 70, 20]] * 3, np.float32)}
    assert Resize(scale=(60, 40))(dict(results))["gt_bboxes"][0].tolist() == [0, 4, 60, 20]
    assert Resize(scale=(60, 40), clip_object_border=False)(dict(results))["gt_bboxes"][0].tolist() == [-10, 4, 70, 20]


def test_resizing_an_image_without_objects_keeps_the_shapes():
    empty = {"img": np.zeros((8, 8, 3), np.uint8), "gt_bboxes": np.zeros((0, 4), np.float32), "gt_masks": np.zeros((0, 8, 8), np.uint8)}
    results = RandomFlip(prob=1)(Resize(scale=(4, 6))(empty))
    assert results["gt_bboxes"].shape == (0, 4)
    assert results["gt_masks"].shape == (0, 6, 4)


@pytest.mark.parametrize("arguments, message", [
    (dict(), "either scale"), (dict(scale=(2, 2), scale_factor=2.0), "either scale"),
    (dict(scale=(2, 2), interpolation="linear"), "bilinear.*got 'linear'"), (dict(scale=(2, 2), backend="gpu"), "got 'gpu'")])
def test_a_wrong_resize_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Resize(**arguments)


@pytest.mark.parametrize("transform", [
    dict(type="RandomResize", scale=[(60, 40), (120, 80)], keep_ratio=True), dict(type="RandomChoiceResize", scales=[(30, 20), (90, 60)]),
    dict(type="RandomApply", transforms=[dict(type="RandomFlip", prob=1.0)], prob=1.0),
    dict(type="RandomChoice", transforms=[[dict(type="Resize", scale=(30, 30))], [dict(type="RandomFlip", prob=1.0)]])],
    ids=lambda transform: transform["type"])
def test_mmcvs_wrappers_use_the_transforms_that_carry_masks(transform):
    assert_in_step(build_pipeline([transform])(scene()), tolerance=1.0)


def test_mmcvs_transforms_are_reachable_by_name():
    assert {"Pad", "Normalize", "CenterCrop", "RandomGrayscale", "TestTimeAug"} <= set(TRANSFORMS.names())
    with pytest.raises(ConfigError, match=r"pipeline\[0\]: RandomResize: .*interpolate"):
        build_pipeline([dict(type="RandomResize", scale=(4, 4), ratio_range=(1, 2), interpolate="nearest")])


def test_a_crop_takes_everything_along_and_drops_what_is_hardly_left():
    np.random.seed(1)
    kept = set()
    for _ in range(40):
        results = RandomCrop(size=(32, 24), min_visible=0.3)(scene())
        assert results["img"].shape == (24, 32, 3)
        assert_in_step(results)
        before = scene()["gt_bboxes"][results["gt_bboxes_labels"]]
        area, whole = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (results["gt_bboxes"], before))
        assert (area >= 0.3 * whole).all()
        kept.add(len(area))
    assert len(kept) > 1


def test_an_image_smaller_than_the_crop_keeps_its_size():
    assert RandomCrop(size=(100, 20))(scene())["img"].shape == (20, 60, 3)
    with pytest.raises(ValueError, match="size must be"):
        RandomCrop(size=(0, 4))


def test_random_crop_may_draw_the_size_of_its_window():
    np.random.seed(0)
    sizes = {RandomCrop(size=(100, 20), min_size=(50, 18))(scene())["img"].shape for _ in range(200)}
    assert {height for height, _, _ in sizes} == {18, 19, 20}
    assert {width for _, width, _ in sizes} == set(range(50, 61))              # the image is 60 wide
    assert len(sizes) > 20                                                      # each side for itself
    with pytest.raises(ValueError, match=r"no larger than size=\(8, 8\), got \(4, 9\)"):
        RandomCrop(size=(8, 8), min_size=(4, 9))
