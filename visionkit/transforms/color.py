"""Random changes of colour."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from mmcv.transforms import BaseTransform

from visionkit.registry import TRANSFORMS


@TRANSFORMS.register_module()
class PhotoMetricDistortion(BaseTransform):
    """Change brightness, contrast, saturation and hue of an RGB image, each with probability 1/2 (as in SSD, Liu et al. 2016,
    arXiv:1512.02325, sec. 2.2). Contrast comes before or after colour, by chance.

    Args:
        brightness_delta: the most that is added to every value, of 255.
        contrast_range: the smallest and largest factor of all values.
        saturation_range: the smallest and largest factor of the saturation.
        hue_delta: the most that the hue turns, degrees.
        prob: that the image is changed at all.
    """

    def __init__(self, brightness_delta: float = 32, contrast_range: Sequence[float] = (0.5, 1.5),
                 saturation_range: Sequence[float] = (0.5, 1.5), hue_delta: float = 18, prob: float = 1.0) -> None:
        for name, (low, high) in {"contrast_range": contrast_range, "saturation_range": saturation_range}.items():
            if not 0 <= low <= high:
                raise ValueError(f"{name} must be (smallest, largest) factor, got ({low}, {high})")
        if not 0 <= brightness_delta <= 255 or not 0 <= hue_delta <= 180 or not 0 <= prob <= 1:
            raise ValueError(f"brightness_delta lies within 0 and 255, hue_delta within 0 and 180, prob within 0 and 1; got "
                             f"{brightness_delta=}, {hue_delta=}, {prob=}")
        self.brightness_delta = brightness_delta
        self.contrast_range = tuple(contrast_range)
        self.saturation_range = tuple(saturation_range)
        self.hue_delta = hue_delta
        self.prob = prob

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        apply, brighten, contrast, saturate, turn, first = np.random.random(6) < (self.prob, 0.5, 0.5, 0.5, 0.5, 0.5)
        shift, hue = np.random.uniform(-1, 1, 2) * (self.brightness_delta * brighten, self.hue_delta * turn)
        gain = np.random.uniform(*self.contrast_range) if contrast else 1.0
        saturation = np.random.uniform(*self.saturation_range) if saturate else 1.0
        if apply:
            image = shift_and_scale(results["img"], shift, gain if first else 1.0)
            image = change_color(image, saturation, hue)
            results["img"] = shift_and_scale(image, 0.0, 1.0 if first else gain)
        return results

    def __repr__(self) -> str:
        return (f"{type(self).__name__}(brightness_delta={self.brightness_delta}, contrast_range={self.contrast_range}, "
                f"saturation_range={self.saturation_range}, hue_delta={self.hue_delta}, prob={self.prob})")


def shift_and_scale(image: np.ndarray, shift: float, gain: float) -> np.ndarray:
    """`(image + shift) * gain` of a uint8 image, cut at 0 and 255."""
    if shift == 0 and gain == 1:
        return image
    table = np.clip(np.round((np.arange(256) + shift) * gain), 0, 255).astype(np.uint8)
    return cv2.LUT(image, table)


def change_color(image: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """Scale the saturation of a uint8 RGB image and turn its hue by so many degrees."""
    if saturation == 1 and hue == 0:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)        # all three channels 0..255, the hue a full circle
    hsv[..., 0] += np.uint8(round(hue / 360 * 256) % 256)    # wraps, as a hue does
    hsv[..., 1] = cv2.LUT(hsv[..., 1], np.clip(np.round(np.arange(256) * saturation), 0, 255).astype(np.uint8))
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
