"""Data sets of objects with boxes."""
from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from visionkit.datasets.base import Dataset
from visionkit.registry import ConfigError, did_you_mean
from visionkit.transforms import LoadImageFromFile


class DetectionDataset(Dataset):
    """Images with boxes of named classes; a label is an index into `metainfo["classes"]`.

    A subclass writes `load_data_list`, which returns one dict an image: `img_id`, `img_path`, `height`, `width` and `instances`,
    each with `bbox` (x1, y1, x2, y2) in pixels, x2 and y2 outside the box, `bbox_label`, `ignore_flag`, `area`, `id`, and `mask`
    where there is one. It sets `classes` and `category_ids` in `self._metainfo`.

    `filter_cfg` may name `filter_empty_gt` (leave out images without an object that counts) and `min_size` (leave out images
    whose shorter side is below so many pixels). Nothing is left out by default.
    """

    FILTERS = ("filter_empty_gt", "min_size")

    @abstractmethod
    def load_data_list(self) -> list[dict[str, Any]]:
        """One dict an image."""

    def filter_data(self) -> list[dict[str, Any]]:
        min_size = self.filter_cfg.get("min_size", 0)
        need_objects = self.filter_cfg.get("filter_empty_gt", False)
        kept = [record for record in self.data_list
                if min(record["width"], record["height"]) >= min_size
                and not (need_objects and all(instance["ignore_flag"] for instance in record["instances"]))]
        if len(kept) < len(self.data_list):
            self._log(f"filter_cfg={self.filter_cfg} leaves {len(kept)} of {len(self.data_list)} images of {self.ann_file}")
        return kept

    def image(self, index: int) -> np.ndarray:
        """The picture of one record as it is before any transform: uint8 [h, w, 3], RGB.

        Raises:
            BrokenImageError: it cannot be read.
        """
        return LoadImageFromFile()(self.get_data_info(index))["img"]

    def get_cat_ids(self, idx: int) -> list[int]:
        """The labels in one image; mmengine's ClassBalancedDataset asks for them."""
        return sorted({instance["bbox_label"] for instance in self.get_data_info(idx)["instances"]})


def check_classes(wanted: Sequence[str], found: Sequence[str], file: str) -> None:
    """Compare the classes of a config with the categories of an annotation file.

    Raises:
        ConfigError: the file does not have one of them, or one stands twice.
    """
    for name in wanted:
        if name not in found:
            raise ConfigError(f"{file} has no category {name!r}.{did_you_mean(name, found)} Its {len(found)} categories: "
                              f"{', '.join(found)}.", ("metainfo", "classes"))
    if len(set(wanted)) < len(wanted):
        raise ConfigError(f"a class stands twice in {', '.join(wanted)}", ("metainfo", "classes"))
