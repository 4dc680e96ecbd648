"""Generated scenes of coloured shapes: the embedded data set, on which everything can be tried without a download."""
from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from visionkit.datasets.detection import DetectionDataset, check_classes
from visionkit.registry import DATASETS

CLASSES = ("circle", "rectangle", "triangle", "star")
COLORS = {"red": (214, 48, 49), "orange": (238, 130, 30), "yellow": (244, 205, 50), "green": (46, 160, 67), "cyan": (40, 190, 195),
          "blue": (48, 98, 214), "purple": (136, 66, 186), "pink": (238, 110, 170)}
MIN_VISIBLE = 0.5                                            # of a shape's area, after the border and later shapes cut it
TRIES = 12                                                   # places to try for one shape before it is given up


@dataclass
class Shape:
    """One drawn shape; `mask` is what can be seen of it, bool [h, w]."""
    label: int
    color: str
    area: float                                              # of the whole shape, seen or not, pixels
    mask: np.ndarray


@DATASETS.register_module()
class ShapesDataset(DetectionDataset):
    """Scenes of circles, rectangles, triangles and stars on textured grounds, drawn when they are asked for.

    Scene i is a pure function of (seed, i) and of the arguments that shape it; another seed gives another split. Boxes and masks
    hold what can be *seen* of a shape, as COCO's do; of each at least half is. Every record has a `caption`.

    Args:
        num_images: scenes.
        seed: of all scenes.
        size: (width, height) in pixels, at least 32.
        num_objects: the fewest and the most shapes that a scene tries to hold; where a shape finds no room it is left out.
        shape_size: the smallest and the largest radius of a shape, over the shorter side of the scene.
        texture: draw grounds with patterns and grain; without it they are smooth.
        metainfo: `dict(classes=...)` draws only these shapes.
        pipeline: transforms, in order; `LoadImageFromFile` keeps the drawn picture.
        filter_cfg: see DetectionDataset.
        indices: see Dataset.
        test_mode: see Dataset.
        lazy_init: see Dataset.
    """

    PREFIXES: dict[str, str] = {}

    def __init__(self, num_images: int = 1000, seed: int = 0, size: Sequence[int] = (160, 160), num_objects: Sequence[int] = (1, 6),
                 shape_size: Sequence[float] = (0.07, 0.24), texture: bool = True, metainfo: Mapping[str, Any] | None = None,
                 pipeline: Sequence[Mapping[str, Any] | Callable[[dict], dict | None]] = (),
                 filter_cfg: Mapping[str, Any] | None = None, indices: int | Sequence[int] | None = None,
                 test_mode: bool = False, lazy_init: bool = False) -> None:
        if num_images < 1 or seed < 0:
            raise ValueError(f"num_images must be 1 or more and seed 0 or more, got {num_images=}, {seed=}")
        if np.size(size) != 2 or min(size) < 32:
            raise ValueError(f"size must be (width, height), each 32 or more, got {size}")
        if len(num_objects) != 2 or not 0 <= num_objects[0] <= num_objects[1]:
            raise ValueError(f"num_objects must be (fewest, most), got {num_objects}")
        if len(shape_size) != 2 or not 0.03 <= shape_size[0] <= shape_size[1] <= 0.5:
            raise ValueError(f"shape_size must be (smallest, largest) radius within 0.03 and 0.5, got {shape_size}")
        self.num_images = num_images
        self.seed = seed
        self.size = (int(size[0]), int(size[1]))
        self.num_objects = (int(num_objects[0]), int(num_objects[1]))
        self.shape_size = (float(shape_size[0]), float(shape_size[1]))
        self.texture = texture
        super().__init__(metainfo=metainfo, pipeline=pipeline, filter_cfg=filter_cfg, indices=indices, test_mode=test_mode,
                         lazy_init=lazy_init)

    def load_data_list(self) -> list[dict[str, Any]]:
        classes = tuple(self._metainfo.get("classes", CLASSES))
        check_classes(classes, CLASSES, "ShapesDataset")
        self._metainfo.update(classes=classes, category_ids=tuple(range(1, len(classes) + 1)))
        width, height = self.size
        return [{"img_id": i + 1, "img_path": f"shapes_{self.seed}_{i:06d}.png", "scene": i, "width": width, "height": height}
                for i in range(self.num_images)]

    def filter_data(self) -> list[dict[str, Any]]:
        if not self.filter_cfg:
            return self.data_list
        self.data_list = [{**record, "instances": self.draw(record["scene"])[1]} for record in self.data_list]
        return [{key: value for key, value in record.items() if key != "instances"} for record in super().filter_data()]

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """One record, its picture `img` included."""
        record = super().get_data_info(idx)
        record["img"], record["instances"], record["caption"] = self.draw(record["scene"])
        for position, instance in enumerate(record["instances"]):
            instance["id"] = record["scene"] * self.num_objects[1] + position + 1
        return record

    def draw(self, scene: int) -> tuple[np.ndarray, list[dict[str, Any]], str]:
        """The picture (uint8 [h, w, 3], RGB), the instances and the caption of a scene."""
        rng = np.random.default_rng((self.seed, scene))
        labels = [CLASSES.index(name) for name in self._metainfo["classes"]]
        image = draw_ground(rng, *self.size, texture=self.texture)
        shapes = draw_shapes(rng, image, labels, self.num_objects, self.shape_size)
        return image, [_instance(shape) | {"bbox_label": labels.index(shape.label)} for shape in shapes], caption(shapes)

    def to_coco(self) -> dict[str, Any]:
        """The ground truth as COCO's JSON format has it."""
        return self._to_coco(None)

    def export(self, folder: str | Path) -> None:
        """Write the pictures into `folder/images` and the ground truth into `folder/annotations.json`, for CocoDataset to read."""
        folder = Path(folder)
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / "annotations.json").write_text(json.dumps(self._to_coco(folder / "images")))

    def _to_coco(self, image_folder: Path | None) -> dict[str, Any]:
        metainfo = self.metainfo
        images, annotations = [], []
        for index in range(len(self)):
            record = self.get_data_info(index)
            if image_folder is not None:
                cv2.imwrite(str(image_folder / record["img_path"]), cv2.cvtColor(record["img"], cv2.COLOR_RGB2BGR))
            images.append({"id": record["img_id"], "file_name": record["img_path"], "width": record["width"], "height": record["height"],
                           "caption": record["caption"]})
            for instance in record["instances"]:
                x1, y1, x2, y2 = instance["bbox"]
                annotations.append({"id": instance["id"], "image_id": record["img_id"],
                                    "category_id": metainfo["category_ids"][instance["bbox_label"]], "bbox": [x1, y1, x2 - x1, y2 - y1],
                                    "area": instance["area"], "iscrowd": 0, "segmentation": instance["mask"]})
        categories = [{"id": i, "name": name} for i, name in zip(metainfo["category_ids"], metainfo["classes"], strict=True)]
        return {"info": {"description": f"visionkit ShapesDataset, seed {self.seed}"}, "images": images, "annotations": annotations,
                "categories": categories}


