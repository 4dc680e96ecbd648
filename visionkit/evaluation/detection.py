"""What every metric of boxes needs of an image, small and on the CPU."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from visionkit.evaluation.image_metric import ImageMetric, to_array
from visionkit.registry import ConfigError


class DetectionMetric(ImageMetric):
    """A metric that compares predicted boxes with each sample's `annotations`, from any number of processes.

    A subclass writes `compute_metrics(images)`, where `images` are the summaries of the whole data set.
    """

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Keep the summary of each image."""
        self.results.extend(self.summary(sample) for sample in data_samples)

    def summary(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """`img_id`, `ori_shape`, the predictions `boxes` [N, 4], `scores` [N] and `labels` [N], and the `annotations`; `finite` [P] tells
        which of all predictions the N are.

        Raises:
            ConfigError: the sample has no annotations, or a label that is none of the data set's.
        """
        name = type(self).__name__
        if "annotations" not in sample:
            raise ConfigError(
                f"{name} compares with each sample's `annotations`, but the sample of image {sample.get('img_id')!r} has none; "
                f"let the data set give `instances` and end the test pipeline with PackSample")
        predicted = sample["pred_instances"]
        boxes, scores, labels = (to_array(predicted[key]) for key in ("bboxes", "scores", "labels"))
        classes = self.classes()
        if len(labels) and int(labels.max()) >= len(classes):
            raise ConfigError(f"the model predicts the label {int(labels.max())}, but the data set has {len(classes)} classes "
                              f"({', '.join(classes)}); make the model's num_classes {len(classes)}")
        finite = np.isfinite(boxes).all(1) & np.isfinite(scores)
        if not finite.all():
            self.warn(f"left out {(~finite).sum()} predictions of image {sample['img_id']!r} that are not finite numbers")
        return {
            "img_id": sample["img_id"], "ori_shape": tuple(int(side) for side in sample["ori_shape"][:2]), "finite": finite,
            "boxes": boxes[finite].astype(np.float64), "scores": scores[finite].astype(np.float64), "labels": labels[finite],
            "annotations": [{key: instance[key] for key in ("bbox", "bbox_label", "ignore_flag", "area") if key in instance}
                            for instance in sample["annotations"]],
        }

    def classes(self) -> list[str]:
        """The name of each label."""
        if "classes" not in (self.dataset_meta or {}):
            raise ConfigError(f"{type(self).__name__} needs the data set's `metainfo['classes']`, the name of each label")
        return list(self.dataset_meta["classes"])
