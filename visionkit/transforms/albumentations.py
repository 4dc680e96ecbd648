"""The transforms of the albumentations package, with boxes, labels, flags and masks kept in step."""
from __future__ import annotations

import os
import random
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform

from visionkit.registry import TRANSFORMS, ConfigError, check_arguments, did_you_mean


@TRANSFORMS.register_module()
class Albumentations(BaseTransform):
    """Apply transforms of albumentations (Buslaev et al. 2020, arXiv:1809.06839) to image, boxes, masks and semantic map.

    Boxes are cut at the border before and after; an object of which nothing is left goes, with its label, flag and mask. The
    package has random states of its own; here they are set from numpy's before every image, so that augmentation follows the
    draw's seed, whichever worker it falls to. It is for training: `scale_factor` does not follow what happens here.

    Args:
        transforms: such as `dict(type="HorizontalFlip", p=0.5)`, named and with arguments as in the package; one that holds
            others (`OneOf`, `Sequential`, ...) has them in its own `transforms`.
        min_visible: the least part of a box's area that must be left.
        min_size: the least width and height of a box that is left, pixels.

    Raises:
        ConfigError: the package is not installed, has no such transform, or the transform refuses its arguments.
        ValueError: the pipeline's dict has key points, which the adapter does not carry.
    """

    FOREIGN = ("transforms",)                                # arguments whose dicts name classes that are in no registry

    def __init__(self, transforms: Sequence[Mapping[str, Any]], min_visible: float = 0.0, min_size: float = 1.0) -> None:
        package = import_albumentations()
        built = [_build(package, transform, ("transforms", index)) for index, transform in enumerate(transforms)]
        boxes = package.BboxParams(format="pascal_voc", label_fields=["index"], clip=True, filter_invalid_bboxes=True,
                                   min_visibility=min_visible, min_width=min_size, min_height=min_size)
        with warnings.catch_warnings():                      # it warns when no transform moves a box
            warnings.simplefilter("ignore")
            self.compose = package.Compose(built, bbox_params=boxes)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        if results.get("gt_keypoints") is not None:
            raise ValueError("Albumentations does not carry `gt_keypoints` along; use mmcv's transforms where there are key points")
        boxes = results.get("gt_bboxes", np.zeros((0, 4), np.float32))
        data = {"image": results["img"], "bboxes": boxes, "index": np.arange(len(boxes))}
        if results.get("gt_seg_map") is not None:
            data["mask"] = results["gt_seg_map"]
        if len(results.get("gt_masks", ())):                 # the package refuses an empty array
            data["masks"] = results["gt_masks"]
        seed = np.random.randint(2**31)
        # One state for all: `Compose.set_random_seed` gives every transform the same stream, and two flips would always agree.
        self.compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        data = self.compose(**data)

        results["img"] = np.ascontiguousarray(data["image"])
        results["img_shape"] = results["img"].shape[:2]
        if "mask" in data:
            results["gt_seg_map"] = data["mask"]
        kept = np.asarray(data["index"], np.int64).reshape(-1)
        if "gt_bboxes" in results:
            results["gt_bboxes"] = np.asarray(data["bboxes"], np.float32).reshape(-1, 4)
            for key in ("gt_bboxes_labels", "gt_ignore_flags"):
                if key in results:
                    results[key] = results[key][kept]
        if "gt_masks" in results:
            masks = np.asarray(data["masks"])[kept] if "masks" in data else []
            results["gt_masks"] = np.asarray(masks, np.uint8).reshape(-1, *results["img_shape"])
        return results

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.compose})"


def import_albumentations() -> ModuleType:
    """The package, imported without its look-up of newer versions on the network.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"             # data-loader workers inherit it
    try:
        import albumentations
    except ImportError as error:
        raise ConfigError(f"Albumentations needs the albumentations package: pip install 'visionkit[albumentations]' ({error})") from error
    return albumentations


def _build(package: ModuleType, transform: Mapping[str, Any], path: tuple[str | int, ...]) -> Any:
    if not isinstance(transform, Mapping) or "type" not in transform:
        raise ConfigError(f"wanted dict(type=..., ...) with a transform of albumentations, got {transform!r}", path)
    name = transform["type"]
    known = [key for key, value in vars(package).items()
             if isinstance(value, type) and issubclass(value, (package.BasicTransform, package.BaseCompose))]
    if name not in known:
        raise ConfigError(f"albumentations {package.__version__} has no transform named {name!r}.{did_you_mean(name, known)}",
                          (*path, "type"))
    arguments = {key: value for key, value in transform.items() if key != "type"}
    if "transforms" in arguments:
        arguments["transforms"] = [_build(package, inner, (*path, "transforms", index))
                                   for index, inner in enumerate(arguments["transforms"])]
    try:
        check_arguments(getattr(package, name), arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)      # a wrong argument only warns, and is dropped
            return getattr(package, name)(**arguments)
    except ConfigError as error:
        raise error.under(*path) from error.__cause__
    except (UserWarning, ValueError, TypeError) as error:
        raise ConfigError(f"albumentations' {name}: {error}", path) from error
