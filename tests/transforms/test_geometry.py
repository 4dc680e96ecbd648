import numpy as np
import pytest

from visionkit.registry import TRANSFORMS, ConfigError
from visionkit.transforms import RandomCrop, RandomFlip, RandomResizedCrop, RandomShift, Resize, build_pipeline


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


def test_a_shift_is_padding_and_cutting_the_old_size_out():
    before, seen = scene()["img"], set()
    padded = np.pad(before, ((3, 3), (3, 3), (0, 0)), constant_values=9)
    for seed in range(60):
        np.random.seed(seed)
        after = RandomShift(pixels=3, fill=9)(scene())
        assert_in_step(after)
        places = [(y, x) for y in range(7) for x in range(7) if (padded[y:y + 40, x:x + 60] == after["img"]).all()]
        assert len(places) == 1
        seen.update(places)
    assert {y for y, _ in seen} == {x for _, x in seen} == set(range(7))                 # every shift either way, none more


def test_a_shift_drops_what_it_moves_out(monkeypatch):
    monkeypatch.setattr("numpy.random.randint", lambda *_: np.array([25, 0]))
    after = RandomShift(pixels=25)(scene())
    assert after["gt_bboxes"].tolist() == [[5, 20, 31, 36]]
    assert_in_step(after)
    assert (after["img"][:, 35:] == 0).all()
    after = RandomShift(pixels=70)(scene() | {"img": np.ones((40, 10, 3), np.uint8), "gt_bboxes": np.zeros((0, 4), np.float32),
                                              "gt_masks": np.zeros((0, 40, 10), np.uint8), "gt_bboxes_labels": np.arange(0),
                                              "gt_ignore_flags": np.zeros(0, bool)})
    assert (after["img"] == 0).all()                         # wholly moved out


def test_a_resized_crop_takes_boxes_and_masks_along():
    kept = 0
    for seed in range(20):
        np.random.seed(seed)
        after = RandomResizedCrop(size=(90, 70), area=(0.4, 1.0), interpolation="nearest")(scene())
        assert after["img"].shape == (70, 90, 3)
        assert_in_step(after, tolerance=2.5)                 # of the enlarged image
        kept += len(after["gt_bboxes"])
    assert 20 < kept < 60


def test_a_resized_crop_has_the_area_and_the_shape_it_is_asked_for():
    np.random.seed(0)
    crop = RandomResizedCrop(size=8, area=(0.2, 0.6), aspect=(0.5, 2.0))
    windows = np.array([crop.window(90, 100) for _ in range(400)])
    left, top, width, height = windows.T
    assert (left >= 0).all() and (top >= 0).all() and (left + width <= 100).all() and (top + height <= 90).all()  # noqa: PT018
    area, aspect = width * height / 9000, width / height
    assert 0.19 < area.min() < 0.22
    assert 0.5 < area.max() < 0.61
    assert 0.49 < aspect.min() < 0.55
    assert np.median(aspect) == pytest.approx(1, abs=0.1)    # as often upright as wide


def test_a_resized_crop_of_a_strip_takes_the_largest_window_that_fits():
    assert RandomResizedCrop(size=8, area=(1.0, 1.0)).window(10, 200) == (93, 0, 13, 10)
    assert RandomResizedCrop(size=8, area=(1.0, 1.0)).window(200, 12) == (0, 92, 12, 16)


def test_the_usual_transforms_of_mmcv_are_there_by_name():
    pipeline = build_pipeline([dict(type="RandomGrayscale", prob=1.0, keep_channels=True, color_format="rgb"),
                               dict(type="CenterCrop", crop_size=(20, 10)), dict(type="PackSample")])
    results = {key: value for key, value in scene().items() if key != "gt_masks"}
    packed = pipeline(results | {"img": np.arange(7200, dtype=np.uint8).reshape(40, 60, 3)})
    assert packed["inputs"].shape == (3, 10, 20)
    assert (packed["inputs"][0] == packed["inputs"][2]).all()
    assert packed["data_samples"].gt_instances.bboxes.tolist() == [[10, 5, 20, 10]]


@pytest.mark.parametrize("kind, arguments, message", [
    (RandomShift, dict(pixels=-1), "pixels is 0 or more"), (RandomShift, dict(fill=256), "fill lies within"),
    (RandomResizedCrop, dict(size=(0, 4)), "size must be"), (RandomResizedCrop, dict(size=4, area=(0, 1)), "area must be"),
    (RandomResizedCrop, dict(size=4, aspect=(2, 1)), "aspect must be"), (RandomResizedCrop, dict(size=4, min_visible=2), "min_visible"),
    (RandomResizedCrop, dict(size=4, interpolation="best"), "interpolation")])
def test_a_wrong_shift_or_resized_crop_is_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)
