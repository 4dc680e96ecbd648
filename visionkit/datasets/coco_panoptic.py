"""Data sets in which every pixel has a class: COCO's panoptic format, and sets of instances seen that way."""
from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from visionkit.datasets.coco import NEEDED, CocoDataset, read_coco
from visionkit.datasets.roots import require
from visionkit.registry import DATASETS, ConfigError

BACKGROUND = "background"


@DATASETS.register_module()
class CocoPanopticDataset(CocoDataset):
    """COCO's panoptic format (Kirillov et al. 2019, arXiv:1801.00868): a JSON file that describes the segments of each image, and a
    folder of PNG files that hold their ids, `data_prefix=dict(img=..., seg=...)`.

    Things come first among the labels, then stuff, each by category id, so that a model needs to know only how many things there
    are; `metainfo["isthing"]` tells it of each label. `metainfo=dict(classes=...)` chooses categories by name, in the order of their
    labels; segments of other categories become void. Crowds have the ignore flag. Images that have no annotation are left out with a
    warning: nobody knows what is in them. The pipeline starts with `LoadImageFromFile` and `LoadPanopticAnnotations`.

    Raises:
        ConfigError: no such file, not this format, a class that it does not have, or stuff before things.
    """

    PREFIXES: dict[str, str] = {"img": "", "seg": ""}

    def load_data_list(self) -> list[dict[str, Any]]:
        needed = {**NEEDED, "annotations": ("image_id", "file_name", "segments_info"), "categories": ("id", "name", "isthing")}
        content = read_coco(require(self.ann_file, "annotation file", asked=self.asked_ann_file, key="ann_file"), needed)
        labels = self._labels(content["categories"])
        records = self._records(content["images"])
        annotated: dict[Any, dict[str, Any]] = {}
        for annotation in content["annotations"]:
            record = records.get(annotation["image_id"])
            if record is not None:
                annotated[annotation["image_id"]] = record
                record["seg_path"] = os.path.join(self.data_prefix["seg"], annotation["file_name"])
                segments = annotation["segments_info"]
                record["instances"] = [self._segment(segment, labels) for segment in segments if segment["category_id"] in labels]
                record["void_ids"] = [segment["id"] for segment in segments if segment["category_id"] not in labels]
        if len(annotated) < len(records):
            self._log(f"{self.ann_file} does not annotate {len(records) - len(annotated)} of {len(records)} images; they are left out",
                      logging.WARNING)
        return list(annotated.values())

    def _labels(self, categories: list[Mapping[str, Any]]) -> dict[Any, int]:
        things_first = sorted(categories, key=lambda category: (not category["isthing"], category["id"]))
        self._metainfo.setdefault("classes", tuple(category["name"] for category in things_first))
        labels = super()._labels(categories)
        is_thing = {category["id"]: bool(category["isthing"]) for category in categories}
        isthing = tuple(is_thing[id_] for id_ in self._metainfo["category_ids"])
        if list(isthing) != sorted(isthing, reverse=True):
            stuff = self._metainfo["classes"][isthing.index(False)]
            raise ConfigError(f"things come before stuff, but the stuff {stuff!r} stands before a thing; change the order",
                              ("metainfo", "classes"))
        self._metainfo["isthing"] = isthing
        return labels

    def _segment(self, segment: Mapping[str, Any], labels: Mapping[Any, int]) -> dict[str, Any]:
        label = labels[segment["category_id"]]
        return {**self._instance(segment, label), "isthing": self._metainfo["isthing"][label]}


@DATASETS.register_module()
class CocoInstancesAsPanoptic(CocoDataset):
    """A COCO data set with masks, seen as a panoptic one: its objects are things, and what none of them covers is one stuff class,
    `background`, the last label. Where masks overlap, the smaller lies on the larger. The pipeline is that of
    `CocoPanopticDataset`.
    """

    def load_data_list(self) -> list[dict[str, Any]]:
        records = super().load_data_list()
        for record in records:
            record["background_label"] = len(self._metainfo["classes"]) - 1
        return records

    def _labels(self, categories: list[Mapping[str, Any]]) -> dict[Any, int]:
        labels = super()._labels(categories)
        classes, category_ids = self._metainfo["classes"], self._metainfo["category_ids"]
        if BACKGROUND in classes:
            raise ConfigError(f"the class {BACKGROUND!r} is added for what no object covers, and {self.ann_file} has one of that name; "
                              f"leave it out of metainfo=dict(classes=...)", ("metainfo", "classes"))
        free_id = max(category["id"] for category in categories) + 1
        self._metainfo.update(classes=(*classes, BACKGROUND), category_ids=(*category_ids, free_id),
                              isthing=(True,) * len(classes) + (False,))
        return labels
