"""Panoptic quality, from ground truth that travels with the samples."""
from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from mmengine.logging import print_log

from visionkit.evaluation.detection import DetectionMetric
from visionkit.registry import METRICS, ConfigError
from visionkit.structures.panoptic_map import MOST_IDS, VOID, PanopticMap, areas_of, encode_png

GROUPS = {"": "all", "_th": "things", "_st": "stuff"}        # what is put behind the names of the three numbers
COLUMNS = ("sum of IoU", "true positives", "false positives", "false negatives")


@METRICS.register_module()
class PanopticQuality(DetectionMetric):
    """Panoptic, segmentation and recognition quality (Kirillov et al. 2019, arXiv:1801.00868, eq. 1 and 2), as COCO's panopticapi counts
    them: over all classes, over things, over stuff, and of each class.

    A segment is found where a predicted one of its class has an IoU above 0.5 with it; since segments do not overlap, at most one
    has. PQ = sum of IoU / (TP + FP / 2 + FN / 2) = SQ * RQ of each class, and the mean over the classes that occur. The IoU's
    union leaves out what is void in the ground truth; a predicted segment that lies by more than half on void or on a crowd of
    its own class is not false; a crowd is never missed.

    Args:
        per_class: also print the numbers of each class.
        outfile_prefix: write the predictions as COCO panoptic results, `<prefix>.json` and PNG files in the folder `<prefix>/`;
            nowhere by default.
        collect_device: where results of several processes meet, `cpu` or `gpu`.
        prefix: put before the name of each number, as in `panoptic/PQ`.
    """
    default_prefix = "panoptic"

    def __init__(self, per_class: bool = True, outfile_prefix: str | None = None, collect_device: str = "cpu",
                 prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.per_class = per_class
        self.outfile_prefix = outfile_prefix

    @property
    def reported(self) -> list[str]:
        """The names of the numbers, as `save_best` of a checkpoint hook takes them."""
        return [f"{self.prefix}/{name}{suffix}" for suffix in GROUPS for name in ("PQ", "SQ", "RQ")]

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """PQ, SQ and RQ of all classes, then of things (`PQ_th`) and of stuff (`PQ_st`); -1 where there is no class to count."""
        images = self.once_each(results)
        classes, isthing = self.classes(), np.array(self.dataset_meta["isthing"], bool)
        if self.outfile_prefix:
            self._write(images)
        counts = np.zeros((len(classes), len(COLUMNS)))
        for image in images:
            for label, count in image["counts"].items():
                counts[label] += count
        if not counts.any():
            self.warn("no segment at all, in the ground truth or predicted: every number is -1. Check the data set's annotation file.")
        table, occurs = qualities(counts), counts[:, 1:].any(1)
        groups = {"": occurs, "_th": occurs & isthing, "_st": occurs & ~isthing}
        numbers = {f"{name}{suffix}": float(value) for suffix, group in groups.items()
                   for name, value in zip(("PQ", "SQ", "RQ"), table[group].mean(0) if group.any() else [-1.0] * 3, strict=True)}
        text = f"\npanoptic quality, {len(images)} images\n{group_table(numbers, groups)}"
        if self.per_class:
            text += f"\n\n{class_table(classes, table, counts)}"
        print_log(text, logger="current")
        return numbers

    def summary(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Of an image that is compared at once: `img_id`, the `counts` of `compare`, and its `annotation` for COCO's JSON.

        Raises:
            ConfigError: a map is missing, is not as large as the other, or has a label that is none of the data set's.
        """
        img_id, classes = sample["img_id"], self.classes()
        if "panoptic" not in sample:
            raise ConfigError(f"PanopticQuality compares with each sample's `panoptic`, but the sample of image {img_id!r} has none; "
                              f"the test pipeline needs LoadPanopticAnnotations and PackSample(meta_keys=('panoptic',))")
        if "pred_panoptic" not in sample:
            raise ConfigError(f"the model predicts no panoptic map (`pred_panoptic`) for image {img_id!r}; use a model that does")
        truth, found = sample["panoptic"], sample["pred_panoptic"]
        most = max((segment.label for segment in (*truth.segments, *found.segments)), default=0)
        if most >= len(classes):
            raise ConfigError(f"the model predicts the label {most}, but the data set has {len(classes)} classes ({', '.join(classes)}); "
                              f"make the model's num_classes {len(classes)}")
        if truth.ids.shape != found.ids.shape:
            raise ConfigError(f"the map predicted for image {img_id!r} has {list(found.ids.shape)} pixels, its ground truth "
                              f"{list(truth.ids.shape)}: both are in the image's original size")
        summary = {"img_id": img_id, "counts": compare(truth, found)}
        if self.outfile_prefix:
            name = (f"{img_id:012d}" if isinstance(img_id, int) else quote(str(img_id), safe="")) + ".png"     # no two ids share one
            _write_whole(Path(self.outfile_prefix) / name, encode_png(found.ids))
            summary["annotation"] = {"image_id": img_id, "file_name": name, "segments_info": found.to_coco(self._category_ids())}
        return summary

    def classes(self) -> list[str]:
        """The name of each label."""
        if "isthing" not in (self.dataset_meta or {}):
            raise ConfigError("PanopticQuality needs the data set's `metainfo['isthing']`, whether each label is a thing; "
                              "CocoPanopticDataset and CocoInstancesAsPanoptic have it")
        return super().classes()

    def _category_ids(self) -> list[int]:
        return list(self.dataset_meta.get("category_ids", range(1, len(self.classes()) + 1)))

    def _write(self, images: list[dict[str, Any]]) -> None:
        classes = zip(self._category_ids(), self.classes(), self.dataset_meta["isthing"], strict=True)
        content = {"annotations": [image["annotation"] for image in images],
                   "categories": [{"id": id_, "name": name, "isthing": int(isthing)} for id_, name, isthing in classes]}
        _write_whole(Path(f"{self.outfile_prefix}.json"), json.dumps(content).encode())
        print_log(f"wrote {len(images)} panoptic maps as COCO results to {self.outfile_prefix}.json and {self.outfile_prefix}/",
                  logger="current")


def compare(truth: PanopticMap, found: PanopticMap) -> dict[int, np.ndarray]:
    """What one image adds to each class that it has or is said to have.

    Returns:
        label -> float64 [4]: the sum of IoU over true positives, true positives, false positives, false negatives.
    """
    # One number for each pair of segments that share pixels, instead of a mask for each segment.
    shared = areas_of(truth.ids.astype(np.int64) * MOST_IDS + found.ids)
    true, predicted = {segment.id: segment for segment in truth.segments}, {segment.id: segment for segment in found.segments}
    counts: dict[int, np.ndarray] = {segment.label: np.zeros(len(COLUMNS)) for segment in (*truth.segments, *found.segments)}
    matched: set[int] = set()                                # ids of `found`
    missed = {segment.id: segment for segment in truth.segments if not segment.iscrowd}
    ignored = {id_: shared.get(VOID * MOST_IDS + id_, 0) for id_ in predicted}              # pixels that cannot be wrong
    for pair, intersection in shared.items():
        true_id, id_ = divmod(pair, MOST_IDS)
        if true_id == VOID or id_ == VOID or true[true_id].label != predicted[id_].label:
            continue
        label = true[true_id].label
        if true[true_id].iscrowd:
            ignored[id_] += intersection
            continue
        void = shared.get(VOID * MOST_IDS + id_, 0)
        iou = intersection / (true[true_id].area + predicted[id_].area - intersection - void)
        if iou > 0.5:
            counts[label] += iou, 1, 0, 0
            matched.add(id_)
            del missed[true_id]
    for segment in found.segments:
        if segment.id not in matched and ignored[segment.id] / segment.area <= 0.5:
            counts[segment.label] += 0, 0, 1, 0
    for segment in missed.values():
        counts[segment.label] += 0, 0, 0, 1
    return counts


def qualities(counts: np.ndarray) -> np.ndarray:
    """[C, 3], PQ, SQ and RQ of each class, from its [C, 4] counts; 0 where nothing was found, or nothing is there."""
    iou, tp, fp, fn = counts.T
    # the least divisor stands for 0, where the dividend is 0 too
    sq, rq = iou / np.maximum(tp, 1), tp / np.maximum(tp + fp / 2 + fn / 2, 0.5)
    return np.stack([sq * rq, sq, rq], axis=1)


def group_table(numbers: Mapping[str, float], groups: Mapping[str, np.ndarray]) -> str:
    """panopticapi's table: a line each for all classes, things and stuff, with how many of them occur."""
    lines = [f" {'':<6}  {'PQ':>6}  {'SQ':>6}  {'RQ':>6}  {'classes':>7}"]
    for suffix, group in groups.items():
        values = "  ".join(f"{numbers[name + suffix]:>6.3f}" if group.any() else f"{'-':>6}" for name in ("PQ", "SQ", "RQ"))
        lines.append(f" {GROUPS[suffix]:<6}  {values}  {group.sum():>7}")
    return "\n".join(lines)


def class_table(classes: Sequence[str], table: np.ndarray, counts: np.ndarray) -> str:
    """A line a class: its numbers, and how many segments were found, were false, were missed; `-` for a class that does not occur."""
    width = max(len("class"), *map(len, classes))
    lines = [f" {'class':<{width}}  {'PQ':>6}  {'SQ':>6}  {'RQ':>6}  {'found':>6}  {'false':>6}  {'missed':>6}"]
    for name, values, (_, *tallies) in zip(classes, table, counts, strict=True):
        shown = [f"{value:.3f}" if any(tallies) else "-" for value in values] + [f"{tally:.0f}" for tally in tallies]
        lines.append(f" {name:<{width}}  " + "  ".join(f"{text:>6}" for text in shown))
    return "\n".join(lines)


def _write_whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)
