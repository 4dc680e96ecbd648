"""One segment for each pixel (Kirillov et al. 2019, Panoptic Segmentation, arXiv:1801.00868), and COCO's PNG + JSON form of it.

A panoptic PNG holds a segment's id in a pixel's colour: R + 256 G + 65536 B. Id 0 is void: nobody says what is there.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

# H, W of the image, S segments

VOID = 0
MOST_IDS = 1 << 24                                           # what three bytes of colour can tell apart


@dataclass(frozen=True)
class Segment:
    """One thing (a countable object), or all pixels of one stuff class.

    Args:
        id: its value in the map.
        label: its class, an index.
        isthing: whether its class is countable.
        area: its pixels.
        iscrowd: a region of things that nobody told apart; only in ground truth.
    """
    id: int
    label: int
    isthing: bool
    area: int
    iscrowd: bool = False


@dataclass(frozen=True)
class PanopticMap:
    """Which segment each pixel belongs to.

    Law: ids are unique, from 1 to 2^24 - 1; the map holds no id that is neither void nor described; every segment has pixels, and its
    area is their number.

    Args:
        ids: int32 [H, W], a segment's id or `VOID`.
        segments: in any order.

    Raises:
        ValueError: the law is broken; names the segment.
    """
    ids: np.ndarray
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple(self.segments))
        if self.ids.ndim != 2 or self.ids.dtype != np.int32:
            raise ValueError(f"a panoptic map holds its ids as int32 [H, W], got {self.ids.dtype} {list(self.ids.shape)}")
        areas = areas_of(self.ids)
        areas.pop(VOID, None)
        described = [segment.id for segment in self.segments]
        for id_ in described:
            if not VOID < id_ < MOST_IDS:
                raise ValueError(f"a segment's id lies within 1 and {MOST_IDS - 1} ({VOID} is void), got {id_}")
        if len(set(described)) < len(described):
            twice = next(id_ for id_ in described if described.count(id_) > 1)
            raise ValueError(f"the segment {twice} is described {described.count(twice)} times; an id names one segment")
        if not areas.keys() <= set(described):
            raise ValueError(f"the map holds segments that nobody describes: {sorted(areas.keys() - set(described))[:8]}")
        for segment in self.segments:
            if segment.area != areas.get(segment.id, 0) or segment.area == 0:
                raise ValueError(f"the segment {segment.id} is said to have {segment.area} pixels and has {areas.get(segment.id, 0)}; "
                                 f"a segment has at least one")

    @classmethod
    def of_layers(cls, masks: Sequence[np.ndarray], labels: Sequence[int], isthing: Sequence[bool], *, size: tuple[int, int],
                  iscrowd: Sequence[bool] | None = None, background: int | None = None) -> PanopticMap:
        """Lay masks over each other, larger ones below; what is covered as a whole is left out.

        Args:
            masks: S of [H, W], 0 or not; the i-th gets the id i + 1.
            labels: of each.
            isthing: of each *label*.
            size: (H, W).
            iscrowd: of each mask; none is by default.
            background: the label of what no mask covers, a stuff segment; left void by default.
        """
        ids = np.zeros(size, np.int32)
        for index in sorted(range(len(masks)), key=lambda index: -np.count_nonzero(masks[index])):
            ids[np.asarray(masks[index], bool)] = index + 1
        if background is not None:
            ids[ids == VOID] = len(masks) + 1
            labels = [*labels, background]
        iscrowd = [*(iscrowd or [False] * len(masks)), False]
        areas = areas_of(ids)
        return cls(ids, tuple(Segment(index + 1, int(label), bool(isthing[label]), areas[index + 1], bool(iscrowd[index]))
                              for index, label in enumerate(labels) if index + 1 in areas))

    def masks(self) -> np.ndarray:
        """bool [S, H, W], segments in order; they never overlap."""
        return np.array([self.ids == segment.id for segment in self.segments], bool).reshape(-1, *self.ids.shape)

    # ------------------------------------------------------------------------------------------------------------- COCO's form

    @classmethod
    def from_coco(cls, ids: np.ndarray, segments_info: Iterable[Mapping[str, Any]], labels: Mapping[int, int],
                  isthing: Sequence[bool] | Mapping[int, bool]) -> PanopticMap:
        """A map from what COCO's JSON says of it; areas are counted, not believed.

        Args:
            ids: int32 [H, W], see `decode_png`.
            segments_info: dicts with `id`, `category_id` and, where the segment is a crowd, `iscrowd`. Segments of categories that
                `labels` leaves out become void.
            labels: category id to label.
            isthing: of each label.
        """
        segments_info = list(segments_info)
        left_out = [info["id"] for info in segments_info if info["category_id"] not in labels]
        if left_out:
            ids = np.where(np.isin(ids, left_out), np.int32(VOID), ids)
        areas = areas_of(ids)
        return cls(ids, tuple(Segment(info["id"], labels[info["category_id"]], bool(isthing[labels[info["category_id"]]]),
                                      areas.get(info["id"], 0), bool(info.get("iscrowd", 0)))
                              for info in segments_info if info["category_id"] in labels))

    def to_coco(self, category_ids: Sequence[int]) -> list[dict[str, Any]]:
        """`segments_info` of COCO's JSON.

        Args:
            category_ids: of each label.
        """
        boxes = boxes_of(self.masks())
        return [{"id": segment.id, "category_id": int(category_ids[segment.label]), "iscrowd": int(segment.iscrowd), "area": segment.area,
                 "bbox": [int(x1), int(y1), int(x2 - x1), int(y2 - y1)]}
                for segment, (x1, y1, x2, y2) in zip(self.segments, boxes, strict=True)]


def areas_of(ids: np.ndarray) -> dict[int, int]:
    """How many pixels each value of an integer map has. Runs of equal pixels are counted as one, which a map has few of."""
    flat = ids.reshape(-1)
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    values, place = np.unique(flat[starts], return_inverse=True)
    lengths = np.diff(np.append(starts, flat.size))
    return dict(zip(values.tolist(), np.bincount(place, lengths, len(values)).astype(int).tolist(), strict=True))


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """float32 [S, 4], the extent of each mask [S, H, W] as (x1, y1, x2, y2), x2 and y2 outside; zeros where a mask is empty."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        if len(rows):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def rgb_to_ids(rgb: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] colours to int32 [H, W] ids: R + 256 G + 65536 B."""
    return rgb.astype(np.int32) @ np.array([1, 1 << 8, 1 << 16], np.int32)


