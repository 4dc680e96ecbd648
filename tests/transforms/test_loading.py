import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from visionkit.transforms import BrokenImageError, LoadAnnotations, LoadImageFromFile, decode_image, read_size
from visionkit.transforms.loading import decode_mask, missing_end

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
EXIF_TURN = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00"   # 90 degrees


def encode(suffix, image=PICTURE, options=()):
    return cv2.imencode(suffix, image, list(options))[1].tobytes()


def with_segment(jpeg, payload):
    """A JPEG with an APP1 segment, where EXIF data lies."""
    return jpeg[:2] + b"\xff\xe1" + (len(payload) + 2).to_bytes(2, "big") + payload + jpeg[2:]


def test_an_image_is_loaded_as_rgb_with_its_shape(tmp_path):
    path = tmp_path / "blue.png"
    cv2.imwrite(str(path), np.full((4, 6, 3), (255, 0, 10), np.uint8))
    results = LoadImageFromFile()({"img_path": str(path)})
    assert results["img"][0, 0].tolist() == [10, 0, 255]
    assert results["img"].dtype == np.uint8
    assert results["img_shape"] == results["ori_shape"] == (4, 6)


@pytest.mark.parametrize("image", [PICTURE[..., 0], np.dstack([PICTURE, PICTURE[..., :1]]), PICTURE[..., 0].astype(np.uint16) * 256],
                         ids=["grey", "with alpha", "16 bits"])
def test_every_picture_becomes_three_channels_of_8_bits(image):
    decoded = decode_image(encode(".png", image))
    assert decoded.shape == (40, 60, 3)
    assert decoded.dtype == np.uint8


def test_a_picture_in_memory_is_kept():
    results = LoadImageFromFile()({"img": PICTURE, "img_path": "nowhere.png"})
    assert results["img"] is PICTURE
    assert results["ori_shape"] == (40, 60)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tif"])
def test_the_head_of_a_file_tells_the_size_that_decoding_gives(tmp_path, suffix):
    path = tmp_path / f"picture{suffix}"
    path.write_bytes(encode(suffix))
    assert read_size(str(path)) == decode_image(path.read_bytes()).shape[:2] == (40, 60)


def test_the_head_of_a_picture_on_its_side_tells_its_upright_size(tmp_path):
    path = tmp_path / "turned.jpg"
    path.write_bytes(with_segment(encode(".jpg"), EXIF_TURN))
    assert read_size(str(path)) == decode_image(path.read_bytes()).shape[:2] == (60, 40)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_a_truncated_file_is_refused_at_any_place(suffix, part):
    data = encode(suffix)
    decode_image(data)
    with pytest.raises(ValueError, match="truncated|not an image"):
        decode_image(data[: int(len(data) * part)])


def test_a_progressive_jpeg_is_refused_when_truncated_between_its_scans():
    data = encode(".jpg", options=(cv2.IMWRITE_JPEG_PROGRESSIVE, 1))
    assert decode_image(data).shape == (40, 60, 3)
    scans = [i for i in range(len(data) - 1) if data[i:i + 2] == b"\xff\xda"]
    assert len(scans) > 2
    assert missing_end(data[:scans[2]]) == "no end-of-image marker"


def test_the_thumbnail_of_a_truncated_photograph_does_not_hide_the_truncation():
    thumbnail = encode(".jpg", PICTURE[:8, :8])
    data = with_segment(encode(".jpg"), b"Exif\x00\x00" + thumbnail)
    assert missing_end(data) == ""
    assert missing_end(data[:-200]) == "no end-of-image marker"


def test_bytes_after_the_end_of_a_picture_do_no_harm():
    assert decode_image(encode(".jpg") + b"\0" * 100).shape == (40, 60, 3)
    assert decode_image(encode(".png") + b"\0" * 100).shape == (40, 60, 3)


@pytest.mark.parametrize("content, reason", [
    (None, "the file does not exist"), (b"", "the file is empty"), (b"<html>not found", "not an image that OpenCV can decode"),
    (encode(".jpg")[:900], "the file is truncated: no end-of-image marker after 900 bytes")])
def test_a_broken_image_is_named_with_file_and_ids_and_reason(tmp_path, content, reason):
    path = tmp_path / "photo.jpg"
    if content is not None:
        path.write_bytes(content)
    record = {"img_path": str(path), "img_id": 7, "instances": [{"id": i} for i in range(12, 22)]}
    with pytest.raises(BrokenImageError) as caught:
        LoadImageFromFile()(record)
    assert str(caught.value).startswith(f"cannot read the image {path} (image id 7, annotation ids 12, 13, 14, 15, 16, 17, 18, 19 "
                                        f"and 2 more): ")
    assert reason in str(caught.value)


