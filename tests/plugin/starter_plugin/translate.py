"""Augmentation by translation."""
import numpy as np

from visionkit.registry import TRANSFORMS


@TRANSFORMS.register_module()
class RandomTranslate:
    """Shift the image by a random distance; what comes in from outside is grey, objects that leave are dropped.

    Args:
        max_fraction: the largest shift, over width and height.
    """

    def __init__(self, max_fraction: float = 0.2) -> None:
        if not 0 <= max_fraction < 1:
            raise ValueError(f"max_fraction must be in [0, 1), got {max_fraction}")
        self.max_fraction = max_fraction

    def __call__(self, results: dict) -> dict:
        height, width = results["img"].shape[:2]
        # numpy's global generator is seeded for every sample: augmentation depends neither on workers nor on ranks
        dx, dy = (np.random.uniform(-1, 1, 2) * self.max_fraction * (width, height)).astype(int).tolist()
        results["img"] = _shifted(results["img"], dx, dy, fill=114)
        boxes = results["gt_bboxes"] + np.float32([dx, dy, dx, dy])
        results["gt_bboxes"] = boxes.clip(0, np.float32([width, height, width, height]))
        if "gt_masks" in results:
            results["gt_masks"] = np.stack([_shifted(mask, dx, dy, fill=0) for mask in results["gt_masks"]]) \
                if len(boxes) else results["gt_masks"]
        sides = results["gt_bboxes"][:, 2:] - results["gt_bboxes"][:, :2]
        kept = (sides > 0).all(axis=1)
        for key in ("gt_bboxes", "gt_bboxes_labels", "gt_ignore_flags", "gt_masks"):
            if key in results:
                results[key] = results[key][kept]
        return results


def _shifted(image: np.ndarray, dx: int, dy: int, fill: int) -> np.ndarray:
    """`image` [h, w, ...] moved `dx` to the right and `dy` down."""
    height, width = image.shape[:2]
    moved = np.full_like(image, fill)
    moved[max(dy, 0):height + min(dy, 0), max(dx, 0):width + min(dx, 0)] = \
        image[max(-dy, 0):height + min(-dy, 0), max(-dx, 0):width + min(-dx, 0)]
    return moved
