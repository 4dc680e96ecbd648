import cv2
import numpy as np
import pytest
import torch

from visionkit.structures import PanopticMap
from visionkit.visualization import class_color, contact_sheet, draw_instances, draw_panoptic, save_image, side_by_side

GRAY = np.full((480, 640, 3), 120, np.uint8)


def has(image, color):
    return (np.abs(image.astype(int) - color).max(-1) <= 2).any()


def test_a_box_is_drawn_where_it_is_and_the_image_is_not_touched():
    before = GRAY.copy()
    drawn = draw_instances(GRAY, torch.tensor([[100.0, 200.0, 300.0, 400.0]]), torch.tensor([0]), torch.tensor([0.9]), classes=["cat"])
    assert np.array_equal(GRAY, before)
    for row, column in ((400, 150), (300, 100), (300, 300)):
        assert tuple(drawn[row, column]) == class_color(0)
    assert np.array_equal(drawn[250:350, 150:250], GRAY[250:350, 150:250])


def test_the_tag_with_its_name_and_score_lies_over_the_box():
    drawn = draw_instances(GRAY, [[100, 200, 300, 400]], [0], [0.9], classes=["cat"])
    tag = drawn[182:196, 100:160]
    assert has(tag, class_color(0))
    assert has(tag, 255)                                     # white ink
    assert not np.array_equal(drawn, draw_instances(GRAY, [[100, 200, 300, 400]], [0], [0.8], classes=["cat"]))
    assert not np.array_equal(drawn, draw_instances(GRAY, [[100, 200, 300, 400]], [0], [0.9], classes=["dog"]))


def test_every_class_of_coco_has_a_colour_of_its_own():
    colors = [class_color(label) for label in range(80)]
    assert len(set(colors)) == 80
    neighbours = [np.abs(np.subtract(a, b)).sum() for a, b in zip(colors, colors[1:], strict=False)]
    assert min(neighbours) > 100


@pytest.mark.parametrize("size", [(1, 1), (20, 30), (2000, 3000), (10, 2000)])
def test_any_size_of_picture_works(size):
    picture = np.full((*size, 3), 90, np.uint8)
    drawn = draw_instances(picture, [[0, 0, size[1], size[0]], [-50, -50, 1e6, 1e6]], [0, 1], [0.5, 0.6], classes=["cat", "dog"])
    assert max(drawn.shape[:2]) == max(480, *size)
    assert has(drawn, class_color(1))