def test_a_picture_is_turned_by_its_exif_tag_unless_the_annotations_are_not():
    data = with_segment(encode(".jpg"), EXIF_TURN)
    assert decode_image(data).shape == (60, 40, 3)
    assert decode_image(data, size=(60, 40)).shape == (60, 40, 3)
    assert decode_image(data, size=(40, 60)).shape == (40, 60, 3)
    assert decode_image(data, size=(1, 2)).shape == (60, 40, 3)               # neither: as OpenCV does it


def instance(**fields):
    return {"bbox": [1.0, 2.0, 5.0, 6.0], "bbox_label": 3, "ignore_flag": 0, "id": 1, **fields}


def test_annotations_become_arrays_of_fixed_types():
    results = LoadAnnotations()({"instances": [instance(), instance(ignore_flag=1, bbox_label=0)]})
    assert results["gt_bboxes"].dtype == np.float32
    assert results["gt_bboxes"].tolist() == [[1, 2, 5, 6]] * 2
    assert results["gt_bboxes_labels"].tolist() == [3, 0]
    assert results["gt_bboxes_labels"].dtype == np.int64
    assert results["gt_ignore_flags"].tolist() == [False, True]


def test_an_image_without_objects_has_arrays_of_length_0():
    results = LoadAnnotations(with_mask=True)({"instances": [], "ori_shape": (4, 6)})
    assert results["gt_bboxes"].shape == (0, 4)
    assert results["gt_bboxes_labels"].shape == results["gt_ignore_flags"].shape == (0,)
    assert results["gt_masks"].shape == (0, 4, 6)


def test_polygons_and_both_kinds_of_run_lengths_give_the_same_mask():
    expected = np.zeros((8, 10), np.uint8)
    expected[2:6, 3:9] = 1
    polygon = [[3, 2, 9, 2, 9, 6, 3, 6]]
    compressed = coco_mask.encode(np.asfortranarray(expected))
    columns = expected.T.reshape(-1)
    edges = np.flatnonzero(np.diff(columns)) + 1
    counts = np.diff([0, *edges, columns.size]).tolist()
    assert (decode_mask(polygon, 8, 10) == expected).all()
    assert (decode_mask({"size": [8, 10], "counts": compressed["counts"].decode()}, 8, 10) == expected).all()
    assert (decode_mask({"size": [8, 10], "counts": counts}, 8, 10) == expected).all()


def test_parts_of_a_polygon_are_joined_and_points_and_lines_are_empty():
    assert decode_mask([[0, 0, 2, 0, 2, 2, 0, 2], [4, 4, 6, 4, 6, 6, 4, 6]], 8, 8).sum() == 8
    assert decode_mask([[0, 0, 5, 5]], 8, 8).sum() == 0
    assert decode_mask([], 8, 8).shape == (8, 8)


def test_a_mask_of_another_image_is_refused():
    with pytest.raises(ValueError, match=r"a mask of \(4, 4\) pixels does not lie on an image of \(8, 8\)"):
        decode_mask(coco_mask.encode(np.zeros((4, 4), np.uint8, "F")), 8, 8)
    wrong = instance(mask=coco_mask.encode(np.zeros((4, 4), np.uint8, "F")))
    with pytest.raises(ValueError, match="annotation 1 of a.jpg: a mask of"):
        LoadAnnotations(with_mask=True)({"instances": [wrong], "ori_shape": (8, 8), "img_path": "a.jpg"})


def test_asking_for_masks_that_are_not_there_is_an_error():
    with pytest.raises(ValueError, match="annotation 1 of a.jpg has none; set with_mask=False"):
        LoadAnnotations(with_mask=True)({"instances": [instance()], "ori_shape": (4, 6), "img_path": "a.jpg"})


def test_a_picture_of_another_size_than_its_annotations_say_is_told_once(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encode(".png"))
    told = []
    monkeypatch.setattr("visionkit.transforms.loading.print_log", lambda message, *_: told.append(message))
    load = LoadImageFromFile()
    for _ in range(2):
        load({"img_path": str(tmp_path / "a.png"), "img_id": 7, "height": 80, "width": 120, "instances": []})
    (message,) = told
    assert "a.png (image id 7, no annotations) is 60x40 pixels, its annotations say 120x80" in message