def ids_to_rgb(ids: np.ndarray) -> np.ndarray:
    """int [H, W] ids to uint8 [H, W, 3] colours."""
    return (ids[..., None] >> np.array([0, 8, 16], ids.dtype)).astype(np.uint8)


def decode_png(data: bytes) -> np.ndarray:
    """The ids, int32 [H, W], in the content of a panoptic PNG file.

    Raises:
        ValueError: the data is cut off or no PNG of three colours, whose pixels must not change by a bit.
    """
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"a panoptic map is a PNG file, but the content starts with {data[:8]!r}")
    if b"IEND" not in data[-12:]:                            # OpenCV fills the rest with 0, which is void
        raise ValueError(f"the file is truncated: no IEND chunk after {len(data)} bytes")
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if bgr is None or bgr.dtype != np.uint8 or bgr.ndim != 3 or bgr.shape[2] != 3:
        form = "nothing that OpenCV can decode" if bgr is None else f"{bgr.dtype} {list(bgr.shape)}"
        raise ValueError(f"a panoptic PNG has three colours of 8 bits, got {form}")
    return rgb_to_ids(bgr[..., ::-1])


def encode_png(ids: np.ndarray) -> bytes:
    """The content of a panoptic PNG file of ids, int [H, W]."""
    return cv2.imencode(".png", np.ascontiguousarray(ids_to_rgb(ids)[..., ::-1]))[1].tobytes()
