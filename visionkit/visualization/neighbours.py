"""Images beside their nearest neighbours."""
from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from visionkit.visualization.draw import contact_sheet

CELL = 128                                                   # pixels, the longer side of a picture
FRAME = 5                                                    # pixels
QUERY, RIGHT, WRONG, UNKNOWN = (235, 235, 235), (60, 170, 80), (215, 55, 50), (110, 110, 110)


def draw_neighbours(images: Sequence[Sequence[np.ndarray]], labels: Sequence[Sequence[int | None]],
                    classes: Sequence[str] = ()) -> np.ndarray:
    """A sheet with a row a query: the image in a white frame, then its neighbours, the nearest first.

    Where labels are known, a neighbour of the query's class has a green frame, one of another a red frame and a cross before its class.

    Args:
        images: of each row, the query first; uint8 [h, w, 3], RGB.
        labels: one an image, None where it is not known.
        classes: names of the labels; a label beyond them is shown as its number.

    Raises:
        ValueError: labels and images are not as many, or the rows not as long as each other.
    """
    if not images or len({*map(len, images), *map(len, labels)}) != 1 or len(images) != len(labels):
        raise ValueError(f"every row needs as many images as labels, and all rows as many as the first; got {[len(row) for row in images]} "
                         f"images and {[len(row) for row in labels]} labels")
    pictures, captions = [], []
    for row, row_labels in zip(images, labels, strict=True):
        for place, (image, label) in enumerate(zip(row, row_labels, strict=True)):
            name = "" if label is None else classes[label] if label < len(classes) else str(label)
            known = label is not None and row_labels[0] is not None
            right = label == row_labels[0]
            color = QUERY if place == 0 else UNKNOWN if not known else RIGHT if right else WRONG
            pictures.append(_framed(image, color))
            captions.append(name if place == 0 or not known or right else f"x {name}")
    return contact_sheet(pictures, len(images[0]), captions=captions, cell=CELL)


def _framed(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    scale = (CELL - 2 * FRAME) / max(image.shape[:2])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    inner = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    return cv2.copyMakeBorder(inner, FRAME, FRAME, FRAME, FRAME, cv2.BORDER_CONSTANT, value=color)
