"""The contract of a detection model: losses that train all of it, predictions in original-image pixels."""
from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from visionkit.models.base import Model
from visionkit.structures import ImageBatch, ImageList, InstanceData, Sample
from visionkit.testing.module import check_gradients, check_modes, check_state_dict, promise, require

# N boxes in an image; h, w of the network input without padding


def check_model(model: Model, *, num_classes: int, image_sizes: Sequence[tuple[int, int]] = ((64, 96), (96, 64)), masks: bool = False,
                unused: Collection[str] = ()) -> None:
    """Check that a detector keeps the contracts of `loss` and `predict`.

    In order: every loss is a finite scalar, for images with boxes and without any, in float32 and under bfloat16 autocast; gradients
    reach every parameter that requires one, in each of these cases (a process of a distributed run that leaves one out hangs the
    others); predictions are one sample an image with `bboxes` within the original image, `scores` descending in [0, 1] and `labels`;
    they are in pixels of the original image, not of the network input; predicting is deterministic, and does not depend on the
    other images of a batch; the state dict round trip.

    Args:
        model: is not changed. It must predict something on random images: lower its score threshold for this check.
        num_classes: labels are in [0, num_classes).
        image_sizes: (h, w) of each image of the batch.
        masks: give the instances masks to learn from.
        unused: patterns of parameters that need no gradient.

    Raises:
        AssertionError: tells which promise is broken.
    """
    name = type(model).__name__
    require(isinstance(model, Model), f"{name} must be a visionkit.models.base.Model")
    model = copy.deepcopy(model)
    check_modes(model)

    for num_boxes, case in ((3, "with boxes"), (0, "without boxes")):
        def loss(module: Model, num_boxes: int = num_boxes, case: str = case) -> Tensor:
            torch.manual_seed(0)                             # target sampling may draw
            images, samples = _batch(module, image_sizes, num_boxes, num_classes, masks)
            return _total(module.loss(images, samples), f"{name}.loss on images {case}")

        with promise(f"{name}.loss fails on images {case}"):
            # Without a box some losses are rightly constant, but their parameters must still take part.
            check_gradients(model, loss, unused, nonzero=num_boxes > 0)
        with torch.autocast("cpu", torch.bfloat16), promise(f"{name}.loss fails under bfloat16 autocast"):
            check_gradients(model, loss, unused, nonzero=False)

    model.eval()
    predictions = _predict(model, image_sizes)
    _check_predictions(name, predictions, image_sizes, num_classes, scale=1.0)
    require(any(len(found.bboxes) for found in predictions),
            f"{name} predicts nothing on random images, so there is nothing to check; lower its score threshold for this check")
    _check_equal(_predict(model, image_sizes), predictions, 0.0, f"{name}.predict gives two results for the same images")

    exact = copy.deepcopy(model).double()                    # so that a difference is a mistake, not rounding
    size = image_sizes[0]
    with promise(f"{name}.predict does not run in float64, where batch invariance is checked"):
        together = _predict(exact, [size, size])
    for index in range(2):
        alone = _predict(exact, [size, size], only=index)
        _check_equal(alone, together[index:index + 1], 1e-6, f"{name}.predict gives image {index} another result in a batch than alone")
    doubled = _predict(exact, [size, size], scale=2.0)
    _check_predictions(name, doubled, [size, size], num_classes, scale=2.0)
    for found in together:
        found.bboxes = found.bboxes * 2
    _check_equal(doubled, together, 1e-6, f"{name}.predict must give boxes in pixels of the original image; for an image that was "
                                          f"shrunk to half its size they are not twice as large: divide by scale_factor")
    with torch.autocast("cpu", torch.bfloat16), promise(f"{name}.predict fails under bfloat16 autocast"):
        _check_predictions(f"{name} under bfloat16 autocast", _predict(model, image_sizes), image_sizes, num_classes, scale=1.0)
    check_state_dict(model, lambda module: [value for found in _predict(module, image_sizes) for value in (found.bboxes, found.scores)])


