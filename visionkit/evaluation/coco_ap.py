"""COCO average precision, from ground truth that travels with the samples."""
from __future__ import annotations

import contextlib
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import print_log

from visionkit.evaluation.detection import DetectionMetric
from visionkit.evaluation.image_metric import to_array
from visionkit.registry import METRICS, ConfigError

# The twelve numbers in COCO's order: key, title, IoU, area, most detections an image.
TWELVE = (
    ("mAP", "Average Precision  (AP)", "0.50:0.95", "all", 100),
    ("mAP_50", "Average Precision  (AP)", "0.50", "all", 100),
    ("mAP_75", "Average Precision  (AP)", "0.75", "all", 100),
    ("mAP_s", "Average Precision  (AP)", "0.50:0.95", "small", 100),
    ("mAP_m", "Average Precision  (AP)", "0.50:0.95", "medium", 100),
    ("mAP_l", "Average Precision  (AP)", "0.50:0.95", "large", 100),
    ("AR_1", "Average Recall     (AR)", "0.50:0.95", "all", 1),
    ("AR_10", "Average Recall     (AR)", "0.50:0.95", "all", 10),
    ("AR_100", "Average Recall     (AR)", "0.50:0.95", "all", 100),
    ("AR_s", "Average Recall     (AR)", "0.50:0.95", "small", 100),
    ("AR_m", "Average Recall     (AR)", "0.50:0.95", "medium", 100),
    ("AR_l", "Average Recall     (AR)", "0.50:0.95", "large", 100),
)
BACKENDS = ("faster_coco_eval", "pycocotools")
KINDS = ("bbox", "segm")


