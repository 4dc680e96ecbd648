"""Images in, predictions out, without a data set."""
from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from visionkit.engine.checkpoint import load_weights, read_checkpoint, write_atomically
from visionkit.engine.config import load_config
from visionkit.engine.pictures import draw_sample
from visionkit.engine.test_time import autocast, views_of
from visionkit.registry import DATASETS, MODELS, SCOPE, TRANSFORMS, ConfigError, did_you_mean
from visionkit.structures import Sample
from visionkit.transforms import BrokenImageError, LoadAnnotations, LoadImageFromFile, build_pipeline
from visionkit.transforms.loading import decode_image
from visionkit.visualization import save_image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")

class Detector:
    """A trained detector, called with images.

    `Detector("config.py", "epoch_20.pth")(["a.jpg", "b.png"])` gives two samples with `pred_instances`: `bboxes` in pixels of the
    image as it was given, `scores` descending, `labels`, indices into `Detector.classes`.

    Args:
        config: a file, or what `load_config` returned.
        checkpoint: .pth or .safetensors; by default the config's `load_from`.
        device: such as `cuda:1` or `cpu`; by default a GPU if there is one.
        score_threshold: predictions below are left out.
        batch_size: images that go through the network together.
        tta: merge the predictions of several views of each image, as the section `tta` of the config says.
        amp: compute in bfloat16.

    Raises:
        ConfigError: the config or the checkpoint cannot be used, or there is no checkpoint.
    """

    def __init__(self, config: str | os.PathLike | Config, checkpoint: str | os.PathLike | None = None,
                 device: str | torch.device | None = None, score_threshold: float = 0.3, batch_size: int = 8,
                 tta: bool = False, amp: bool = False) -> None:
        cfg = config if isinstance(config, Config) else load_config(config)
        checkpoint = checkpoint or cfg.get("load_from")
        if checkpoint is None:
            raise ConfigError("a detector needs weights: give a checkpoint, or set load_from in the config", ("load_from",))
        if not 0 <= score_threshold <= 1 or batch_size < 1:
            raise ConfigError(f"score_threshold lies within 0 and 1, batch_size is 1 or more; got {score_threshold}, {batch_size}")
        self.score_threshold = score_threshold
        self.batch_size = batch_size
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.amp = amp
        self.views = views_of(cfg) if tta else None
        with DefaultScope.overwrite_default_scope(SCOPE):
            transforms = _without_loading(_test_dataset(cfg)["pipeline"])
            self.pipeline = build_pipeline(self.views.pipeline(transforms) if self.views else transforms)
            self.model = MODELS.make(cfg.model, at="model")
        load_weights(self.model, checkpoint, strict=cfg.get("load_from_strict", True))
        self.model.to(self.device).eval()
        self.classes = _classes(checkpoint, cfg)

    def __call__(self, images: Any) -> list[Sample] | Sample:
        """Detect objects.

        Args:
            images: one image or several: paths, uint8 [h, w, 3] or [h, w] arrays in RGB, or PIL images.

        Returns:
            A sample for one image, a list for several; `img_path` and `img_id` (the position, from 0) in its meta information.

        Raises:
            BrokenImageError: an image cannot be read; names it.
        """
        if isinstance(images, (str, os.PathLike, np.ndarray)) or _is_pil(images):
            return next(self.stream([images]))
        return list(self.stream(images))

    def stream(self, images: Iterable[Any]) -> Iterator[Sample]:
        """As a call, but one batch at a time: for videos and for more images than fit into memory."""
        numbered = enumerate(images)
        while batch := [self.prepare(image, index) for index, image in islice(numbered, self.batch_size)]:
            yield from self._detect(batch)

    def prepare(self, image: Any, index: int = 0) -> dict[str, Any]:
        """What the config's test pipeline makes of an image: `inputs` and `data_samples`, several of each with views."""
        path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
        array = read_image(image)
        results = {"img": array, "img_path": path, "img_id": index, "ori_shape": array.shape[:2], "img_shape": array.shape[:2],
                   "height": array.shape[0], "width": array.shape[1]}
        packed = self.pipeline(results)
        for sample in packed["data_samples"] if self.views else [packed["data_samples"]]:
            sample.pop("annotations", None)                  # there is no ground truth, which is not the same as no objects
        return packed

    @torch.inference_mode()
    def _detect(self, batch: Sequence[Mapping[str, Any]]) -> list[Sample]:
        collated = {key: [one[key] for one in batch] for key in ("inputs", "data_samples")}
        step = self.model.test_step
        with autocast(self.model, self.amp):
            if self.views:                                   # images of views to views of images
                samples = self.views.predict(step, {key: list(zip(*values, strict=True)) for key, values in collated.items()})
            else:
                samples = step(collated)
        for sample in samples:
            if "pred_instances" not in sample:
                raise ConfigError(f"{type(self.model).__name__} finds no objects, so there is nothing to draw; tools/test.py scores it",
                                  ("model",))
            found = sample.pred_instances.to("cpu")
            sample.pred_instances = found[found.scores >= self.score_threshold]
        return [sample.to("cpu") for sample in samples]


