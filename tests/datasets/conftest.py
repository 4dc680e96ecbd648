import json

import cv2
import numpy as np
import pytest


@pytest.fixture
def write_coco(tmp_path):
    """Write a small COCO data set and return its folder; `change` may edit the content before it is written."""
    def write(change=None, *, num_images=3, size=(64, 48)):
        rng = np.random.default_rng(0)
        width, height = size
        content = {
            "images": [{"id": 10 + i, "file_name": f"{i}.jpg", "width": width, "height": height} for i in range(num_images)],
            "annotations": [
                {"id": 1, "image_id": 10, "category_id": 7, "bbox": [4, 5, 20, 10], "area": 150, "iscrowd": 0,
                 "segmentation": [[4, 5, 24, 5, 24, 15, 4, 15]]},
                {"id": 2, "image_id": 10, "category_id": 3, "bbox": [30, 20, 30, 20], "area": 600, "iscrowd": 1,
                 "segmentation": {"size": [height, width], "counts": [0, height * width]}},
                {"id": 3, "image_id": 11, "category_id": 3, "bbox": [1, 2, 8, 9], "iscrowd": 0}],
            "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]}
        if change is not None:
            change(content)
        (tmp_path / "images").mkdir(exist_ok=True)
        for i in range(num_images):
            cv2.imwrite(str(tmp_path / "images" / f"{i}.jpg"), rng.integers(0, 256, (height, width, 3), np.uint8))
        (tmp_path / "train.json").write_text(json.dumps(content))
        return tmp_path
    return write
