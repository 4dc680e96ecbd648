import shutil

import cv2
import numpy as np
import pytest

from visionkit.datasets import CocoDataset, ShapesDataset
from visionkit.datasets.report import report


def read(folder):
    return CocoDataset(data_root=str(folder), ann_file="train.json", data_prefix=dict(img="images"))


def test_counts_of_a_sound_data_set(write_coco):
    found = report(read(write_coco()))
    assert (found.images, found.boxes, found.crowd, found.empty_images) == (3, 2, 1, 1)
    assert found.boxes_per_class == {"cat": 1, "dog": 1}
    assert found.sizes == {"small": 2, "medium": 0, "large": 0}
    assert found.image_sizes == {"64x48": 3}
    assert found.boxes_per_image["100%"] == 1
    assert found.side_quantiles["0%"] == pytest.approx(72 ** 0.5)
    assert found.side_quantiles["100%"] == pytest.approx(200 ** 0.5)
    assert found.findings == {}
    assert "nothing wrong found (every file read)" in str(found)


def test_everything_wrong_is_found_and_named(write_coco):
    def change(content):
        content["images"].append(dict(content["images"][0], id=20))                                     # the same file again
        content["annotations"][0]["bbox"] = [50, 5, 30, 10]                                             # 64 pixels wide
        content["annotations"][2]["bbox"] = [5, 5, 0, 10]
        content["images"][5].update(width=100)

    folder = write_coco(change, num_images=7)
    images = folder / "images"
    shutil.copy(images / "0.jpg", images / "1.jpg")
    (images / "2.jpg").unlink()
    (images / "3.jpg").write_bytes((images / "3.jpg").read_bytes()[:500])
    (images / "4.jpg").write_bytes(b"")
    found = report(read(folder))
    assert {kind: len(lines) for kind, lines in found.findings.items()} == {
        "missing files": 1, "unreadable files": 2, "files of another size than annotated": 1, "files listed more than once": 1,
        "different files with the same content": 1, "boxes outside their image": 1, "boxes without extent": 1}
    assert "2.jpg (image id 12" in found.missing_files[0]
    assert "truncated" in found.unreadable_files[0]
    assert "the file is 64x48, annotated 100x48" in found.wrong_sizes[0]
    assert "image ids 10, 20" in found.duplicate_files[0]
    assert "0.jpg" in found.duplicate_contents[0]
    assert "1.jpg" in found.duplicate_contents[0]
    assert "annotation id 1" in found.boxes_outside[0]
    assert "annotation id 3" in found.boxes_degenerate[0]
    assert "2 unreadable files:\n  " in str(found)


def test_without_decoding_files_are_only_looked_for(write_coco):
    folder = write_coco()
    (folder / "images" / "0.jpg").unlink()
    (folder / "images" / "1.jpg").write_bytes(b"")
    found = report(read(folder), decode=False)
    assert list(found.findings) == ["missing files"]


def test_generated_scenes_have_no_files_to_miss():
    found = report(ShapesDataset(5))
    assert found.images == 5
    assert found.findings == {}


def test_a_picture_turned_by_its_exif_tag_is_of_the_annotated_size_either_way(write_coco):
    cv2_image = np.zeros((48, 64, 3), np.uint8)
    folder = write_coco()
    data = cv2.imencode(".jpg", cv2_image)[1].tobytes()
    exif = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00"
    turned = data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:]
    (folder / "images" / "0.jpg").write_bytes(turned)
    assert report(read(folder)).wrong_sizes == []
