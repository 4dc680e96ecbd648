"""mmcv's geometric transforms, made to carry instance masks along with the boxes."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import mmcv
import mmcv.transforms
import numpy as np
from mmcv.transforms import BaseTransform

from visionkit.registry import TRANSFORMS


@TRANSFORMS.register_module()
class Resize(mmcv.transforms.Resize):
    """mmcv's Resize of image, boxes, semantic map and key points, and of `gt_masks`.

    `scale_factor` (x, y) is always the network input over the original, however many times a pipeline resizes.

    Args:
        scale: (width, height) in pixels; with `keep_ratio` the box that the image must fit in. One number stands for both.
        scale_factor: instead of `scale`, the factor, or one for x and one for y.
        keep_ratio: keep the aspect ratio.
        clip_object_border: cut boxes at the image's border.
        backend: `cv2` or `pillow`.
        interpolation: `nearest`, `bilinear`, `bicubic`, `area` or `lanczos`.
    """

    def __init__(self, scale: int | Sequence[int] | None = None, scale_factor: float | Sequence[float] | None = None,
                 keep_ratio: bool = False, clip_object_border: bool = True, backend: str = "cv2",
                 interpolation: str = "bilinear") -> None:
        if (scale is None) == (scale_factor is None):
            raise ValueError(f"Resize needs either scale=(width, height) or scale_factor, got {scale=} and {scale_factor=}")
        if backend not in ("cv2", "pillow"):
            raise ValueError(f"backend must be 'cv2' or 'pillow', got {backend!r}")
        known = ("nearest", "bilinear", "bicubic", "area", "lanczos")[:5 if backend == "cv2" else 2]
        if interpolation not in known:
            raise ValueError(f"interpolation of the backend {backend!r} must be one of {', '.join(known)}; got {interpolation!r}")
        scale_factor = float(scale_factor) if isinstance(scale_factor, int) else scale_factor
        super().__init__(tuple(scale) if isinstance(scale, Sequence) else scale,
                         tuple(scale_factor) if isinstance(scale_factor, Sequence) else scale_factor,
                         keep_ratio, clip_object_border, backend, interpolation)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        before = results.get("scale_factor", (1.0, 1.0))
        results = super().transform(results)
        results["scale_factor"] = (before[0] * results["scale_factor"][0], before[1] * results["scale_factor"][1])
        if results.get("gt_bboxes") is not None:
            results["gt_bboxes"] = results["gt_bboxes"].astype(np.float32)               # mmcv returns float64
        if results.get("gt_masks") is not None:
            height, width = results["img_shape"]
            masks = [cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST) for mask in results["gt_masks"]]
            results["gt_masks"] = np.array(masks, np.uint8).reshape(-1, height, width)
        return results

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of what becomes of an image of so many pixels."""
        scale = self.scale or tuple(int(side * factor + 0.5) for side, factor in zip((width, height), self.scale_factor, strict=True))
        new_width, new_height = mmcv.rescale_size((width, height), scale) if self.keep_ratio else scale
        return new_height, new_width


@TRANSFORMS.register_module()
class RandomFlip(mmcv.transforms.RandomFlip):
    """mmcv's RandomFlip of image, boxes, semantic map and key points, and of `gt_masks`.

    Args:
        prob: of a flip; or one probability a direction, together at most 1.
        direction: `horizontal`, `vertical` or `diagonal`, or several; one `prob` is shared equally among several.
        swap_seg_labels: pairs of labels of the semantic map that trade places, such as left and right arm.
    """

    def __init__(self, prob: float | Sequence[float] = 0.5, direction: str | Sequence[str] = "horizontal",
                 swap_seg_labels: Sequence[Sequence[int]] | None = None) -> None:
        directions = [direction] if isinstance(direction, str) else list(direction)
        probs = [float(p) for p in prob] if isinstance(prob, Sequence) else [float(prob)]
        if min(probs, default=-1) < 0 or sum(probs) > 1:
            raise ValueError(f"a flip probability lies between 0 and 1, and several sum to 1 at most; got prob={prob}")
        if isinstance(prob, Sequence) and len(probs) != len(directions):
            raise ValueError(f"one probability a direction is needed: got prob={prob} for direction={direction}")
        for name in directions:
            if name not in ("horizontal", "vertical", "diagonal"):
                raise ValueError(f"direction must be 'horizontal', 'vertical' or 'diagonal', got {name!r}")
        super().__init__(probs if isinstance(prob, Sequence) else probs[0], directions, swap_seg_labels)

    def _flip(self, results: dict[str, Any]) -> None:
        super()._flip(results)
        if results.get("gt_masks") is not None:
            axes = {"horizontal": (2,), "vertical": (1,), "diagonal": (1, 2)}[results["flip_direction"]]
            results["gt_masks"] = np.ascontiguousarray(np.flip(results["gt_masks"], axes))

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """The same; draws whether to flip, as for an image."""
        self._choose_direction()
        return height, width


