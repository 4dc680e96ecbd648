"""The contract of a transform: what it does to the image it does to boxes, labels, flags and masks."""
from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from visionkit.testing.module import promise, require

# N instances in an image of h x w pixels

PER_INSTANCE = ("gt_bboxes", "gt_bboxes_labels", "gt_ignore_flags", "gt_masks")


def example_results(size: tuple[int, int] = (48, 64), num_instances: int = 4, seed: int = 0) -> dict[str, Any]:
    """What a pipeline holds after loading: an image of rectangles with their boxes, labels, flags and masks.

    Args:
        size: (h, w) of the image, at least 24.
        num_instances: how many rectangles; label i is rectangle i, so that a mix-up shows.
        seed: of the picture.
    """
    height, width = size
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    corners = generator.integers((0, 0), (width - 16, height - 16), (num_instances, 2))
    sides = generator.integers(6, 16, (num_instances, 2))
    boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32).reshape(-1, 4)
    masks = np.zeros((num_instances, height, width), dtype=np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
        mask[y1:y2, x1:x2] = 1
    return {
        "img": image, "img_path": "example.png", "img_id": 7, "ori_shape": size, "img_shape": size,
        "gt_bboxes": boxes, "gt_bboxes_labels": np.arange(num_instances), "gt_ignore_flags": np.zeros(num_instances, dtype=bool),
        "gt_masks": masks,
    }


def check_transform(transform: Callable[[dict], dict | None], results: dict[str, Any] | None = None, *, seeds: Sequence[int] = range(8),
                    slack_px: float = 2.0) -> None:
    """Check that `transform` keeps an image and its annotations in step.

    For each seed: the same seed gives the same result; every key of the input is kept; `img_shape` is the image's; boxes are
    float32 (x1, y1, x2, y2) within it; boxes, labels, flags and masks are equally many; each mask still lies in its box. An image
    without instances works, and the transform can be sent to a data-loader worker.

    Args:
        transform: is called on copies; may return None to drop an image.
        results: what it works on; by default `example_results()`.
        seeds: seeds for `random`, numpy and torch; a random transform needs a few to show what it does.
        slack_px: how far a mask may stick out of its box.

    Raises:
        AssertionError: tells which promise is broken.
    """
    name = type(transform).__name__
    results = example_results() if results is None else results
    with promise(f"{name} cannot be sent to a data-loader worker"):
        pickle.loads(pickle.dumps(transform))
    nothing = {key: value[:0] if key in PER_INSTANCE else value for key, value in results.items()}
    for seed in seeds:
        for given, case in ((results, ""), (nothing, " without instances")):
            with promise(f"{name} fails on an image{case}"):
                first, second = _run(transform, given, seed), _run(transform, given, seed)
            require(_same(first, second), f"{name} gives two results for seed {seed}; draw from `random`, numpy or torch, whose "
                                          f"seeds are set for each sample, and keep no state between calls")
            if first is not None:
                _check_result(name, first, given, slack_px)


def _run(transform: Callable[[dict], dict | None], results: dict[str, Any], seed: int) -> dict[str, Any] | None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return transform(copy.deepcopy(results))


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, np.ndarray) or isinstance(second, np.ndarray):
        return np.array_equal(first, second)
    return bool(first == second)


def _check_result(name: str, results: dict[str, Any], given: dict[str, Any], slack_px: float) -> None:
    require(isinstance(results, dict), f"{name} must return the results dict or None, got {type(results).__name__}")
    lost = [key for key in given if key not in results]
    require(not lost, f"{name} drops {', '.join(map(repr, lost))}")
    image = results["img"]
    require(isinstance(image, np.ndarray) and image.ndim == 3, f"{name}: img must stay an array [h, w, 3], got {_shape(image)}")
    require(image.dtype == given["img"].dtype, f"{name} turns a {given['img'].dtype} image into {image.dtype}")
    height, width = image.shape[:2]
    require(tuple(results["img_shape"][:2]) == (height, width),
            f"{name} says img_shape {tuple(results['img_shape'])} of an image of {height}x{width}; set it where the image changes")
    counts = {key: len(results[key]) for key in PER_INSTANCE if key in results}
    require(len(set(counts.values())) <= 1, f"{name} leaves annotations out of step: {counts}")
    if "gt_bboxes_labels" in results:
        strange = set(np.asarray(results["gt_bboxes_labels"]).tolist()) - set(np.asarray(given["gt_bboxes_labels"]).tolist())
        require(not strange, f"{name} invents the labels {sorted(strange)}")
    if "gt_bboxes" not in results:
        return
    boxes = np.asarray(results["gt_bboxes"])
    require(boxes.ndim == 2 and boxes.shape[1] == 4 and boxes.dtype == np.float32,
            f"{name}: gt_bboxes must be float32 [N, 4], got {_shape(boxes)}")
    inside = (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
    require(inside, f"{name} leaves boxes outside of the {height}x{width} image: {boxes.tolist()}; clip them")
    require((boxes[:, 2:] >= boxes[:, :2]).all(), f"{name} leaves boxes with x2 < x1 or y2 < y1: {boxes.tolist()}")
    if "gt_masks" not in results:
        return
    require(results["gt_masks"].shape[1:] == (height, width),
            f"{name}: masks are {_shape(results['gt_masks'])} on an image of {height}x{width}")
    for index, (mask, box) in enumerate(zip(results["gt_masks"], boxes, strict=True)):
        rows, columns = mask.nonzero()
        if len(rows):
            extent = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            require((extent[:2] >= box[:2] - slack_px).all() and (extent[2:] <= box[2:] + slack_px).all(),
                    f"{name}: instance {index} has its mask at {extent.tolist()} but its box at {box.tolist()}")


def _shape(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