# --------------------------------------------------------------------------------------------------------- files in, files out

@dataclass
class Detections:
    """What `detect_files` did."""
    json_file: Path
    images: int                                              # frames of videos included
    objects: int
    unreadable: list[str]                                    # a line each, which names the file


def detect_files(detector: Detector, inputs: Sequence[str | os.PathLike], out_dir: str | os.PathLike) -> Detections:
    """Run a detector on images, on the images in folders, and on videos; write what it finds.

    An image becomes a picture with its detections drawn, a video a video. `detections.json` holds a list with an entry an image or
    frame: `image`, `frame` (from 0) where it is one, `width`, `height` and `detections`, each with `class`, `label`, `score` and
    `box` (x1, y1, x2, y2, in pixels, x2 and y2 outside the box). A file that cannot be read is left out and named.

    Raises:
        ConfigError: there is nothing to run on.
    """
    images, videos = find_inputs(inputs)
    out_dir = Path(out_dir)
    names = _distinct_names([*images, *videos])
    records: list[dict[str, Any]] = []
    unreadable: list[str] = []

    def readable() -> Iterator[tuple[Path, np.ndarray]]:
        for path in images:
            try:
                yield path, read_image(path)
            except BrokenImageError as error:
                unreadable.append(str(error))

    pairs = readable()
    while batch := list(islice(pairs, detector.batch_size)):
        for (path, image), sample in zip(batch, detector([image for _, image in batch]), strict=True):
            save_image(draw_sample(image, sample, detector.classes), out_dir / f"{names[path]}.jpg")
            records.append({"image": str(path), **_as_record(sample, detector.classes)})
    for path in videos:
        try:
            for frame, sample in enumerate(_detect_video(detector, path, out_dir / names[path])):
                records.append({"image": str(path), "frame": frame, **_as_record(sample, detector.classes)})
        except BrokenImageError as error:
            unreadable.append(str(error))
    json_file = out_dir / "detections.json"
    write_atomically(json_file, json.dumps(records, indent=1).encode())
    return Detections(json_file, len(records), sum(len(record["detections"]) for record in records), unreadable)


def find_inputs(inputs: Sequence[str | os.PathLike]) -> tuple[list[Path], list[Path]]:
    """The image files and the video files that `inputs` name; of a folder all that lie in it or below.

    Raises:
        ConfigError: one does not exist, is of an unknown kind, or a folder has none.
    """
    images: list[Path] = []
    videos: list[Path] = []
    for given in inputs:
        path = Path(given).expanduser()
        if not path.exists():
            near = did_you_mean(path.name, [other.name for other in path.parent.iterdir()]) if path.parent.is_dir() else ""
            raise ConfigError(f"no file or folder {str(path)!r}.{near}")
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        found = [file for file in files if file.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)]
        if not found:
            raise ConfigError(f"{str(path)!r} is no image or video, and no folder of them; known are "
                              f"{' '.join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))}")
        images += [file for file in found if file.suffix.lower() in IMAGE_SUFFIXES]
        videos += [file for file in found if file.suffix.lower() in VIDEO_SUFFIXES]
    return list(dict.fromkeys(images)), list(dict.fromkeys(videos))


