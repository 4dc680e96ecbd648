"""What is in a detection data set, and what is wrong with it."""
from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from visionkit.datasets.detection import DetectionDataset
from visionkit.transforms import decode_image
from visionkit.transforms.loading import name_record

SMALL, MEDIUM = 32**2, 96**2                                 # COCO's limits of area, pixels
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass
class DatasetReport:
    """Counts and findings; every finding is a line that names the image and its ids."""
    images: int
    boxes: int
    crowd: int                                               # boxes with the ignore flag
    boxes_per_class: dict[str, int]                          # crowd not counted
    boxes_per_image: dict[str, float]                        # quantile -> boxes, crowd not counted
    sizes: dict[str, int]                                    # small, medium, large by COCO's areas
    side_quantiles: dict[str, float]                         # quantile -> square root of the box's area, pixels
    image_sizes: dict[str, int]                              # "640x480" -> images, the most frequent ten
    empty_images: int                                        # without a box that counts
    decoded: bool                                            # whether the files were read, or only looked for
    missing_files: list[str] = field(default_factory=list)
    unreadable_files: list[str] = field(default_factory=list)
    wrong_sizes: list[str] = field(default_factory=list)     # the file's size is not the annotation's
    duplicate_files: list[str] = field(default_factory=list)     # one file listed more than once
    duplicate_contents: list[str] = field(default_factory=list)  # different files, the same bytes
    boxes_outside: list[str] = field(default_factory=list)   # reaching outside their image by more than a pixel
    boxes_degenerate: list[str] = field(default_factory=list)    # without extent, or not a number

    @property
    def findings(self) -> dict[str, list[str]]:
        """What is wrong, by kind, where anything is."""
        kinds = {"missing files": self.missing_files, "unreadable files": self.unreadable_files,
                 "files of another size than annotated": self.wrong_sizes, "files listed more than once": self.duplicate_files,
                 "different files with the same content": self.duplicate_contents,
                 "boxes outside their image": self.boxes_outside, "boxes without extent": self.boxes_degenerate}
        return {kind: lines for kind, lines in kinds.items() if lines}

    def __str__(self) -> str:
        rows = [("images", f"{self.images} ({self.empty_images} without objects)"),
                ("boxes", f"{self.boxes} and {self.crowd} crowd"),
                ("boxes per class", ", ".join(f"{name} {count}" for name, count in self.boxes_per_class.items())),
                ("boxes per image", _quantiles(self.boxes_per_image)),
                ("box sizes", ", ".join(f"{name} {count}" for name, count in self.sizes.items())),
                ("box side, pixels", _quantiles(self.side_quantiles)),
                ("image sizes", ", ".join(f"{size} ({count})" for size, count in self.image_sizes.items()))]
        lines = [f"{title:<18}{text}" for title, text in rows]
        for kind, found in self.findings.items():
            lines.append(f"{len(found)} {kind}:")
            lines += [f"  {line}" for line in found[:5]] + ([f"  and {len(found) - 5} more"] if len(found) > 5 else [])
        checked = "every file read" if self.decoded else "files looked for, not read"
        return "\n".join(lines if self.findings else [*lines, f"nothing wrong found ({checked})"])


def report(dataset: DetectionDataset, *, decode: bool = True, threads: int = 8) -> DatasetReport:
    """Look at every record of a data set.

    Args:
        dataset: its pipeline is not run.
        decode: read and decode every file, and compare contents; without it only see whether the files exist.
        threads: that read files.
    """
    records = [_light(dataset.get_data_info(index)) for index in range(len(dataset))]
    classes = dataset.metainfo["classes"]
    boxes = [(record, instance) for record in records for instance in record["instances"]]
    counted = [instance for _, instance in boxes if not instance["ignore_flag"]]
    labels = Counter(instance["bbox_label"] for instance in counted)
    extents = np.array([instance["bbox"] for instance in counted], float).reshape(-1, 4)
    sides = np.sqrt(np.clip(extents[:, 2] - extents[:, 0], 0, None) * np.clip(extents[:, 3] - extents[:, 1], 0, None))
    areas = np.array([instance["area"] for instance in counted], float)
    per_image = [sum(not instance["ignore_flag"] for instance in record["instances"]) for record in records]
    sizes = Counter(f"{record['width']}x{record['height']}" for record in records)
    result = DatasetReport(
        images=len(records), boxes=len(counted), crowd=len(boxes) - len(counted),
        boxes_per_class={name: labels[label] for label, name in enumerate(classes)},
        boxes_per_image=_at_quantiles(per_image), side_quantiles=_at_quantiles(sides[np.isfinite(sides)]),
        sizes={"small": int((areas < SMALL).sum()), "medium": int(((areas >= SMALL) & (areas < MEDIUM)).sum()),
               "large": int((areas >= MEDIUM).sum())},
        image_sizes=dict(sizes.most_common(10)), empty_images=per_image.count(0), decoded=decode)
    for record, instance in boxes:
        _check_box(record, instance, result)
    _check_files([record for record in records if not record["generated"]], result, threads)
    return result


