"""Panoptic ground truth in pipelines: a map becomes objects with masks, which go through the transforms of instances."""
from __future__ import annotations

from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmengine import fileio

from visionkit.registry import TRANSFORMS
from visionkit.structures import PanopticMap
from visionkit.structures.panoptic_map import boxes_of, decode_png
from visionkit.transforms.loading import BrokenImageError, LoadAnnotations, name_record

PER_OBJECT = ("gt_bboxes_labels", "gt_ignore_flags", "gt_masks")


@TRANSFORMS.register_module()
class LoadPanopticAnnotations(LoadAnnotations):
    """Turn a panoptic record into arrays, one entry a segment: `gt_masks` uint8 [N, h, w], `gt_bboxes` float32 [N, 4], the extents of
    the masks, of stuff as well, `gt_bboxes_labels` int64 [N] and `gt_ignore_flags` bool [N], true of crowds.

    The map is read from `seg_path`; where there is a `background_label` instead, it is laid from the masks of `instances`. It stands
    after the loader of the image.

    Args:
        keep_map: also keep the map in its original size, as `panoptic`, for `PanopticQuality` to compare with.
        backend_args: see LoadImageFromFile.

    Raises:
        BrokenImageError: the PNG is missing, truncated, or does not hold the segments that are described.
        ValueError: the record is not of a panoptic data set.
    """

    def __init__(self, keep_map: bool = False, backend_args: dict[str, Any] | None = None) -> None:
        super().__init__(with_mask=True)
        self.keep_map = keep_map
        self.backend_args = backend_args

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        if "seg_path" in results:
            panoptic = self.read(results)
        elif "background_label" in results:
            panoptic = self.lay(results)
        else:
            raise ValueError(f"{results.get('img_path')} has neither `seg_path` nor `background_label`: LoadPanopticAnnotations works "
                             f"on CocoPanopticDataset and CocoInstancesAsPanoptic")
        masks = panoptic.masks()
        results["gt_masks"] = masks.view(np.uint8)
        results["gt_bboxes"] = boxes_of(masks)
        results["gt_bboxes_labels"] = np.array([segment.label for segment in panoptic.segments], np.int64)
        results["gt_ignore_flags"] = np.array([segment.iscrowd for segment in panoptic.segments], bool)
        if self.keep_map:
            results["panoptic"] = panoptic
        return results

    def read(self, results: dict[str, Any]) -> PanopticMap:
        """The map of a PNG file."""
        described = [{"id": one["id"], "category_id": one["bbox_label"], "iscrowd": one["ignore_flag"]} for one in results["instances"]]
        described += [{"id": id_, "category_id": None} for id_ in results["void_ids"]]
        isthing = {one["bbox_label"]: one["isthing"] for one in results["instances"]}
        try:
            ids = decode_png(fileio.get(results["seg_path"], backend_args=self.backend_args))
            if ids.shape != tuple(results["ori_shape"]):
                raise ValueError(f"it has {list(ids.shape)} pixels, the image {list(results['ori_shape'])}")
            return PanopticMap.from_coco(ids, described, {label: label for label in isthing}, isthing)
        except (OSError, ValueError) as error:
            reason = "the file does not exist" if isinstance(error, FileNotFoundError) else str(error)
            raise BrokenImageError(f"cannot read the panoptic map {results['seg_path']} ({name_record(results)}): {reason}") from error

    def lay(self, results: dict[str, Any]) -> PanopticMap:
        """The map of masks that lie on a background."""
        instances, background = results["instances"], results["background_label"]
        return PanopticMap.of_layers(self.masks(results), [one["bbox_label"] for one in instances], [True] * background + [False],
                                     size=results["ori_shape"], iscrowd=[bool(one["ignore_flag"]) for one in instances],
                                     background=background)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(keep_map={self.keep_map}, backend_args={self.backend_args})"


@TRANSFORMS.register_module()
class BoxesFromMasks(BaseTransform):
    """Draw boxes anew around what is left of the masks, and leave out objects of which nothing is.

    After a crop the box of a mask that is not convex, such as stuff, is larger than what can be seen of it; after shrinking a small
    mask may be gone.

    Raises:
        ValueError: there are no masks.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        if "gt_masks" not in results:
            raise ValueError("BoxesFromMasks needs `gt_masks`: begin the pipeline with LoadPanopticAnnotations or "
                             "LoadAnnotations(with_mask=True)")
        boxes = boxes_of(results["gt_masks"])
        left = boxes[:, 2] > 0
        results["gt_bboxes"] = boxes[left]
        for key in PER_OBJECT:
            if key in results:
                results[key] = results[key][left]
        return results

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