def _batch(model: Model, sizes: Sequence[tuple[int, int]], num_boxes: int, num_classes: int, masks: bool,
           scale: float = 1.0) -> tuple[ImageBatch | ImageList, list[Sample]]:
    """Random images of `sizes`, each shrunk from one `scale` times as large, with `num_boxes` random boxes."""
    generator = torch.Generator().manual_seed(0)
    inputs, samples = [], []
    for index, (height, width) in enumerate(sizes):
        inputs.append(torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8))
        corner = torch.rand(num_boxes, 2, generator=generator) * torch.tensor([width, height]) * 0.5
        side = (0.2 + 0.3 * torch.rand(num_boxes, 2, generator=generator)) * torch.tensor([width, height])
        boxes = torch.cat([corner, corner + side], dim=1)
        instances = InstanceData(bboxes=boxes, labels=torch.randint(0, num_classes, (num_boxes,), generator=generator))
        none = InstanceData(bboxes=boxes[:0], labels=instances.labels[:0])
        if masks:
            filled = torch.zeros(num_boxes, height, width, dtype=torch.bool)
            for mask, (x1, y1, x2, y2) in zip(filled, boxes.round().int().tolist(), strict=True):
                mask[y1:y2, x1:x2] = True
            instances.masks, none.masks = filled, filled[:0]
        sample = Sample(metainfo={
            "img_id": index, "img_path": f"{index}.png", "img_shape": (height, width), "scale_factor": (1 / scale, 1 / scale),
            "ori_shape": (round(height * scale), round(width * scale)), "flip": False, "flip_direction": None,
        })
        sample.gt_instances, sample.ignored_instances = instances, none
        samples.append(sample)
    data = model.data_preprocessor({"inputs": inputs, "data_samples": samples}, training=model.training)
    return data["images"], data["samples"]


def _total(losses: dict[str, Tensor], place: str) -> Tensor:
    require(isinstance(losses, dict) and len(losses) > 0, f"{place} must return a dict of scalars, got {type(losses).__name__}")
    for key, value in losses.items():
        came = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        require(isinstance(value, Tensor) and value.numel() == 1, f"{place}: {key!r} must be a scalar tensor, got {came}")
        require(value.isfinite(), f"{place}: {key!r} is {value.item()}")
    total = sum(value.float().sum() for value in losses.values())
    require(total.requires_grad, f"{place} has no gradient; is it detached?")
    return total


@torch.no_grad()
def _predict(model: Model, sizes: Sequence[tuple[int, int]], scale: float = 1.0, only: int | None = None) -> list[InstanceData]:
    """What the model finds; `only` keeps one image of the batch."""
    name = type(model).__name__
    images, samples = _batch(model, sizes, 0, 1, False, scale)
    images = images.to(next(model.parameters()).dtype)
    if only is not None:
        images, samples = images[only:only + 1], samples[only:only + 1]
    wanted = [sample.img_id for sample in samples]
    predicted = model.predict(images, samples)
    require([sample.img_id for sample in predicted] == wanted, f"{name}.predict must return one sample an image, in the order given")
    return [sample.pred_instances.clone() for sample in predicted]


def _check_predictions(name: str, predictions: list[InstanceData], sizes: Sequence[tuple[int, int]], num_classes: int,
                       scale: float) -> None:
    for found, (height, width) in zip(predictions, sizes, strict=True):
        lacking = [key for key in ("bboxes", "scores", "labels") if key not in found]
        require(not lacking, f"{name}.predict leaves out {', '.join(lacking)}")
        boxes, scores, labels = found.bboxes, found.scores, found.labels
        require(boxes.dim() == 2 and boxes.shape[1] == 4, f"{name}.predict: bboxes must be [N, 4], got {list(boxes.shape)}")
        require(boxes.isfinite().all() and scores.isfinite().all(), f"{name}.predict gives values that are not finite")
        limit = torch.tensor([width, height, width, height], dtype=boxes.dtype) * scale
        require((boxes >= -1e-3).all() and (boxes <= limit + 1e-3).all(),
                f"{name}.predict gives boxes outside of the original image of {round(height * scale)}x{round(width * scale)} pixels")
        require((boxes[:, 2:] >= boxes[:, :2]).all(), f"{name}.predict gives boxes with x2 < x1 or y2 < y1")
        require((scores >= 0).all() and (scores <= 1).all(), f"{name}.predict gives scores outside of [0, 1]")
        require((scores[:-1] >= scores[1:]).all(), f"{name}.predict must give the highest score first")
        require(not labels.is_floating_point() and (labels >= 0).all() and (labels < num_classes).all(),
                f"{name}.predict gives labels that are not integers in [0, {num_classes})")


def _check_equal(predictions: list[InstanceData], others: list[InstanceData], tolerance: float, message: str) -> None:
    for found, other in zip(predictions, others, strict=True):
        require(len(found.bboxes) == len(other.bboxes), f"{message}: {len(found.bboxes)} boxes and {len(other.bboxes)}")
        for key in ("bboxes", "scores", "labels"):
            difference = (found[key].double() - other[key].double()).abs().max().item() if len(found[key]) else 0.0
            require(difference <= tolerance, f"{message}: {key} differ by {difference:.2g}")
