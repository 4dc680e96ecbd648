"""Pictures of what a model finds, beside what is there."""
from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from visionkit.registry import HOOKS
from visionkit.structures import Sample
from visionkit.transforms.loading import BrokenImageError, decode_image
from visionkit.visualization import contact_sheet, draw_instances, draw_panoptic, save_image, side_by_side


@HOOKS.register_module()
class PictureHook(Hook):
    """Save pictures of predictions beside the ground truth, in validation and test; one file an image, named by its id.

    Every validation draws the same images, so a later one replaces the pictures of an earlier one.

    Args:
        first: how many images, in the order of the data set; -1 for all.
        folder: where to; by default `pictures` in the work folder.
        score_threshold: predictions below are not drawn.
    """

    def __init__(self, first: int = 16, folder: str | None = None, score_threshold: float = 0.3) -> None:
        if first < -1 or not 0 <= score_threshold <= 1:
            raise ValueError(f"first is a number of images or -1 for all, score_threshold lies within 0 and 1; got {first=}, "
                             f"{score_threshold=}")
        self.first = first
        self.folder = folder
        self.score_threshold = score_threshold

    def before_val_epoch(self, runner: Runner) -> None:
        self.seen = self.saved = 0

    before_test_epoch = before_val_epoch

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Mapping[str, Any], outputs: Sequence[Sample]) -> None:
        self._draw(runner, data_batch["inputs"], outputs, runner.val_dataloader.dataset.metainfo["classes"])

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Mapping[str, Any], outputs: Sequence[Sample]) -> None:
        self._draw(runner, data_batch["inputs"], outputs, runner.test_dataloader.dataset.metainfo["classes"])

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, float] | None = None) -> None:
        if self.saved:
            runner.logger.info(f"{self.saved} pictures of predictions beside the ground truth are in {self._folder(runner)}")

    after_test_epoch = after_val_epoch

    def _draw(self, runner: Runner, inputs: Sequence[Tensor], samples: Sequence[Sample], classes: Sequence[str]) -> None:
        for image, sample in zip(inputs, samples, strict=True):
            position = self.seen * get_world_size() + get_rank()                 # the sampler deals images out in turn
            self.seen += 1
            if self.first < 0 or position < self.first:
                picture = draw_sample(original_image(image, sample), sample, classes, self.score_threshold)
                save_image(picture, self._folder(runner) / f"{file_name(sample.img_id)}.jpg")
                self.saved += 1

    def _folder(self, runner: Runner) -> Path:
        return Path(self.folder) if self.folder else Path(runner.work_dir) / "pictures"


def draw_sample(image: np.ndarray, sample: Sample, classes: Sequence[str], score_threshold: float = 0.0) -> np.ndarray:
    """The predictions of a sample on its image, beside its ground truth where it has one; of a panoptic model the panoptic map.

    Args:
        image: uint8 [h, w, 3], RGB, of the sample's original size.
        sample: with `pred_instances`, and `annotations` in the meta information.
        classes: names of the labels.
        score_threshold: predictions below are not drawn.
    """
    if "pred_panoptic" in sample:
        return _draw_panoptic(image, sample, classes)
    found = sample.pred_instances[sample.pred_instances.scores >= score_threshold]
    prediction = draw_instances(image, found.bboxes, found.labels, found.scores, classes=classes, masks=found.get("masks"))
    if "annotations" not in sample:
        return prediction
    annotations = sample.annotations
    truth = draw_instances(image, [one["bbox"] for one in annotations], [one["bbox_label"] for one in annotations], classes=classes,
                           ignored=[one.get("ignore_flag", 0) for one in annotations])
    return side_by_side(truth, prediction, (f"{sample.img_id}: ground truth, {len(annotations)} objects",
                                            f"prediction, {len(found)} with a score of {score_threshold:g} or more"))


def _draw_panoptic(image: np.ndarray, sample: Sample, classes: Sequence[str]) -> np.ndarray:
    prediction = draw_panoptic(image, sample.pred_panoptic, classes=classes)
    if "panoptic" not in sample:
        return prediction
    truth = draw_panoptic(image, sample.panoptic, classes=classes)
    return side_by_side(truth, prediction, (f"{sample.img_id}: ground truth, {len(sample.panoptic.segments)} segments",
                                            f"prediction, {len(sample.pred_panoptic.segments)} segments"))


def training_sheet(dataset: Any, draws: Iterable[int], columns: int = 4) -> np.ndarray:
    """A contact sheet of samples as the model gets them, augmented, with their boxes drawn; images that cannot be read are left out.

    Args:
        dataset: gives what `PackSample` makes.
        draws: which; those of a sampler, for the augmentation of a training run.
        columns: pictures a row.
    """
    classes = dataset.metainfo.get("classes", ())
    pictures, captions = [], []
    for draw in draws:
        try:
            item = dataset[draw]
        except BrokenImageError:
            continue
        sample = item["data_samples"]
        image = np.ascontiguousarray(item["inputs"].permute(1, 2, 0).float().clamp(0, 255).byte().numpy())
        parts = [getattr(sample, key) for key in ("gt_instances", "ignored_instances") if key in sample]
        boxes = [box for part in parts for box in part.bboxes.tolist()]
        labels = [label for part in parts for label in part.labels.tolist()]
        masks = torch.cat([part.masks for part in parts]) if parts and "masks" in parts[0] else None
        ignored = np.arange(len(boxes)) >= len(parts[0]) if parts else None
        pictures.append(draw_instances(image, boxes, labels, classes=classes, ignored=ignored, masks=masks))
        captions.append(f"{sample.img_id}: {image.shape[1]}x{image.shape[0]}" + (", flipped" if sample.get("flip") else ""))
    return contact_sheet(pictures, columns, captions=captions)


def original_image(network_input: Tensor, sample: Sample) -> np.ndarray:
    """The image of a sample in its original size, uint8 [h, w, 3], RGB: its file, or, where there is none because the data set
    generates its images, the network's input scaled and turned back.

    Args:
        network_input: [3, h, w], values 0..255, as the data loader gives it.
        sample: with `ori_shape`, and `img_path`, `flip` and `flip_direction` where they apply.
    """
    height, width = sample.ori_shape[:2]
    path = sample.get("img_path")
    if path and os.path.isfile(path):
        return decode_image(Path(path).read_bytes(), size=(height, width))
    image = network_input.permute(1, 2, 0).float().clamp(0, 255).byte().cpu().numpy()
    if sample.get("flip"):
        axis = {"horizontal": 1, "vertical": 0, "diagonal": (0, 1)}[sample.flip_direction]
        image = np.flip(image, axis)
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)


def file_name(img_id: Any) -> str:
    """`img_id` as a file name without a suffix: letters that a file system may not take become `_`."""
    return re.sub(r"[^\w.-]+", "_", str(img_id)).strip(".") or "_"