@METRICS.register_module()
class CocoMetric(DetectionMetric):
    """COCO's twelve numbers, and the AP of each class (Lin et al. 2014, arXiv:1405.0312).

    The ground truth is each sample's `annotations`, so any data set can be evaluated, from any number of processes. Crowd
    regions (`ignore_flag`) neither count as missed nor make a detection inside them false.

    Args:
        metric: what to compare, of `bbox` and `segm`; `segm` needs predictions and annotations with masks.
        backend: `faster_coco_eval`, or `pycocotools`, which gives the same numbers and takes longer.
        per_class: also print the AP of each class.
        outfile: where to write the detections as COCO result JSON; nowhere by default.
        collect_device: where results of several processes meet, `cpu` or `gpu`.
        prefix: put before the name of each number, as in `coco/bbox_mAP`.

    Raises:
        ConfigError: an argument that is none of the above.
    """
    default_prefix = "coco"

    def __init__(self, metric: str | Sequence[str] = ("bbox",), backend: str = "faster_coco_eval", per_class: bool = True,
                 outfile: str | None = None, collect_device: str = "cpu", prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.kinds = (metric,) if isinstance(metric, str) else tuple(metric)
        if not self.kinds or any(kind not in KINDS for kind in self.kinds):
            raise ConfigError(f"CocoMetric compares {' or '.join(map(repr, KINDS))}, got {metric!r}", ("metric",))
        if backend not in BACKENDS:
            raise ConfigError(f"CocoMetric knows the backends {' and '.join(map(repr, BACKENDS))}, got {backend!r}", ("backend",))
        self.backend = backend
        self.per_class = per_class
        self.outfile = outfile

    @property
    def reported(self) -> list[str]:
        """The names of the numbers, as `save_best` of a checkpoint hook takes them."""
        return [f"{self.prefix}/{kind}_{row[0]}" for kind in self.kinds for row in TWELVE]

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """The twelve numbers of each kind, `bbox_mAP` first; -1 where there is no ground truth to count."""
        images = self.once_each(results)
        truth = self._truth(images)
        detections = self._detections(images)
        if self.outfile:
            self._write(detections, images)
        if not truth["annotations"]:
            self.warn("no ground truth in the evaluated images: every number is -1. Check the data set's annotation file and classes.")
        elif not detections:
            self.warn(f"no predictions at all in {len(images)} images: every number is 0. Check the weights, or a score threshold.")

        numbers: dict[str, float] = {}
        for kind in self.kinds:
            stats, per_class = self._evaluate(truth, detections, kind)
            numbers.update({f"{kind}_{row[0]}": float(value) for row, value in zip(TWELVE, stats, strict=True)})
            text = f"\n{kind}, {len(images)} images, {self.backend}\n{twelve_lines(stats)}"
            if self.per_class:
                text += f"\n\n{class_table(per_class)}"
            print_log(text, logger="current")
        return numbers

    def summary(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """With masks where they are compared."""
        summary = super().summary(sample)
        if "segm" in self.kinds:
            predicted = sample["pred_instances"]
            if "masks" not in predicted:
                raise ConfigError("the model predicts no masks; set metric='bbox', or use a model that does", ("metric",))
            summary["masks"] = _encode(to_array(predicted["masks"])[summary["finite"]])
            for kept, instance in zip(summary["annotations"], sample["annotations"], strict=True):
                if "mask" in instance:
                    kept["mask"] = instance["mask"]
        return summary

    def _truth(self, images: list[dict[str, Any]]) -> dict[str, Any]:
        """Ground truth in COCO form. Image and annotation ids count from 1: an id may be a word, and COCO's matching takes
        annotation 0 for "unmatched"."""
        category_ids = self._category_ids()
        annotations = []
        for index, image in enumerate(images, 1):
            for instance in image["annotations"]:
                x1, y1, x2, y2 = (float(side) for side in instance["bbox"])
                annotation = {
                    "id": len(annotations) + 1, "image_id": index, "category_id": category_ids[int(instance["bbox_label"])],
                    "bbox": [x1, y1, x2 - x1, y2 - y1], "area": float(instance.get("area", (x2 - x1) * (y2 - y1))),
                    "iscrowd": int(instance.get("ignore_flag", 0))}
                if "segm" in self.kinds:
                    if "mask" not in instance:
                        raise ConfigError(f"image {image['img_id']!r} has annotations without masks; set metric='bbox'", ("metric",))
                    annotation["segmentation"] = instance["mask"]
                annotations.append(annotation)
        return {
            "info": {}, "annotations": annotations,
            "images": [{"id": index, "height": image["ori_shape"][0], "width": image["ori_shape"][1]}
                       for index, image in enumerate(images, 1)],
            "categories": [{"id": id_, "name": name} for id_, name in zip(category_ids, self.classes(), strict=True)]}

    def _detections(self, images: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Detections in COCO form, with the image ids of `_truth`."""
        category_ids = self._category_ids()
        detections = []
        for index, image in enumerate(images, 1):
            sizes = image["boxes"][:, 2:] - image["boxes"][:, :2]
            corners_and_sizes = np.concatenate([image["boxes"][:, :2], sizes], axis=1).tolist()
            for position, (box, score, label) in enumerate(
                    zip(corners_and_sizes, image["scores"].tolist(), image["labels"].tolist(), strict=True)):
                detection = {"image_id": index, "category_id": category_ids[label], "bbox": box, "score": score}
                if "masks" in image:
                    detection["segmentation"] = image["masks"][position]
                detections.append(detection)
        return detections

    def _category_ids(self) -> list[int]:
        """The file's id of each label; counted from 1 where there is no file."""
        return [int(id_) for id_ in self.dataset_meta.get("category_ids", range(1, len(self.classes()) + 1))]

    def _write(self, detections: list[dict[str, Any]], images: list[dict[str, Any]]) -> None:
        path = Path(self.outfile)
        path.parent.mkdir(parents=True, exist_ok=True)
        named = [{**detection, "image_id": images[detection["image_id"] - 1]["img_id"]} for detection in detections]
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(named))
        temporary.replace(path)
        print_log(f"wrote {len(named)} detections as COCO results to {path}", logger="current")

    def _evaluate(self, truth: dict[str, Any], detections: list[dict[str, Any]],
                  kind: str) -> tuple[np.ndarray, dict[str, tuple[float, float, int]]]:
        """The twelve numbers, and for each class its AP, AP50 and number of objects."""
        if self.backend == "pycocotools":
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval
        else:
            from faster_coco_eval import COCO
            from faster_coco_eval import COCOeval_faster as COCOeval
        if kind == "segm":                                   # else loadRes takes a detection's area from its box
            detections = [{key: value for key, value in detection.items() if key != "bbox"} for detection in detections]
        with contextlib.redirect_stdout(io.StringIO()):      # both backends print as they go
            truth_index = COCO()
            truth_index.dataset = {**truth, "annotations": [dict(annotation) for annotation in truth["annotations"]]}
            truth_index.createIndex()
            # loadRes([]) of pycocotools fails, and an empty index is what it should have given
            found = truth_index.loadRes([dict(detection) for detection in detections]) if detections else COCO()
            if not detections:
                found.dataset = {**truth, "annotations": []}
                found.createIndex()
            evaluation = COCOeval(truth_index, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        precision = evaluation.eval["precision"]             # [IoU thresholds, recalls, classes, areas, most detections]
        objects = Counter(annotation["category_id"] for annotation in truth["annotations"] if not annotation["iscrowd"])
        column = {category_id: index for index, category_id in enumerate(evaluation.params.catIds)}      # they are sorted
        per_class = {}
        for category in truth["categories"]:
            of_class = precision[:, :, column[category["id"]], 0, -1]
            per_class[category["name"]] = _mean(of_class), _mean(of_class[0]), objects[category["id"]]
        return np.asarray(evaluation.stats[:12], dtype=np.float64), per_class


def twelve_lines(stats: Sequence[float]) -> str:
    """COCO's table of twelve numbers, as everybody knows it."""
    return "\n".join(f" {title} @[ IoU={iou:<9} | area={area:>6s} | maxDets={most:>3d} ] = {value:0.3f}"
                     for (_, title, iou, area, most), value in zip(TWELVE, stats, strict=True))


def class_table(per_class: Mapping[str, tuple[float, float, int]]) -> str:
    """A line a class: its objects, AP and AP50; `-` where the class has no object to find."""
    width = max(len("class"), *map(len, per_class))
    lines = [f" {'class':<{width}}  {'objects':>8}  {'AP':>6}  {'AP50':>6}"]
    for name, (ap, ap_50, objects) in per_class.items():
        ap_text, ap_50_text = (f"{value:.3f}" if value >= 0 else "-" for value in (ap, ap_50))
        lines.append(f" {name:<{width}}  {objects:>8}  {ap_text:>6}  {ap_50_text:>6}")
    return "\n".join(lines)


def _mean(precision: np.ndarray) -> float:
    """The mean over what COCO marks as counted; -1 when nothing is."""
    counted = precision[precision > -1]
    return float(counted.mean()) if counted.size else -1.0


def _encode(masks: np.ndarray) -> list[dict[str, Any]]:
    """[N, h, w] masks to COCO's run lengths, as text."""
    from pycocotools import mask as coding
    encoded = [coding.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    return [{"size": one["size"], "counts": one["counts"].decode()} for one in encoded]
