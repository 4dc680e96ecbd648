"""Data sets annotated in Pascal VOC's XML format."""
from __future__ import annotations

import logging
import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from typing import Any

from visionkit.datasets.detection import DetectionDataset
from visionkit.datasets.roots import require
from visionkit.registry import DATASETS, ConfigError, did_you_mean

CLASSES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
           "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")


@DATASETS.register_module()
class VOCDataset(DetectionDataset):
    """Any data set in Pascal VOC's layout (Everingham et al. 2010): a split file that lists image names, one XML file an image.

    `data_root` is the folder that holds `JPEGImages` and `Annotations` (`data_prefix=dict(img=..., ann=...)` says otherwise), and
    `ann_file` the split, such as `ImageSets/Main/train.txt`. The classes are VOC's twenty, unless `metainfo=dict(classes=...)`
    names others; objects of other classes are left out. `difficult` objects get the ignore flag.

    VOC counts pixels from 1 and its xmax is the last pixel *inside* the box; here (x1, y1, x2, y2) = (xmin - 1, ymin - 1, xmax,
    ymax), so that a box's width is x2 - x1. An image's id is its place in the split, from 1; `area` is the box's.

    Raises:
        ConfigError: no such split or XML file, an XML file that cannot be read, no object of any of the classes in the whole
            split, or a class that looks like a misspelt name of one that is there.
    """

    METAINFO = {"classes": CLASSES}
    PREFIXES = {"img": "JPEGImages", "ann": "Annotations"}

    def load_data_list(self) -> list[dict[str, Any]]:
        with open(require(self.ann_file, "split file", asked=self.asked_ann_file, key="ann_file"), encoding="utf-8") as stream:
            names = [line.split()[0] for line in stream if line.strip()]                # per-class splits have a second column
        classes = tuple(self._metainfo["classes"])
        self._metainfo.update(classes=classes, category_ids=tuple(range(1, len(classes) + 1)))
        labels = {name: label for label, name in enumerate(classes)}
        counts: Counter[str] = Counter()
        records, next_id = [], 1
        for img_id, name in enumerate(names, start=1):
            record = self._record(img_id, name)
            for instance in record["instances"]:
                instance["id"] = next_id
                next_id += 1
                counts[instance["name"]] += 1
            record["instances"] = [{**instance, "bbox_label": labels[instance.pop("name")]} for instance in record["instances"]
                                   if instance["name"] in labels]
            records.append(record)
        self._check_names(classes, counts)
        return records

    def _record(self, img_id: int, name: str) -> dict[str, Any]:
        file = os.path.join(self.data_prefix["ann"], f"{name}.xml")
        require(file, f"annotation of {name!r}, which {self.ann_file} lists,", asked=file, key="ann_file")
        try:
            root = ElementTree.parse(file).getroot()
            width, height = int(root.findtext("size/width")), int(root.findtext("size/height"))
            instances = [self._instance(entry) for entry in root.iter("object")]
        except (ElementTree.ParseError, TypeError, ValueError) as error:
            raise ConfigError(f"{file} is not a VOC annotation: {error}", ("ann_file",)) from error
        picture = root.findtext("filename") or f"{name}.jpg"
        suffix = os.path.splitext(picture)[1] or ".jpg"
        return {"img_id": img_id, "img_path": os.path.join(self.data_prefix["img"], name + suffix), "width": width, "height": height,
                "instances": instances}

    def _instance(self, entry: ElementTree.Element) -> dict[str, Any]:
        x1, y1, x2, y2 = (float(entry.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
        box = [x1 - 1, y1 - 1, x2, y2]
        return {"bbox": box, "name": entry.findtext("name").strip(), "ignore_flag": int(entry.findtext("difficult") or 0),
                "area": (box[2] - box[0]) * (box[3] - box[1])}

    def _check_names(self, classes: tuple[str, ...], counts: Counter[str]) -> None:
        others = {name: count for name, count in counts.items() if name not in classes}
        if others and len(others) == len(counts):
            raise ConfigError(f"no object in {self.ann_file} has one of the classes {', '.join(classes)}; they are called "
                              f"{', '.join(sorted(others))}. Name them in metainfo=dict(classes=(...))", ("metainfo", "classes"))
        absent = [name for name in classes if name not in counts]
        for name in absent:
            if did_you_mean(name, others):
                raise ConfigError(f"no object in {self.ann_file} is called {name!r}.{did_you_mean(name, others)}",
                                  ("metainfo", "classes"))
        if absent:
            self._log(f"{self.ann_file} has no object of: {', '.join(absent)}", logging.WARNING)