def _light(record: dict[str, Any]) -> dict[str, Any]:
    """A record without its picture and masks, which would not fit into memory for all."""
    instances = [{key: value for key, value in instance.items() if key != "mask"} for instance in record["instances"]]
    return {"img_id": record["img_id"], "img_path": record["img_path"], "width": record["width"], "height": record["height"],
            "generated": "img" in record, "instances": instances}


def _check_box(record: dict[str, Any], instance: dict[str, Any], result: DatasetReport) -> None:
    x1, y1, x2, y2 = instance["bbox"]
    line = f"{record['img_path']} (image id {record['img_id']}, annotation id {instance.get('id')}): box {x1:g}, {y1:g}, {x2:g}, {y2:g}"
    if not (x2 > x1 and y2 > y1):
        result.boxes_degenerate.append(line)
    elif x1 < -1 or y1 < -1 or x2 > record["width"] + 1 or y2 > record["height"] + 1:
        result.boxes_outside.append(f"{line} on {record['width']}x{record['height']}")


def _check_files(records: list[dict[str, Any]], result: DatasetReport, threads: int) -> None:
    by_path: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        by_path[os.path.realpath(record["img_path"])].append(record)
    result.duplicate_files = [f"{path}: {_ids(same)}" for path, same in by_path.items() if len(same) > 1]
    by_content: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with ThreadPoolExecutor(threads) as pool:
        firsts = [same[0] for same in by_path.values()]
        for record, (problem, size, digest) in zip(firsts, pool.map(_read if result.decoded else _look, firsts), strict=True):
            line = f"{record['img_path']} ({name_record(record)})"
            if problem == "missing":
                result.missing_files.append(line)
            elif problem:
                result.unreadable_files.append(f"{line}: {problem}")
            if size and size != (record["width"], record["height"]):
                result.wrong_sizes.append(f"{line}: the file is {size[0]}x{size[1]}, annotated {record['width']}x{record['height']}")
            if digest:
                by_content[digest].append(record)
    result.duplicate_contents = [", ".join(f"{record['img_path']} (image id {record['img_id']})" for record in same)
                                 for same in by_content.values() if len(same) > 1]


def _look(record: dict[str, Any]) -> tuple[str, None, str]:
    return "" if os.path.isfile(record["img_path"]) else "missing", None, ""


def _read(record: dict[str, Any]) -> tuple[str, tuple[int, int] | None, str]:
    """What is wrong with a record's file, its (width, height) and a digest of its content, as far as they can be had."""
    try:
        with open(record["img_path"], "rb") as stream:
            data = stream.read()
    except FileNotFoundError:
        return "missing", None, ""
    except OSError as error:
        return str(error), None, ""
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    try:
        height, width = decode_image(data, size=(record["height"], record["width"])).shape[:2]
    except ValueError as error:
        return str(error), None, digest if data else ""
    return "", (width, height), digest


def _ids(records: Iterable[dict[str, Any]]) -> str:
    return "image ids " + ", ".join(str(record["img_id"]) for record in records)


def _at_quantiles(values: Iterable[float]) -> dict[str, float]:
    values = np.asarray(list(values), float)
    return {f"{q:.0%}": float(np.quantile(values, q)) for q in QUANTILES} if len(values) else {}


def _quantiles(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.0f}" for name, value in values.items()) or "none"
