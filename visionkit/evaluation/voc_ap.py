"""Pascal VOC's average precision, by its rule of 2007 and by that of 2010."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.logging import print_log

from visionkit.evaluation.detection import DetectionMetric
from visionkit.ops import box_iou
from visionkit.registry import METRICS, ConfigError

RULES = ("area", "11_points")


class Ranking(NamedTuple):
    """The detections of one class, over all images, best first."""
    iou: np.ndarray             # [N] with the object of the class in the image that it overlaps most
    nearest: np.ndarray         # [N] that object's number, counted over all images; -1 where there is none
    difficult: np.ndarray       # [O] bool, of each object


@METRICS.register_module()
class VOCMetric(DetectionMetric):
    """Average precision as in the Pascal VOC challenge (Everingham et al. 2010, sec. 4.2; development kit 2012, `VOCevaldet`).

    Detections of a class are taken from all images, best first. One is right if its IoU with the object that it overlaps most reaches
    a threshold and no better one found that object. Objects with the ignore flag (VOC's `difficult`) count neither as missed
    when they are not found, nor as right or wrong when they are.

    VOC's boxes name the last pixel *inside* and its overlap adds 1 to each side. `VOCDataset` makes x2 and y2 lie outside, so that its
    boxes have the extent that VOC's overlap means, and nothing is added here. `add_one` is for boxes that were taken over
    as they stand in VOC's files, and for comparing with programs that add 1 to such as these.

    Args:
        iou: the threshold, or several.
        rule: `area` under the precision that falls monotonically, as from 2010 on; or `11_points`, the mean of that precision
            at the recalls 0, 0.1, ..., 1, as until 2009.
        add_one: measure a side as x2 - x1 + 1.
        per_class: also print the AP of each class.
        collect_device: where results of several processes meet, `cpu` or `gpu`.
        prefix: put before the name of each number, as in `voc/mAP`.

    Raises:
        ConfigError: an argument that is none of the above.
    """
    default_prefix = "voc"

    def __init__(self, iou: float | Sequence[float] = 0.5, rule: str = "area", add_one: bool = False, per_class: bool = True,
                 collect_device: str = "cpu", prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.thresholds = tuple(iou) if isinstance(iou, Sequence) else (iou,)
        if not self.thresholds or not all(0 < threshold <= 1 for threshold in self.thresholds):
            raise ConfigError(f"VOCMetric needs an IoU above 0 and up to 1, or several, got {iou!r}", ("iou",))
        if rule not in RULES:
            raise ConfigError(f"VOCMetric knows the rules {' and '.join(map(repr, RULES))}, got {rule!r}", ("rule",))
        self.rule = rule
        self.add_one = add_one
        self.per_class = per_class

    @property
    def reported(self) -> list[str]:
        """The names of the numbers, as `save_best` of a checkpoint hook takes them."""
        return [f"{self.prefix}/{name}" for name in ("mAP", *self._names())]

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """`mAP`, the mean over thresholds, and `mAP_50` and the like at each; -1 where there is no ground truth to count."""
        images = self.once_each(results)
        rankings = {name: self.ranking(images, label) for label, name in enumerate(self.classes())}
        counted = {name: int((~ranking.difficult).sum()) for name, ranking in rankings.items()}
        table = {name: [average_precision(*hits_and_misses(ranking, threshold), counted[name], self.rule) for threshold in self.thresholds]
                 for name, ranking in rankings.items()}
        if not any(counted.values()):
            self.warn("no ground truth in the evaluated images: every number is -1. Check the data set's annotation file and classes.")
        elif not any(len(image["labels"]) for image in images):
            self.warn(f"no predictions at all in {len(images)} images: every number is 0. Check the weights, or a score threshold.")
        of_classes = [table[name] for name in table if counted[name]]
        means = np.mean(of_classes, axis=0) if of_classes else np.full(len(self.thresholds), -1.0)
        text = f"\n{len(images)} images, VOC's {self.rule.replace('_', ' ')} rule, {len(of_classes)} classes\n"
        text += "\n".join(f" Average Precision @[ IoU={threshold:.2f} ] = {mean:.3f}"
                          for threshold, mean in zip(self.thresholds, means, strict=True))
        if self.per_class:
            text += f"\n\n{self._class_table(table, counted)}"
        print_log(text, logger="current")
        return {"mAP": float(np.mean(means)), **dict(zip(self._names(), map(float, means), strict=True))}

    def ranking(self, images: Sequence[Mapping[str, Any]], label: int) -> Ranking:
        """The detections of a class, ready to be compared with any threshold."""
        scores, ious, nearest, difficult = [np.zeros(0)], [np.zeros(0)], [np.zeros(0, int)], []
        for image in images:
            objects = [instance for instance in image["annotations"] if instance["bbox_label"] == label]
            boxes = image["boxes"][image["labels"] == label]
            scores.append(image["scores"][image["labels"] == label])
            if objects:
                iou = self._iou(boxes, np.array([instance["bbox"] for instance in objects], np.float64))
                nearest.append(iou.argmax(1) + len(difficult))
                ious.append(iou.max(1))
            else:
                nearest.append(np.full(len(boxes), -1))
                ious.append(np.zeros(len(boxes)))
            difficult += [bool(instance.get("ignore_flag", 0)) for instance in objects]
        best_first = np.argsort(-np.concatenate(scores), kind="stable")
        return Ranking(np.concatenate(ious)[best_first], np.concatenate(nearest)[best_first], np.array(difficult, bool))

    def _iou(self, boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
        grown = np.array([0, 0, 1, 1]) * self.add_one
        return box_iou(torch.from_numpy(boxes + grown), torch.from_numpy(others + grown)).numpy()

    def _names(self) -> list[str]:
        return [f"mAP_{100 * threshold:g}" for threshold in self.thresholds]

    def _class_table(self, table: Mapping[str, Sequence[float]], counted: Mapping[str, int]) -> str:
        """A line a class: its objects and its AP at each threshold; `-` where the class has no object to find."""
        width = max(len("class"), *map(len, table))
        lines = [f" {'class':<{width}}  {'objects':>8}" + "".join(f"  {name[1:].replace('_', ''):>6}" for name in self._names())]
        for name, values in table.items():
            lines.append(f" {name:<{width}}  {counted[name]:>8}"
                         + "".join(f"  {f'{value:.3f}' if counted[name] else '-':>6}" for value in values))
        return "\n".join(lines)


def hits_and_misses(ranking: Ranking, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """[N] bool each, best first: the detections that are right, and those that are wrong; on difficult objects, they are neither."""
    near = ranking.iou >= threshold
    difficult = np.append(ranking.difficult, False)[ranking.nearest] & near           # number -1, no object, is not difficult
    hits = np.zeros_like(near)
    candidates = (near & ~difficult).nonzero()[0]
    _, first = np.unique(ranking.nearest[candidates], return_index=True)              # of those on one object, the best
    hits[candidates[first]] = True
    return hits, ~hits & ~difficult


def average_precision(hits: np.ndarray, misses: np.ndarray, objects: int, rule: str) -> float:
    """The average precision of a ranked list.

    Args:
        hits: [N] bool, best first: the detection is right.
        misses: [N] bool: it is wrong. What is neither does not count.
        objects: how many there are to find.
        rule: `area` or `11_points`.

    Returns:
        in [0, 1]; -1 where there is nothing to find.
    """
    if not objects:
        return -1.0
    found = hits.cumsum()
    precision = found / np.maximum(found + misses.cumsum(), 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]                          # at this recall or a higher one
    if rule == "area":
        return float(precision[hits].sum() / objects)                                 # each hit is a step of 1 / objects in recall
    # In whole numbers: 3 of 10 objects are a recall of 0.3, which the floating-point 3 * 0.1 exceeds.
    reached = [np.flatnonzero(found * 10 >= tenth * objects) for tenth in range(11)]
    return float(sum(precision[at[0]] for at in reached if len(at)) / 11)