def _instance(shape: Shape) -> dict[str, Any]:
    columns, rows = np.flatnonzero(shape.mask.any(0)), np.flatnonzero(shape.mask.any(1))
    rle = coco_mask.encode(np.asfortranarray(shape.mask.view(np.uint8)))
    return {"bbox": [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)],
            "ignore_flag": 0, "area": int(shape.mask.sum()), "color": shape.color,
            "mask": {"size": list(rle["size"]), "counts": rle["counts"].decode()}}


def caption(shapes: Sequence[Shape]) -> str:
    """`a red circle and two blue stars`: what a scene shows, in the order of classes and colours."""
    counts = Counter((shape.label, list(COLORS).index(shape.color)) for shape in shapes)
    numbers = ("no", "a", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    parts = []
    for (label, color), count in sorted(counts.items()):
        number = numbers[count] if count < len(numbers) else str(count)
        name = list(COLORS)[color]
        parts.append(f"{'an' if count == 1 and name[0] in 'aeiou' else number} {name} {CLASSES[label]}{'s' * (count > 1)}")
    if len(parts) < 2:
        return parts[0] if parts else "an empty scene"
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


# ---------------------------------------------------------------------------------------------------------------- drawing

def draw_ground(rng: np.random.Generator, width: int, height: int, *, texture: bool) -> np.ndarray:
    """A muted ground, uint8 [height, width, 3]: soft clouds of colour, and with `texture` a faint pattern and grain."""
    base = rng.uniform(70, 205)
    clouds = (base + rng.normal(0, 11, 3) + rng.normal(0, 13, (4, 4, 1)) + rng.normal(0, 5, (4, 4, 3))).astype(np.float32)
    ground = cv2.resize(clouds, (width, height), interpolation=cv2.INTER_CUBIC)
    if texture:
        grain = rng.standard_normal((height, width), np.float32) * np.float32(rng.uniform(1, 7))
        ground += (grain + _pattern(rng, width, height))[..., None]
    return np.clip(ground, 0, 255).astype(np.uint8)


def _pattern(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Stripes, checks, dots or nothing, float32 [height, width], around 0."""
    y, x = np.ogrid[:height, :width]
    strength, turn, frequency = rng.uniform(4, 16), rng.uniform(0, np.pi), 2 * np.pi / rng.uniform(7, 20)
    along = ((x * np.cos(turn) + y * np.sin(turn)) * frequency).astype(np.float32)
    across = ((y * np.cos(turn) - x * np.sin(turn)) * frequency).astype(np.float32)
    kind = rng.integers(4)
    if kind == 0:
        return np.sin(along) * np.float32(strength)
    if kind == 1:
        return np.sign(np.sin(along) * np.sin(across)) * np.float32(strength / 2)
    if kind == 2:
        return np.maximum(np.sin(along) * np.sin(across), 0) * np.float32(strength)
    return np.zeros_like(along)


def draw_shapes(rng: np.random.Generator, image: np.ndarray, labels: Sequence[int], num_objects: tuple[int, int],
                shape_size: tuple[float, float]) -> list[Shape]:
    """Draw shapes onto `image`, later ones over earlier ones, and tell what can be seen of each."""
    height, width = image.shape[:2]
    shapes: list[Shape] = []
    for _ in range(rng.integers(num_objects[0], num_objects[1] + 1)):
        label, color = int(rng.choice(labels)), list(COLORS)[rng.integers(len(COLORS))]
        radius = min(width, height) * np.exp(rng.uniform(*np.log(shape_size)))
        for _ in range(TRIES):
            center = rng.uniform((0.4 * radius, 0.4 * radius), (width - 0.4 * radius, height - 0.4 * radius))
            points = outline(rng, CLASSES[label], radius) + center
            area = cv2.contourArea(points.astype(np.float32))
            cover = np.zeros((height, width), np.uint8)      # how much of each pixel the shape covers, of 255
            cv2.fillPoly(cover, [np.round(points * 16).astype(np.int32)], 255, cv2.LINE_AA, shift=4)
            mask = cover >= 128
            if mask.sum() >= 0.7 * area and all((shape.mask & ~mask).sum() >= MIN_VISIBLE * shape.area for shape in shapes):
                for shape in shapes:
                    shape.mask &= ~mask
                paint(rng, image, cover, COLORS[color])
                shapes.append(Shape(label, color, area, mask))
                break
    return shapes


def outline(rng: np.random.Generator, name: str, radius: float) -> np.ndarray:
    """The corners of a shape around the origin, float [P, 2], pixels, turned by a random angle."""
    turn = rng.uniform(0, 2 * np.pi)
    if name == "circle":
        angles, radii = np.arange(48) * (2 * np.pi / 48), radius
    elif name == "rectangle":
        half = rng.uniform(0.45, 1.1)                        # the angle of the diagonal: from 2:1 over a square to 1:2
        angles, radii = np.array([half, np.pi - half, np.pi + half, -half]), radius
    elif name == "triangle":
        angles, radii = np.arange(3) * (2 * np.pi / 3) + rng.uniform(-0.25, 0.25, 3), radius * 1.1
    else:
        angles, radii = np.arange(10) * (2 * np.pi / 10), radius * np.where(np.arange(10) % 2, rng.uniform(0.4, 0.5), 1.15)
    return np.stack([np.cos(angles + turn), np.sin(angles + turn)], axis=1) * np.reshape(radii, (-1, 1))


def paint(rng: np.random.Generator, image: np.ndarray, cover: np.ndarray, color: tuple[int, int, int]) -> None:
    """Lay a coloured shape with a soft shadow onto `image`: light from the upper left, a darker rim."""
    x, y, w, h = cv2.boundingRect(cover)
    left, top = max(x - 4, 0), max(y - 4, 0)
    region = np.s_[top:min(y + h + 8, image.shape[0]), left:min(x + w + 8, image.shape[1])]
    alpha = cover[region].astype(np.float32) / 255
    soft = cv2.blur(alpha, (5, 5))
    shadow = cv2.warpAffine(soft, np.float32([[1, 0, 2], [0, 1, 3]]), soft.shape[::-1]) * 0.45
    rows, columns = np.ogrid[-0.5:0.5:alpha.shape[0] * 1j, -0.5:0.5:alpha.shape[1] * 1j]
    light = 1 - 0.35 * (rows + columns) * rng.uniform(0.4, 1)
    light = (light * (0.72 + 0.28 * np.clip(soft * 2 - 1, 0, 1))).astype(np.float32)
    fill = np.clip(light[..., None] * (np.float32(color) + rng.normal(0, 8, 3).astype(np.float32)), 0, 255)
    ground = image[region] * (1 - shadow)[..., None]
    image[region] = ground + (fill - ground) * alpha[..., None]
