"""What every metric of whole images shares."""
from __future__ import annotations

import logging
from collections.abc import Hashable
from typing import Any

import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from torch import Tensor

from visionkit.registry import ConfigError


class ImageMetric(BaseMetric):
    """A metric of which each image counts once, from any number of processes. `process` keeps a dict an image, with its `img_id`."""

    def once_each(self, images: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
        """The first dict of each image: a sampler that fills its last round, or a data set that replaces an unreadable image, shows
        some twice. An image is known by its `img_id`, and where ids repeat by `keys` beside it."""
        first: dict[Hashable, dict[str, Any]] = {}
        for image in images:
            first.setdefault(tuple(image[key] for key in (*keys, "img_id")), image)
        if len(first) < len(images):
            self.warn(f"{len(images) - len(first)} of {len(images)} evaluated images came twice and count once")
        return list(first.values())

    def wanted(self, sample: dict[str, Any], key: str, hint: str) -> Any:
        """`sample[key]`.

        Raises:
            ConfigError: the sample has none; `hint` tells where it comes from.
        """
        if key not in sample:
            raise ConfigError(f"{type(self).__name__} needs each sample's `{key}`, but that of image {sample.get('img_id')!r} has none; "
                              f"{hint}")
        return sample[key]

    def class_name(self, label: int) -> str:
        """The name of a label, or the label where the data set names none."""
        classes = (self.dataset_meta or {}).get("classes", ())
        return classes[label] if label < len(classes) else str(label)

    def warn(self, message: str) -> None:
        print_log(f"{type(self).__name__}: {message}", logger="current", level=logging.WARNING)


def to_array(values: Any) -> np.ndarray:
    """A tensor, on any device and of any type, or what numpy takes as it is."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values      # numpy has no bfloat16
    return np.asarray(values)
