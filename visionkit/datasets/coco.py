"""Data sets annotated in COCO's JSON format."""
from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

from visionkit.datasets.detection import DetectionDataset, check_classes
from visionkit.datasets.roots import require
from visionkit.registry import DATASETS, ConfigError

NEEDED = {"images": ("id", "file_name", "width", "height"), "annotations": ("image_id", "category_id"), "categories": ("id", "name")}


@DATASETS.register_module()
class CocoDataset(DetectionDataset):
    """Any data set in COCO's JSON format (Lin et al. 2014, arXiv:1405.0312).

    `metainfo=dict(classes=...)` chooses categories by name, in the order of their labels; without it all, by their id. Objects of
    other categories are left out; images without objects stay unless `filter_cfg=dict(filter_empty_gt=True)`.

    Tolerated, with a warning that counts them: annotations of images that the file does not list, an annotation id or the
    same image listed twice, boxes that reach outside their image or have no extent. Boxes stay as the file has them, for the
    metric to compare with; transforms cut them at the border, and `PackSample` leaves out those without extent.

    Raises:
        ConfigError: no such file, not COCO's format, a class that it does not have, or one image id for two files.
    """

    def load_data_list(self) -> list[dict[str, Any]]:
        content = read_coco(require(self.ann_file, "annotation file", asked=self.asked_ann_file, key="ann_file"))
        labels = self._labels(content["categories"])
        known = {category["id"] for category in content["categories"]}
        records = self._records(content["images"])
        seen: set[Any] = set()
        odd: Counter[str] = Counter()
        for annotation in content["annotations"]:
            record = records.get(annotation["image_id"])
            if annotation["category_id"] not in known:
                raise ConfigError(f"annotation {annotation.get('id')} of {self.ann_file} has category_id {annotation['category_id']!r}, "
                                  f"which its categories do not list", ("ann_file",))
            odd["annotations of images that it does not list"] += record is None
            odd["annotation ids that stand twice"] += annotation.get("id") in seen
            seen.add(annotation.get("id"))
            if record is not None and annotation["category_id"] in labels:
                instance = self._instance(annotation, labels[annotation["category_id"]])
                odd["boxes that reach outside their image or have no extent"] += not _inside(instance["bbox"], record)
                record["instances"].append(instance)
        for what, count in odd.items():
            if count:
                self._log(f"{self.ann_file} has {count} {what}", logging.WARNING)
        return list(records.values())

    def _labels(self, categories: list[Mapping[str, Any]]) -> dict[Any, int]:
        """Category id to label, for the chosen classes, which it also writes into the meta information."""
        categories = sorted(categories, key=lambda category: category["id"])
        names = [category["name"] for category in categories]
        classes = tuple(self._metainfo.get("classes", names))
        ambiguous = [name for name in classes if names.count(name) > 1]
        if ambiguous:
            raise ConfigError(f"{self.ann_file} has more than one category called {ambiguous[0]!r}", ("ann_file",))
        check_classes(classes, names, self.ann_file)
        ids = {category["name"]: category["id"] for category in categories}
        self._metainfo.update(classes=classes, category_ids=tuple(ids[name] for name in classes))
        return {ids[name]: label for label, name in enumerate(classes)}

    def _records(self, images: list[Mapping[str, Any]]) -> dict[Any, dict[str, Any]]:
        records: dict[Any, dict[str, Any]] = {}
        for image in images:
            path = os.path.join(self.data_prefix["img"], image["file_name"])
            twin = records.setdefault(image["id"], {"img_id": image["id"], "img_path": path, "height": image["height"],
                                                    "width": image["width"], "instances": []})
            if twin["img_path"] != path:
                raise ConfigError(f"{self.ann_file} gives the image id {image['id']} to two files, {twin['img_path']} and {path}",
                                  ("ann_file",))
        if len(records) < len(images):
            self._log(f"{self.ann_file} lists {len(images) - len(records)} images twice", logging.WARNING)
        return records

    def _instance(self, annotation: Mapping[str, Any], label: int) -> dict[str, Any]:
        segmentation = annotation.get("segmentation")
        if "bbox" not in annotation:
            raise ConfigError(f"annotation {annotation.get('id')} of {self.ann_file} has no `bbox`", ("ann_file",))
        x, y, width, height = map(float, annotation["bbox"])
        if not all(map(math.isfinite, (x, y, width, height))):
            raise ConfigError(f"annotation {annotation.get('id')} of {self.ann_file} has a `bbox` that is not finite: {annotation['bbox']}",
                              ("ann_file",))
        instance = {"bbox": [x, y, x + width, y + height], "bbox_label": label, "ignore_flag": int(annotation.get("iscrowd", 0)),
                    "area": annotation.get("area", width * height), "id": annotation.get("id")}
        if segmentation:
            instance["mask"] = segmentation
        return instance


def _inside(box: list[float], record: Mapping[str, Any]) -> bool:
    slack = 1                                                # rounding of the tools that draw boxes
    return (-slack <= box[0] < box[2] <= record["width"] + slack) and (-slack <= box[1] < box[3] <= record["height"] + slack)


def read_coco(file: str, needed: Mapping[str, tuple[str, ...]] = NEEDED) -> dict[str, list[dict[str, Any]]]:
    """`images`, `annotations` (none in a file for testing only) and `categories` of a COCO JSON file.

    Args:
        file: its path.
        needed: the keys that every entry of each part must have.

    Raises:
        ConfigError: the file is no JSON, or lacks something of the format; says what.
    """
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}", ("ann_file",)) from error
    if not isinstance(content, dict) or "images" not in content or "categories" not in content:
        has = (", ".join(content) or "nothing") if isinstance(content, dict) else type(content).__name__
        raise ConfigError(f"{file} is not in COCO's format: wanted `images`, `annotations` and `categories`, found {has}", ("ann_file",))
    content.setdefault("annotations", [])
    for part, keys in needed.items():
        for index, entry in enumerate(content[part]):
            absent = [key for key in keys if key not in entry]
            if absent:
                raise ConfigError(f"{part}[{index}] of {file} has no {', '.join(map(repr, absent))}", ("ann_file",))
    return content
