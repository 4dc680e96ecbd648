"""Boxes, masks, names and scores on pictures; pictures beside each other.

All images are uint8 [h, w, 3], RGB. Line width and text grow with the picture, and a small picture is enlarged first, so that what is
drawn can be read at any size.
"""
from __future__ import annotations

import colorsys
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from visionkit.structures import PanopticMap

FONT = cv2.FONT_HERSHEY_SIMPLEX
SMALLEST = 480                                               # pixels; a picture whose longer side is below is enlarged to it
GOLDEN_ANGLE = 0.381966                                      # of the colour circle: neighbours in the list are far apart in hue


def class_color(label: int) -> tuple[int, int, int]:
    """The RGB colour of a class, the same in every picture."""
    lightness, saturation = ((0.55, 0.95), (0.42, 0.85), (0.68, 0.9))[label // 8 % 3]
    red, green, blue = colorsys.hls_to_rgb((0.97 + label * GOLDEN_ANGLE) % 1, lightness, saturation)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_instances(image: np.ndarray, boxes: Any, labels: Any, scores: Any = None, *, classes: Sequence[str] = (), masks: Any = None,
                   ignored: Any = None, smallest: int = SMALLEST) -> np.ndarray:
    """A copy of `image` with boxes, class names and scores drawn on it.

    Args:
        image: uint8 [h, w, 3], RGB.
        boxes: [N, 4] as (x1, y1, x2, y2), pixels of `image`; a tensor, an array or a list.
        labels: [N] indices into `classes`.
        scores: [N]; boxes with a high score are drawn last, on top.
        classes: names; a label beyond them is shown as its number.
        masks: [N, h, w] bool, tinted in the colour of the class.
        ignored: [N] bool: drawn thin and grey, as a crowd region.
        smallest: an image whose longer side is below so many pixels is enlarged to it; 0 keeps its size.

    Returns:
        uint8 [h', w', 3], RGB; [h, w, 3] unless it was enlarged.

    Raises:
        ValueError: boxes, labels and scores are not as many as each other, or the image is not uint8 [h, w, 3].
    """
    image = _as_picture(image)
    boxes, labels = _numbers(boxes).reshape(-1, 4), _numbers(labels).astype(int).reshape(-1)
    scores = None if scores is None else _numbers(scores).reshape(-1)
    ignored = np.zeros(len(boxes), bool) if ignored is None else _numbers(ignored).astype(bool)
    if len(labels) != len(boxes) or len(ignored) != len(boxes) or (scores is not None and len(scores) != len(boxes)):
        raise ValueError(f"one label and one score a box are needed, got {len(boxes)} boxes, {len(labels)} labels and "
                         f"{'no' if scores is None else len(scores)} scores")
    if masks is not None:
        image = _tint(image, _numbers(masks).astype(bool), labels)
    canvas, scale = enlarge(image, smallest)
    canvas = np.ascontiguousarray(canvas)
    unit = max(canvas.shape[:2])
    width = max(2, round(unit / 320))
    order = range(len(boxes)) if scores is None else np.argsort(scores, kind="stable")
    for index in order:
        color = (160, 160, 160) if ignored[index] else class_color(labels[index])
        _frame(canvas, boxes[index] * scale, color, max(1, width // 2) if ignored[index] else width)
    taken: list[tuple[int, int, int, int]] = []
    for index in reversed(list(order)):                      # the surest first: it gets the best place for its name
        name = classes[labels[index]] if 0 <= labels[index] < len(classes) else str(labels[index])
        text = "ignored" if ignored[index] else name if scores is None else f"{name} {scores[index]:.2f}"
        color = (160, 160, 160) if ignored[index] else class_color(labels[index])
        taken.append(_tag(canvas, text, boxes[index] * scale, color, max(0.42, unit / 1200), taken))
    return canvas


def draw_panoptic(image: np.ndarray, panoptic: PanopticMap, *, classes: Sequence[str] = (), smallest: int = SMALLEST) -> np.ndarray:
    """A copy of `image` with each segment tinted in the colour of its class, an edge around it, and its name in it where it fits.

    Args:
        image: uint8 [h, w, 3], RGB.
        panoptic: of [h, w] pixels; neighbouring things of one class differ in lightness, void is darkened.
        classes: names; a label beyond them is shown as its number.
        smallest: as in `draw_instances`.

    Raises:
        ValueError: the map and the image are not of one size, or the image is not uint8 [h, w, 3].
    """
    image = _as_picture(image)
    if panoptic.ids.shape != image.shape[:2]:
        raise ValueError(f"a panoptic map of {list(panoptic.ids.shape)} pixels does not lie on an image of {list(image.shape[:2])}")
    canvas, _ = enlarge(image, smallest)
    ids = cv2.resize(panoptic.ids, canvas.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    segments = sorted(panoptic.segments, key=lambda segment: -segment.area)
    tint = np.zeros_like(canvas)
    for index, segment in enumerate(segments):
        shade = (1.0, 0.8, 0.6)[index % 3] if segment.isthing else 1.0
        tint[ids == segment.id] = np.multiply(class_color(segment.label), shade).astype(np.uint8)
    canvas = cv2.addWeighted(canvas, 0.5, tint, 0.5, 0)
    edge = np.zeros(ids.shape, bool)
    edge[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    edge[1:] |= ids[1:] != ids[:-1]
    canvas[edge] = 255

    unit = max(canvas.shape[:2])
    taken: list[tuple[int, int, int, int]] = []
    for segment in segments:
        name = classes[segment.label] if segment.label < len(classes) else str(segment.label)
        font = max(0.42, unit / 1200)
        inside = np.pad(ids == segment.id, 1).astype(np.uint8)                   # the border of the picture is an edge too
        _, depth, _, (x, y) = cv2.minMaxLoc(cv2.distanceTransform(inside, cv2.DIST_L2, 3))
        if cv2.getTextSize(name, FONT, font, _stroke(font))[0][0] <= 2 * depth:
            middle = np.array([x - depth, y, x + depth, y])
            taken.append(_tag(canvas, name, middle, class_color(segment.label), font, taken))
    return canvas


def enlarge(image: np.ndarray, smallest: int) -> tuple[np.ndarray, float]:
    """`image` with its longer side at least `smallest` pixels, and the factor."""
    scale = max(1.0, smallest / max(image.shape[:2]))
    if scale == 1:
        return image.copy(), 1.0
    size = round(image.shape[1] * scale), round(image.shape[0] * scale)
    return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC), scale


def side_by_side(truth: np.ndarray, prediction: np.ndarray, titles: tuple[str, str] = ("ground truth", "prediction")) -> np.ndarray:
    """Two pictures of one image in one, each under its title; the lower is padded at the bottom."""
    return contact_sheet([truth, prediction], columns=2, captions=titles, cell=max(*truth.shape[:2], *prediction.shape[:2]))


def contact_sheet(images: Sequence[np.ndarray], columns: int = 4, *, captions: Sequence[str] = (), cell: int = 420,
                  gap: int = 10) -> np.ndarray:
    """Pictures in rows on one dark sheet.

    Args:
        images: uint8 [h, w, 3] of any sizes; each is scaled to fit its cell.
        columns: pictures a row.
        captions: one a picture, above it.
        cell: the longer side of the largest picture, pixels.
        gap: between pictures, pixels.

    Raises:
        ValueError: no pictures, or captions that are not as many.
    """
    if not images or (captions and len(captions) != len(images)) or columns < 1:
        raise ValueError(f"a contact sheet needs pictures, at least one a row, and one caption each or none; got {len(images)} pictures, "
                         f"{len(captions)} captions, {columns} columns")
    images = [_fit(_as_picture(image), cell) for image in images]
    width = max(image.shape[1] for image in images)
    rows = [images[start:start + columns] for start in range(0, len(images), columns)]
    columns = max(map(len, rows))
    font = max(0.42, width / 900)
    head = round(34 * font) + 4 if captions else 0
    sheet_height = gap + sum(head + max(image.shape[0] for image in row) + gap for row in rows)
    sheet = np.full((sheet_height, gap + columns * (width + gap), 3), 32, np.uint8)
    top = gap
    for row_index, row in enumerate(rows):
        for column, image in enumerate(row):
            left = gap + column * (width + gap)
            if captions:
                text = _shorten(captions[row_index * columns + column], width, font)
                cv2.putText(sheet, text, (left, top + head - round(12 * font)), FONT, font, (235, 235, 235), _stroke(font), cv2.LINE_AA)
            offset = (width - image.shape[1]) // 2
            sheet[top + head:top + head + image.shape[0], left + offset:left + offset + image.shape[1]] = image
        top += head + max(image.shape[0] for image in row) + gap
    return sheet


def save_image(image: np.ndarray, path: str | os.PathLike) -> Path:
    """Write `image` as .png or .jpg, by the suffix, whole or not at all.

    Raises:
        ValueError: another suffix.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"a picture is saved as .png or .jpg, got {path.name!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    options = [] if path.suffix.lower() == ".png" else [cv2.IMWRITE_JPEG_QUALITY, 92]
    _, data = cv2.imencode(path.suffix, cv2.cvtColor(_as_picture(image), cv2.COLOR_RGB2BGR), options)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data.tobytes())
    temporary.replace(path)
    return path


# ------------------------------------------------------------------------------------------------------------------- strokes

def _frame(canvas: np.ndarray, box: np.ndarray, color: tuple[int, int, int], width: int) -> None:
    """A coloured rectangle between two thin dark ones, to be seen on any ground."""
    x1, y1, x2, y2 = _clipped(box, canvas)
    cv2.rectangle(canvas, (x1, y1), (x2, y2), (20, 20, 20), width + 2)
    cv2.rectangle(canvas, (x1, y1), (x2, y2), color, width)


def _tag(canvas: np.ndarray, text: str, box: np.ndarray, color: tuple[int, int, int], font: float,
         taken: Sequence[tuple[int, int, int, int]]) -> tuple[int, int, int, int]:
    """`text` on a patch of `color`, where the fewest other tags are covered: over the box, in it, under it; returns the patch."""
    height, width = canvas.shape[:2]
    (text_width, text_height), baseline = cv2.getTextSize(text, FONT, font, _stroke(font))
    pad = max(2, round(4 * font))
    w, h = text_width + 2 * pad, text_height + baseline + pad
    x1, y1, x2, y2 = _clipped(box, canvas)
    places = [(x1, y1 - h), (x1, y1), (x1, y2), (x2 - w, y1 - h), (x2 - w, y2 - h), (x2, y1)]
    places = [(min(max(x, 0), max(width - w, 0)), min(max(y, 0), max(height - h, 0))) for x, y in places]
    x, y = min(places, key=lambda place: sum(_overlap((*place, place[0] + w, place[1] + h), other) for other in taken))
    cv2.rectangle(canvas, (x, y), (x + w - 1, y + h - 1), color, cv2.FILLED)
    dark_text = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    ink = (15, 15, 15) if dark_text else (255, 255, 255)
    cv2.putText(canvas, text, (x + pad, y + text_height + pad // 2 + 1), FONT, font, ink, _stroke(font), cv2.LINE_AA)
    return x, y, x + w, y + h


def _tint(image: np.ndarray, masks: np.ndarray, labels: np.ndarray) -> np.ndarray:
    image = image.copy()
    for mask, label in zip(masks, labels, strict=True):
        image[mask] = (0.55 * image[mask] + 0.45 * np.array(class_color(label))).astype(np.uint8)
    return image


def _stroke(font: float) -> int:
    return max(1, round(font * 1.6))


def _overlap(box: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> int:
    return (max(0, min(box[2], other[2]) - max(box[0], other[0])) * max(0, min(box[3], other[3]) - max(box[1], other[1])))


def _clipped(box: np.ndarray, canvas: np.ndarray) -> tuple[int, int, int, int]:
    height, width = canvas.shape[:2]
    limits = np.array([width - 1, height - 1, width - 1, height - 1])
    return tuple(int(side) for side in np.clip(np.nan_to_num(np.round(box)), 0, limits))


def _fit(image: np.ndarray, cell: int) -> np.ndarray:
    scale = cell / max(image.shape[:2])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    return image if scale == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def _shorten(text: str, width: int, font: float) -> str:
    """`text`, its middle cut out where it is wider than `width` pixels."""
    kept = len(text)
    shown = text
    while kept > 4 and cv2.getTextSize(shown, FONT, font, _stroke(font))[0][0] > width:
        kept -= 1
        shown = f"{text[:(kept + 1) // 2]}...{text[len(text) - kept // 2:]}"
    return shown


def _as_picture(image: Any) -> np.ndarray:
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"a picture is uint8 [h, w, 3], RGB; got {image.dtype} {list(image.shape)}")
    return image


def _numbers(values: Any) -> np.ndarray:
    values = values.detach().cpu().float() if hasattr(values, "detach") else values
    return np.asarray(values, dtype=np.float64)
