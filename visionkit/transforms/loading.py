"""From a record of a data set to pixels and arrays: the first transforms of every pipeline."""
from __future__ import annotations

import io
import struct
from logging import WARNING
from typing import Any

import cv2
import numpy as np
from mmcv.transforms import BaseTransform
from mmengine import fileio
from mmengine.logging import print_log
from PIL import Image
from pycocotools import mask as coco_mask

from visionkit.registry import TRANSFORMS

ORIENTATION = 0x0112                                         # EXIF's tag


class BrokenImageError(ValueError):
    """An image is missing, truncated or not an image; the message names the file, the image id and its annotation ids."""


def decode_image(data: bytes, *, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode an image file to uint8 [h, w, 3], RGB, turned upright by its EXIF tag.

    Args:
        data: the file's content.
        size: (h, w) by the annotation file. Where only the picture *without* the EXIF turn has it, the boxes were drawn on that
            one, and it is what comes back.

    Raises:
        ValueError: the data is cut off or no image; says which.
    """
    if not data:
        raise ValueError("the file is empty")
    if missing_end(data):
        raise ValueError(f"the file is truncated: {missing_end(data)} after {len(data)} bytes")
    image = _decode(data, cv2.IMREAD_COLOR)
    if size is not None and image.shape[:2] == size[::-1] != size:
        image = _decode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_size(path: str) -> tuple[int, int]:
    """The (height, width) that `decode_image` gives the picture in a file, pixels; only the head of a local file is read.

    Raises:
        OSError: there is no such file, or it is no image.
    """
    with Image.open(io.BytesIO(fileio.get(path)) if "://" in path else path) as image:
        width, height = image.size
        turned = image.getexif().get(ORIENTATION, 1) >= 5    # 5 to 8: on its side
    return (width, height) if turned else (height, width)


def _decode(data: bytes, flags: int) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise ValueError(f"OpenCV cannot decode it: {error}") from error
    if image is None:
        raise ValueError(f"the content is not an image that OpenCV can decode (it starts with {data[:8]!r})")
    return image


def missing_end(data: bytes) -> str:
    """What a cut-off JPEG, PNG or WebP file lacks, or an empty string.

    OpenCV decodes the first part of such a file, fills the rest with grey, and reports success.
    """
    if data[:3] == b"\xff\xd8\xff" and data.find(b"\xff\xd9", _start_of_scan(data)) < 0:
        return "no end-of-image marker"
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data.rfind(b"IEND") < 0:
        return "no IEND chunk"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) < 8 + struct.unpack("<I", data[4:8])[0]:
        return f"{struct.unpack('<I', data[4:8])[0]} bytes announced"
    return ""


def _start_of_scan(data: bytes) -> int:
    """Where the first scan of a JPEG starts; an EXIF thumbnail before it has an end-of-image marker of its own."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        if data[position + 1] == 0xFF:                       # padding before a marker
            position += 1
            continue
        if data[position + 1] == 0xDA:
            return position
        position += 2 + struct.unpack(">H", data[position + 2:position + 4])[0]
    return min(position, len(data))


@TRANSFORMS.register_module()
class LoadImageFromFile(BaseTransform):
    """Read `img_path` into `img`, uint8 [h, w, 3], RGB. An `img` that is there already, as in generated data, is kept.

    Args:
        backend_args: how mmengine's file clients reach the file, as in mmcv; by default the path decides.

    Raises:
        BrokenImageError: the file is missing, truncated or not an image.
    """

    def __init__(self, backend_args: dict[str, Any] | None = None) -> None:
        self.backend_args = backend_args
        self.told = False                                    # of a picture that is not of the size its annotations say

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        if results.get("img") is None:
            results["img"] = self.read(results)
        results["img_shape"] = results["ori_shape"] = results["img"].shape[:2]
        return results

    def read(self, results: dict[str, Any]) -> np.ndarray:
        size = (results["height"], results["width"]) if results.get("height") and results.get("width") else None
        try:
            image = decode_image(fileio.get(results["img_path"], backend_args=self.backend_args), size=size)
        except (OSError, ValueError) as error:
            reason = "the file does not exist" if isinstance(error, FileNotFoundError) else str(error)
            raise BrokenImageError(f"cannot read the image {results['img_path']} ({name_record(results)}): {reason}") from error
        if size and image.shape[:2] != size and not self.told:
            self.told = True                                 # once a process: if it is one, it is likely to be many
            print_log(f"{results['img_path']} ({name_record(results)}) is {image.shape[1]}x{image.shape[0]} pixels, its annotations say "
                      f"{size[1]}x{size[0]}: its boxes may be on another scale; tools/check.py lists all such files", "current", WARNING)
        return image

    def __repr__(self) -> str:
        return f"{type(self).__name__}(backend_args={self.backend_args})"


def name_record(results: dict[str, Any]) -> str:
    """`image id 7, annotation ids 12, 13`: how an error names one record of a data set."""
    ids = [str(instance["id"]) for instance in results.get("instances", ()) if "id" in instance]
    shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    return f"image id {results.get('img_id')}, " + (f"annotation id{'s' * (len(ids) > 1)} {shown}" if ids else "no annotations")


@TRANSFORMS.register_module()
class LoadAnnotations(BaseTransform):
    """Turn `instances` into arrays: `gt_bboxes` float32 [N, 4], `gt_bboxes_labels` int64 [N], `gt_ignore_flags` bool [N], and
    `gt_masks` uint8 [N, h, w] where asked for. Needs the image's `img_shape` for masks, so it stands after the loader.

    Args:
        with_bbox: load boxes and ignore flags.
        with_label: load labels.
        with_mask: load masks; every instance must have one.

    Raises:
        ValueError: masks are asked for and an instance has none.
    """

    def __init__(self, with_bbox: bool = True, with_label: bool = True, with_mask: bool = False) -> None:
        self.with_bbox = with_bbox
        self.with_label = with_label
        self.with_mask = with_mask

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        instances = results["instances"]
        if self.with_bbox:
            results["gt_bboxes"] = np.array([instance["bbox"] for instance in instances], np.float32).reshape(-1, 4)
            results["gt_ignore_flags"] = np.array([bool(instance.get("ignore_flag", 0)) for instance in instances], bool)
        if self.with_label:
            results["gt_bboxes_labels"] = np.array([instance["bbox_label"] for instance in instances], np.int64)
        if self.with_mask:
            results["gt_masks"] = self.masks(results)
        return results

    def masks(self, results: dict[str, Any]) -> np.ndarray:
        height, width = results["ori_shape"]
        masks = np.zeros((len(results["instances"]), height, width), np.uint8)
        for mask, instance in zip(masks, results["instances"], strict=True):
            if "mask" not in instance:
                raise ValueError(f"with_mask=True needs a mask for every object, but annotation {instance.get('id')} of "
                                 f"{results.get('img_path')} has none; set with_mask=False")
            try:
                mask[:] = decode_mask(instance["mask"], height, width)
            except ValueError as error:
                raise ValueError(f"annotation {instance.get('id')} of {results.get('img_path')}: {error}") from error
        return masks

    def __repr__(self) -> str:
        return f"{type(self).__name__}(with_bbox={self.with_bbox}, with_label={self.with_label}, with_mask={self.with_mask})"


def decode_mask(mask: list | dict[str, Any], height: int, width: int) -> np.ndarray:
    """A COCO segmentation to uint8 [height, width] of 0 and 1.

    Args:
        mask: polygons, each a flat list x1, y1, x2, y2, ... in pixels, or an RLE, its `counts` compressed or not.
        height: of the image, pixels.
        width: likewise.
    """
    if isinstance(mask, dict) and isinstance(mask["counts"], (str, bytes)):
        if tuple(mask["size"]) != (height, width):
            raise ValueError(f"a mask of {tuple(mask['size'])} pixels does not lie on an image of {(height, width)}")
        return coco_mask.decode(mask)
    if isinstance(mask, dict):
        return coco_mask.decode(coco_mask.frPyObjects(mask, height, width))
    polygons = [polygon for polygon in mask if len(polygon) >= 6]
    if not polygons:
        return np.zeros((height, width), np.uint8)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))