def _detect_video(detector: Detector, path: Path, out: Path) -> Iterator[Sample]:
    """Samples of the frames, while a video with the detections drawn is written to `out`.mp4."""
    reader = mmcv.VideoReader(str(path))
    if not reader.opened or reader.width == 0:
        raise BrokenImageError(f"cannot read the video {path}: OpenCV cannot decode it")
    frames, to_draw = itertools.tee(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) for frame in reader if frame is not None)
    writer = None
    try:
        for frame, sample in zip(to_draw, detector.stream(frames), strict=False):
            picture = draw_sample(frame, sample, detector.classes)
            picture = picture[:picture.shape[0] // 2 * 2, :picture.shape[1] // 2 * 2]              # codecs want even sides
            if writer is None:
                out.parent.mkdir(parents=True, exist_ok=True)
                writer = cv2.VideoWriter(f"{out}.mp4", cv2.VideoWriter_fourcc(*"mp4v"), reader.fps or 25, picture.shape[1::-1])
            writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
            yield sample
    finally:
        if writer is not None:
            writer.release()


def _as_record(sample: Sample, classes: Sequence[str]) -> dict[str, Any]:
    found = sample.pred_instances
    rows = zip(found.bboxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    return {"width": sample.ori_shape[1], "height": sample.ori_shape[0],
            "detections": [{"class": classes[label] if label < len(classes) else str(label), "label": label, "score": round(score, 5),
                            "box": [round(side, 2) for side in box]} for box, score, label in rows]}


def _distinct_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A file name without suffix for each path; the second `a.jpg`, from another folder, becomes `a_2`."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        name, number = path.stem, 1
        while name.lower() in taken:
            number += 1
            name = f"{path.stem}_{number}"
        taken.add(name.lower())
        names[path] = name
    return names


# --------------------------------------------------------------------------------------------------------------------- images

def read_image(image: Any) -> np.ndarray:
    """A path, array or PIL image as uint8 [h, w, 3], RGB, upright.

    Raises:
        BrokenImageError: the file cannot be read.
        ValueError: an array of another form.
    """
    if isinstance(image, (str, os.PathLike)):
        try:
            return decode_image(Path(image).expanduser().read_bytes())
        except (OSError, ValueError) as error:
            reason = "the file does not exist" if isinstance(error, FileNotFoundError) else str(error)
            raise BrokenImageError(f"cannot read the image {os.fspath(image)}: {reason}") from error
    if _is_pil(image):
        from PIL import ImageOps
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size:
        if image.ndim == 2:
            return np.repeat(image[:, :, None], 3, axis=2)
        if image.ndim == 3 and image.shape[2] == 3:
            return image
    form = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
    raise ValueError(f"an image is a path, a PIL image, or a uint8 array [h, w, 3] in RGB or [h, w] in grey; got {form}")


def _is_pil(image: Any) -> bool:
    return hasattr(image, "convert") and hasattr(image, "getexif")


def _test_dataset(cfg: Config) -> Mapping[str, Any]:
    """The config of the data set whose pipeline prepares images, wrappers taken off."""
    key = next((key for key in ("test_dataloader", "val_dataloader") if cfg.get(key)), None)
    if key is None:
        raise ConfigError("inference takes its pipeline from test_dataloader.dataset.pipeline, which the config does not have")
    dataset = cfg[key]["dataset"]
    while "pipeline" not in dataset and ("dataset" in dataset or dataset.get("datasets")):
        dataset = dataset["dataset"] if "dataset" in dataset else dataset["datasets"][0]
    if not dataset.get("pipeline"):
        raise ConfigError("inference takes its pipeline from here, and there is none", (key, "dataset", "pipeline"))
    return dataset


def test_images(cfg: Config) -> Iterator[dict[str, Any]]:
    """The images of a config's test set as its pipeline packs them, one by one."""
    with DefaultScope.overwrite_default_scope(SCOPE):
        dataset = DATASETS.build(dict(_test_dataset(cfg)))
    dataset.full_init()
    for index in range(len(dataset)):
        yield dataset[index]


test_images.__test__ = False                                 # its name begins like that of a test


def _without_loading(pipeline: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The transforms after the image is read and without the ground truth."""
    loaders = (LoadImageFromFile, LoadAnnotations)

    def loads(name: str | type) -> bool:
        component = TRANSFORMS.get(name) if isinstance(name, str) else name
        return component.__name__ in ("LoadImageFromFile", "LoadAnnotations") or issubclass(component, loaders)
    return [transform for transform in pipeline if not loads(transform["type"])]


def _classes(checkpoint: str | os.PathLike, cfg: Config) -> tuple[str, ...]:
    """The names of the labels: as the training run wrote them into the checkpoint, or as the config's data set has them; empty
    where neither tells."""
    meta = read_checkpoint(checkpoint, mmap=True).get("meta") or {}
    if "classes" in (meta.get("dataset_meta") or {}):
        return tuple(meta["dataset_meta"]["classes"])
    dataset = _test_dataset(cfg)
    if "classes" in (dataset.get("metainfo") or {}):
        return tuple(dataset["metainfo"]["classes"])
    try:
        return tuple(DATASETS.build(dict(dataset)).metainfo.get("classes", ()))
    except ConfigError:                                      # its annotation file is not on this machine
        return ()