@TRANSFORMS.register_module()
class TestTimeAug(mmcv.transforms.TestTimeAug):
    """mmcv's TestTimeAug: several views of an image, whose `inputs` and `data_samples` become lists. The config stays as it is.

    Args:
        transforms: a list of steps, each a list of alternatives; every combination is a view.
    """

    __test__ = False                                         # its name begins like that of a test case

    def __init__(self, transforms: Sequence[Sequence[Any]]) -> None:
        super().__init__([list(alternatives) for alternatives in transforms])


@TRANSFORMS.register_module()
class RandomCrop(BaseTransform):
    """Cut out a random window; objects of which less than `min_visible` is left go, together with labels, flags and masks.

    An image that is smaller than the window keeps that side.

    Args:
        size: (width, height) of the window, pixels.
        min_visible: the least part of a box's area that must be left.
        min_size: (width, height); each side of the window is then drawn between this and `size`.
    """

    def __init__(self, size: Sequence[int], min_visible: float = 0.2, min_size: Sequence[int] | None = None) -> None:
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be (width, height) in pixels, got {size}")
        if min_size is not None and (len(min_size) != 2 or min(min_size) < 1 or min_size[0] > size[0] or min_size[1] > size[1]):
            raise ValueError(f"min_size must be (width, height) in pixels and no larger than size={tuple(size)}, got {min_size}")
        if not 0 <= min_visible <= 1:
            raise ValueError(f"min_visible is a part of a box's area, 0 to 1, got {min_visible}")
        self.size = tuple(size)
        self.min_size = self.size if min_size is None else tuple(min_size)
        self.min_visible = min_visible

    @property
    def random_size(self) -> bool:
        """Whether the size of the window is drawn."""
        return self.min_size != self.size

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        return cut(results, *self.window(*results["img"].shape[:2]), self.min_visible)

    def window(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Left, top, width and height of a window in an image of so many pixels."""
        new_width, new_height = (np.random.randint(min(least, side), min(most, side) + 1)
                                 for least, most, side in zip(self.min_size, self.size, (width, height), strict=True))
        return np.random.randint(width - new_width + 1), np.random.randint(height - new_height + 1), new_width, new_height

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the window in an image of so many pixels; draws it."""
        _, _, new_width, new_height = self.window(height, width)
        return new_height, new_width

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size={self.size}, min_visible={self.min_visible}, min_size={self.min_size})"


@TRANSFORMS.register_module()
class RandomShift(BaseTransform):
    """Move the image by a whole number of pixels in both directions: what others call padding by so many and cutting the old size out
    again, as is usual on CIFAR. Objects of which less than `min_visible` is left go.

    Args:
        pixels: the most that it moves, either way.
        fill: what comes in at the other side, 0 to 255.
        min_visible: the least part of a box's area that must be left.
    """

    def __init__(self, pixels: int = 4, fill: float = 0, min_visible: float = 0.2) -> None:
        if pixels < 0 or not 0 <= fill <= 255 or not 0 <= min_visible <= 1:
            raise ValueError(f"pixels is 0 or more, fill lies within 0 and 255, min_visible within 0 and 1; got {pixels=}, {fill=}, "
                             f"{min_visible=}")
        self.pixels = pixels
        self.fill = fill
        self.min_visible = min_visible

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        height, width = results["img"].shape[:2]
        left, top = np.random.randint(-self.pixels, self.pixels + 1, 2)
        return cut(results, int(left), int(top), width, height, self.min_visible, self.fill)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """The same; draws where to move, as for an image."""
        np.random.randint(-self.pixels, self.pixels + 1, 2)
        return height, width

    def __repr__(self) -> str:
        return f"{type(self).__name__}(pixels={self.pixels}, fill={self.fill}, min_visible={self.min_visible})"


