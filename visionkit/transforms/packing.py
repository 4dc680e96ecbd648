"""The last transform of a pipeline: arrays to what a model takes."""
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform

from visionkit.registry import TRANSFORMS
from visionkit.structures import InstanceData, Sample

FIELDS = {"gt_bboxes": "bboxes", "gt_bboxes_labels": "labels", "gt_masks": "masks"}


@TRANSFORMS.register_module()
class PackSample(BaseTransform):
    """Pack one image and what is known about it into `{"inputs": tensor [3, h, w], "data_samples": Sample}`.

    Objects that no longer reach into the image (a crop cut them off, or the file has a box without extent) are left out of
    `gt_instances`: nothing can be learnt from them. Those with an ignore flag go to `ignored_instances`. `gt_label`, the class of a whole
    image, goes to the sample's field of that name.

    Args:
        meta_keys: further keys of the pipeline's dict to keep as meta information of the sample.

    Raises:
        ValueError: boxes, labels, ignore flags and masks are out of step, or a key to keep is not there.
    """

    def __init__(self, meta_keys: tuple[str, ...] = ()) -> None:
        self.meta_keys = tuple(meta_keys)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        image = results["img"]
        height, width = image.shape[:2]
        sample = Sample(metainfo={
            "img_id": results.get("img_id"), "img_path": results.get("img_path"),
            "ori_shape": tuple(results.get("ori_shape", (height, width))), "img_shape": (height, width),
            "scale_factor": tuple(map(float, results.get("scale_factor", (1.0, 1.0)))),
            "flip": bool(results.get("flip", False)), "flip_direction": results.get("flip_direction"),
            "annotations": results.get("instances", [])})
        for key in ("caption", "replaced", "panoptic"):
            if key in results:
                sample.set_metainfo({key: results[key]})
        for key in self.meta_keys:
            if key not in results:
                raise ValueError(f"PackSample is to keep {key!r}, but the pipeline's dict has only {', '.join(sorted(results))}")
            sample.set_metainfo({key: results[key]})
        if "gt_label" in results:
            sample.gt_label = torch.tensor(results["gt_label"], dtype=torch.int64)
        if "gt_bboxes" in results:
            sample.gt_instances, sample.ignored_instances = self.instances(results, height, width)
        return {"inputs": _to_tensor(image), "data_samples": sample}

    def instances(self, results: dict[str, Any], height: int, width: int) -> tuple[InstanceData, InstanceData]:
        boxes = results["gt_bboxes"]
        ignored = results.get("gt_ignore_flags", np.zeros(len(boxes), bool))
        fields = {name: results[key] for key, name in FIELDS.items() if key in results}
        lengths = {name: len(value) for name, value in {**fields, "ignore flags": ignored}.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"a transform changed the number of objects in one array but not in the others: {lengths}")
        if "masks" in fields and fields["masks"].shape[1:] != (height, width):
            raise ValueError(f"masks of {fields['masks'].shape[1:]} pixels do not lie on the image of {(height, width)}: a transform "
                             f"changed the image but not `gt_masks`; of mmcv's, Resize and RandomFlip carry masks along")
        inside = ((np.minimum(boxes[:, 2], width) > np.maximum(boxes[:, 0], 0))
                  & (np.minimum(boxes[:, 3], height) > np.maximum(boxes[:, 1], 0)))
        return _pack(fields, inside & ~ignored), _pack(fields, inside & ignored)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(meta_keys={self.meta_keys})"


def _pack(fields: dict[str, np.ndarray], keep: np.ndarray) -> InstanceData:
    dtypes = {"bboxes": torch.float32, "labels": torch.int64, "masks": torch.bool}
    return InstanceData(**{name: torch.as_tensor(np.ascontiguousarray(value[keep])).to(dtypes[name]) for name, value in fields.items()})


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
