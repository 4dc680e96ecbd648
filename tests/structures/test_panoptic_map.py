import cv2
import numpy as np
import pytest

from visionkit.structures import PanopticMap, Sample, Segment
from visionkit.structures.panoptic_map import areas_of, boxes_of, decode_png, encode_png, ids_to_rgb, rgb_to_ids

IDS = np.array([[0, 7, 7], [300, 300, 7]], np.int32)
CUP, SKY = Segment(7, 0, True, 3), Segment(300, 2, False, 2)


def test_an_id_is_r_plus_256_g_plus_65536_b():
    assert rgb_to_ids(np.uint8([[[1, 2, 3], [255, 255, 255]]])).tolist() == [[1 + 2 * 256 + 3 * 65536, 2**24 - 1]]
    ids = np.random.default_rng(0).integers(0, 2**24, (5, 7)).astype(np.int32)
    assert np.array_equal(rgb_to_ids(ids_to_rgb(ids)), ids)


def test_a_png_keeps_every_id_in_the_order_that_other_readers_expect():
    ids = np.random.default_rng(0).integers(0, 2**24, (9, 11)).astype(np.int32)
    assert np.array_equal(decode_png(encode_png(ids)), ids)
    blue, green, red = cv2.imdecode(np.frombuffer(encode_png(np.int32([[1 + 2 * 256 + 3 * 65536]])), np.uint8), cv2.IMREAD_COLOR)[0, 0]
    assert (red, green, blue) == (1, 2, 3)


def test_what_is_no_panoptic_png_is_refused():
    whole = encode_png(IDS)
    with pytest.raises(ValueError, match="truncated"):
        decode_png(whole[:-20])
    with pytest.raises(ValueError, match="is a PNG file, but the content starts with b'RIFF"):
        decode_png(b"RIFF" + whole)
    with pytest.raises(ValueError, match=r"three colours of 8 bits, got uint8 \[2, 3\]"):
        decode_png(cv2.imencode(".png", IDS.astype(np.uint8))[1].tobytes())


@pytest.mark.parametrize("ids, segments, message", [
    (IDS, (CUP,), r"segments that nobody describes: \[300\]"),
    (IDS, (CUP, SKY, Segment(9, 0, True, 0)), "segment 9 is said to have 0 pixels"),
    (IDS, (CUP, Segment(300, 2, False, 5)), "segment 300 is said to have 5 pixels and has 2"),
    (IDS, (CUP, CUP, SKY), "segment 7 is described 2 times"),
    (IDS, (CUP, SKY, Segment(0, 0, True, 1)), "within 1 and 16777215"),
    (IDS.astype(np.int64), (CUP, SKY), "int32"),
    (IDS[0], (CUP, SKY), r"\[3\]"),
], ids=["not described", "without pixels", "wrong area", "twice", "void", "type", "shape"])
def test_a_map_that_breaks_its_law_is_refused(ids, segments, message):
    PanopticMap(IDS, (CUP, SKY))
    with pytest.raises(ValueError, match=message):
        PanopticMap(ids, segments)


def test_masks_and_boxes_come_in_the_order_of_the_segments():
    masks = PanopticMap(IDS, (SKY, CUP)).masks()
    assert masks.dtype == bool
    assert masks.astype(int).tolist() == [[[0, 0, 0], [1, 1, 0]], [[0, 1, 1], [0, 0, 1]]]
    assert boxes_of(masks).tolist() == [[0, 1, 2, 2], [1, 0, 3, 2]]
    assert PanopticMap(np.zeros((2, 3), np.int32), ()).masks().shape == (0, 2, 3)
    assert boxes_of(np.zeros((1, 2, 3), bool)).tolist() == [[0, 0, 0, 0]]


def test_areas_are_numpy_s():
    ids = np.random.default_rng(0).integers(0, 4, (40, 50)).repeat(3, 1)
    values, counts = np.unique(ids, return_counts=True)
    assert areas_of(ids) == dict(zip(values.tolist(), counts.tolist(), strict=True))


def test_coco_s_form_comes_back_and_categories_that_are_not_wanted_become_void():
    info = [{"id": 7, "category_id": 40, "iscrowd": 1, "area": 99, "bbox": []}, {"id": 300, "category_id": 180, "area": 2, "bbox": []}]
    both = PanopticMap.from_coco(IDS, info, {40: 1, 180: 0}, (False, True))
    assert both.segments == (Segment(7, 1, True, 3, True), Segment(300, 0, False, 2))
    assert both.to_coco((180, 40))[0] == {"id": 7, "category_id": 40, "iscrowd": 1, "area": 3, "bbox": [1, 0, 2, 2]}
    one = PanopticMap.from_coco(IDS, info, {40: 0}, (True,))
    assert one.ids.tolist() == [[0, 7, 7], [0, 0, 7]]
    assert len(one.segments) == 1


def test_smaller_masks_lie_on_larger_ones_and_the_background_under_all():
    small, large = np.zeros((2, 4, 4), bool)
    small[1:3, 1:3], large[:, :3] = True, True
    under = PanopticMap.of_layers([small, large], (0, 0), (True, False), size=(4, 4), iscrowd=(False, True), background=1)
    assert under.segments == (Segment(1, 0, True, 4), Segment(2, 0, True, 8, True), Segment(3, 1, False, 4))
    covered = PanopticMap.of_layers([large, large], (0, 0), (True,), size=(4, 4))
    assert [segment.area for segment in covered.segments] == [12]                          # of two equal masks one is seen
    assert PanopticMap.of_layers([], (), (False,), size=(4, 4), background=0).segments == (Segment(1, 0, False, 16),)


def test_a_sample_holds_only_a_map():
    sample = Sample()
    sample.pred_panoptic = PanopticMap(IDS, (CUP, SKY))
    assert sample.to("cpu").pred_panoptic.segments == (CUP, SKY)
    with pytest.raises(AssertionError):
        sample.pred_panoptic = IDS