def test_lines_and_text_grow_with_the_picture():
    def line_width(side):
        drawn = draw_instances(np.full((side, side, 3), 90, np.uint8), [[side // 4, side // 4, side // 2, side // 2]], [0])
        row = drawn[round(side * 0.4), :round(side * 0.3)]   # crosses only the left edge
        return (np.abs(row.astype(int) - class_color(0)).max(-1) < 30).sum()
    assert 2 <= line_width(480) < line_width(1920) < line_width(3840)


def test_a_small_picture_is_enlarged_unless_it_shall_keep_its_size():
    picture = np.full((24, 32, 3), 90, np.uint8)
    assert draw_instances(picture, [], []).shape == (360, 480, 3)
    assert draw_instances(picture, [], [], smallest=0).shape == (24, 32, 3)


def test_nothing_to_draw_gives_the_picture_back():
    assert np.array_equal(draw_instances(GRAY, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0)), GRAY)


def test_boxes_and_labels_must_be_as_many():
    with pytest.raises(ValueError, match="1 boxes, 2 labels and no scores"):
        draw_instances(GRAY, [[0, 0, 9, 9]], [0, 1])
    with pytest.raises(ValueError, match="float64"):
        draw_instances(GRAY / 255, [], [])


def test_a_label_beyond_the_classes_shows_its_number():
    assert draw_instances(GRAY, [[0, 0, 9, 9]], [7], classes=["cat"]).shape == GRAY.shape


def test_masks_tint_their_pixels_only():
    mask = np.zeros((1, 480, 640), bool)
    mask[0, 250:260, 150:160] = True
    drawn = draw_instances(GRAY, [[100, 200, 300, 400]], [0], masks=torch.from_numpy(mask))
    assert tuple(drawn[255, 155]) == tuple((0.55 * 120 + 0.45 * np.array(class_color(0))).astype(np.uint8))
    assert tuple(drawn[255, 165]) == (120, 120, 120)


def panoptic(*regions):
    """A map of 480 x 640 with things of the label 1 in `regions`, (top, bottom, left, right), on stuff of the label 0; the first row
    is void."""
    masks = np.zeros((len(regions) + 1, 480, 640), bool)
    masks[0, 1:] = True
    for mask, (top, bottom, left, right) in zip(masks[1:], regions, strict=True):
        mask[top:bottom, left:right] = True
    return PanopticMap.of_layers(masks, [0] + [1] * len(regions), (False, True), size=(480, 640))


def test_segments_are_tinted_by_class_edged_and_named_where_the_name_fits():
    drawn = draw_panoptic(GRAY, panoptic((100, 300, 100, 400), (400, 410, 500, 520)), classes=("sky", "cat"))
    half = (np.array(class_color(0)) + 120) / 2
    np.testing.assert_allclose(drawn[450, 50], half, atol=1.5)
    assert (drawn[100, 150:350] == 255).all()                # the edge
    assert has(drawn[105:295, 105:395], class_color(1))      # the tag of the large thing, in the full colour
    assert not has(drawn[398:412, 498:522], class_color(1))  # none of the small one
    assert has(drawn, class_color(0))
    np.testing.assert_allclose(drawn[0, 5], 60, atol=1)      # void
    assert not np.array_equal(drawn, draw_panoptic(GRAY, panoptic((100, 300, 100, 400), (400, 410, 500, 520)), classes=("sky", "dog")))


def test_neighbours_of_one_class_differ():
    drawn = draw_panoptic(GRAY, panoptic((100, 200, 100, 200), (100, 200, 200, 290)), classes=("sky", "a long name that fits nowhere"))
    assert np.abs(drawn[120, 120].astype(int) - drawn[120, 280]).max() > 20


def test_a_map_of_another_size_than_the_picture_is_refused():
    with pytest.raises(ValueError, match=r"\[480, 640\] pixels does not lie on an image of \[10, 10\]"):
        draw_panoptic(GRAY[:10, :10], panoptic())


def test_an_ignored_region_is_grey():
    drawn = draw_instances(GRAY, [[100, 200, 300, 400]], [0], ignored=[True])
    assert tuple(drawn[300, 100]) == (160, 160, 160)
    assert not has(drawn, class_color(0))


def test_tags_of_boxes_in_one_place_do_not_cover_each_other():
    drawn = draw_instances(GRAY, [[200, 200, 400, 400], [200, 200, 400, 400]], [0, 1], [0.9, 0.8], classes=["first", "second"])
    for label in (0, 1):
        found = np.abs(drawn.astype(int) - class_color(label)).max(-1) == 0
        assert found[:, 202:398].sum(1).max() > 40           # a whole tag, wider than a line's edge
    assert has(drawn[180:198, 200:260], class_color(0))      # the surest has the best place


def test_a_sheet_has_rows_and_columns_of_pictures():
    pictures = [np.full((100, 100, 3), value, np.uint8) for value in (50, 100, 150, 200, 250)]
    sheet = contact_sheet(pictures, columns=3, cell=100, gap=10)
    assert sheet.shape == (230, 340, 3)
    assert [sheet[60, 60 + 110 * column, 0] for column in range(3)] == [50, 100, 150]
    assert [sheet[170, 60 + 110 * column, 0] for column in range(3)] == [200, 250, 32]


def test_captions_stand_over_their_pictures_and_long_ones_are_cut():
    pictures = [np.full((100, 200, 3), 90, np.uint8)] * 2
    sheet = contact_sheet(pictures, captions=["short", "a caption that is much too long for so narrow a picture " * 3], cell=200)
    plain = contact_sheet(pictures, cell=200)
    assert sheet.shape[0] > plain.shape[0]
    assert has(sheet[:, :200], 235)
    assert not has(sheet[:, 206:216], 235)                   # the gap before the second picture stays free
    assert not has(sheet[:, -8:], 235)


def test_a_sheet_refuses_nothing_and_captions_of_another_number():
    with pytest.raises(ValueError, match="0 pictures"):
        contact_sheet([])
    with pytest.raises(ValueError, match="1 pictures, 2 captions"):
        contact_sheet([GRAY], captions=["a", "b"])


def test_truth_stands_left_of_the_prediction():
    pair = side_by_side(np.full((100, 100, 3), 40, np.uint8), np.full((100, 100, 3), 200, np.uint8))
    row = pair[pair.shape[0] // 2, :, 0]
    assert list(row).index(40) < list(row).index(200)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_saved_picture_comes_back_in_its_colours(tmp_path, suffix):
    picture = np.full((64, 64, 3), (250, 20, 60), np.uint8)
    path = save_image(picture, tmp_path / "new" / f"picture{suffix}")
    read = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    assert np.abs(read.astype(int) - picture).max() <= 3
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.png or \.jpg"):
        save_image(GRAY, tmp_path / "picture.tga")