@TRANSFORMS.register_module()
class RandomResizedCrop(BaseTransform):
    """Cut out a window of random area and shape, and scale it to one size (Szegedy et al. 2015, arXiv:1409.4842, sec. 6); objects of which
    less than `min_visible` is left go.

    Args:
        size: (width, height) of the result, pixels; one number stands for both.
        area: the least and the most of the image's area that the window covers.
        aspect: its least and its largest width over height; drawn evenly on a logarithmic scale.
        min_visible: the least part of a box's area that must be left.
        interpolation: as `Resize` has it.
    """
    TRIES = 10                                               # before the largest window in the middle is taken

    def __init__(self, size: int | Sequence[int], area: Sequence[float] = (0.08, 1.0), aspect: Sequence[float] = (3 / 4, 4 / 3),
                 min_visible: float = 0.2, interpolation: str = "bilinear") -> None:
        size = (size, size) if isinstance(size, int) else tuple(size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be (width, height) in pixels, got {size}")
        if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
            raise ValueError(f"area must be (least, most) of the image's area, above 0 and up to 1; got {area}")
        if len(aspect) != 2 or not 0 < aspect[0] <= aspect[1]:
            raise ValueError(f"aspect must be (least, most) width over height, above 0; got {aspect}")
        if not 0 <= min_visible <= 1:
            raise ValueError(f"min_visible is a part of a box's area, 0 to 1, got {min_visible}")
        self.size, self.area, self.aspect, self.min_visible = size, tuple(area), tuple(aspect), min_visible
        self.resize = Resize(scale=size, interpolation=interpolation)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        return self.resize(cut(results, *self.window(*results["img"].shape[:2]), self.min_visible))

    def window(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Left, top, width and height of a window in an image of so many pixels."""
        for _ in range(self.TRIES):
            area = np.random.uniform(*self.area) * height * width
            aspect = np.exp(np.random.uniform(*np.log(self.aspect)))
            w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(np.random.randint(width - w + 1)), int(np.random.randint(height - h + 1)), w, h
        aspect = min(max(width / height, self.aspect[0]), self.aspect[1])
        w, h = max(1, min(width, round(height * aspect))), max(1, min(height, round(width / aspect)))
        return (width - w) // 2, (height - h) // 2, w, h

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the result; draws the window, as for an image."""
        self.window(height, width)
        return self.resize.output_size(height, width)

    def __repr__(self) -> str:
        return (f"{type(self).__name__}(size={self.size}, area={self.area}, aspect={self.aspect}, min_visible={self.min_visible}, "
                f"interpolation={self.resize.interpolation!r})")


def cut(results: dict[str, Any], left: int, top: int, width: int, height: int, min_visible: float, fill: float = 0) -> dict[str, Any]:
    """Cut a window out of the image of a pipeline, with its boxes and masks.

    Args:
        results: the pipeline's dict; changed.
        left: of the window, pixels; below 0 where it begins beside the image, as it may end there.
        top: likewise.
        width: of the window, pixels.
        height: likewise.
        min_visible: objects of which less than this part of the box's area is left go, with labels, flags and masks.
        fill: what the window holds beside the image; masks hold 0 there.
    """
    results["img"] = _window(results["img"], left, top, width, height, fill)
    results["img_shape"] = (height, width)
    if results.get("gt_masks") is not None:
        masks = [_window(mask, left, top, width, height, 0) for mask in results["gt_masks"]]
        results["gt_masks"] = np.array(masks, np.uint8).reshape(-1, height, width)
    if results.get("gt_bboxes") is not None:
        before = results["gt_bboxes"]
        boxes = np.clip(before - np.float32([left, top, left, top]), 0, np.float32([width, height] * 2))
        keep = (_area(boxes) > 0) & (_area(boxes) >= min_visible * _area(before))
        results["gt_bboxes"] = boxes[keep]
        for key in ("gt_bboxes_labels", "gt_ignore_flags", "gt_masks"):
            if key in results:
                results[key] = results[key][keep]
    return results


def _window(image: np.ndarray, left: int, top: int, width: int, height: int, fill: float) -> np.ndarray:
    window = np.full((height, width, *image.shape[2:]), fill, image.dtype)
    y1, y2 = max(top, 0), min(top + height, image.shape[0])
    x1, x2 = max(left, 0), min(left + width, image.shape[1])
    if y2 > y1 and x2 > x1:                                  # the window reaches the image
        window[y1 - top:y2 - top, x1 - left:x2 - left] = image[y1:y2, x1:x2]
    return window


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
