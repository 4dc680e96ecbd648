"""Images in folders: a folder a class, or images without labels."""
from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from visionkit.datasets.base import Dataset
from visionkit.datasets.roots import require
from visionkit.registry import DATASETS, ConfigError, did_you_mean
from visionkit.transforms import BrokenImageError, read_size

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


@DATASETS.register_module()
class ImageFolder(Dataset):
    """Classes of images: each folder below the root is a class, and the images in it or anywhere below it are its images.

    A root without folders that holds the images itself is a source without labels: its records have no `gt_label`, its meta information no
    classes. Any COCO or VOC set is one, too, with a pipeline that loads no annotations.

    A record has `img_id`, the path below the root with `/` between its parts, `img_path`, and `gt_label`, an index into
    `metainfo["classes"]`. Records are in the order of `img_id`, so that every machine has the same. What begins with a dot is passed over.

    Args:
        data_root: by convention `data/<name>/`, which VISIONKIT_DATA moves.
        data_prefix: `dict(img=...)`, a folder below `data_root` that is the root.
        metainfo: `dict(classes=...)` chooses folders and gives the order of their labels; without it all, by name.
        pipeline: transforms, in order.
        indices: see Dataset.
        on_error: see Dataset.
        test_mode: see Dataset.
        lazy_init: see Dataset.

    Raises:
        ConfigError: no such folder, no image in it, a class without a folder, or a folder of a class without an image.
    """

    def __init__(self, data_root: str = "", data_prefix: Mapping[str, str] | None = None, metainfo: Mapping[str, Any] | None = None,
                 pipeline: Sequence[Mapping[str, Any] | Callable[[dict], dict | None]] = (), indices: int | Sequence[int] | None = None,
                 on_error: str = "raise", test_mode: bool = False, lazy_init: bool = False) -> None:
        self.asked_root = os.path.join(data_root, (data_prefix or {}).get("img", ""))
        super().__init__(data_root=data_root, data_prefix=data_prefix, metainfo=metainfo, pipeline=pipeline, indices=indices,
                         on_error=on_error, test_mode=test_mode, lazy_init=lazy_init)

    def load_data_list(self) -> list[dict[str, Any]]:
        root = require(self.data_prefix["img"].rstrip("/") or ".", "folder of images", asked=self.asked_root, key="data_root")
        if not os.path.isdir(root):
            raise ConfigError(f"{root} is a file; a folder of images is wanted", ("data_root",))
        entries = sorted((entry for entry in os.scandir(root) if not entry.name.startswith(".")), key=lambda entry: entry.name)
        folders = [entry.name for entry in entries if entry.is_dir()]
        loose = [entry.name for entry in entries if entry.is_file() and entry.name.lower().endswith(IMAGE_SUFFIXES)]
        if not folders and "classes" not in self._metainfo:
            if not loose:
                raise ConfigError(f"no image and no folder in {os.path.abspath(root)}; images are {' '.join(IMAGE_SUFFIXES)}",
                                  ("data_root",))
            return [{"img_id": name, "img_path": os.path.join(root, name)} for name in loose]
        classes = self._classes(root, folders)
        if loose:
            self._log(f"{len(loose)} images in {root} lie in no class's folder and are left out, such as {loose[0]}", logging.WARNING)
        records = []
        for label, name in enumerate(classes):
            images = list(images_below(os.path.join(root, name)))
            if not images:
                raise ConfigError(f"the class {name!r} has no image in {os.path.abspath(os.path.join(root, name))} (images are "
                                  f"{' '.join(IMAGE_SUFFIXES)}); name the classes that you want in metainfo=dict(classes=(...))",
                                  ("metainfo", "classes"))
            records += [{"img_id": f"{name}/{image}", "img_path": os.path.join(root, name, *image.split("/")), "gt_label": label}
                        for image in images]
        return sorted(records, key=lambda record: record["img_id"])

    def image_size(self, index: int) -> tuple[int, int]:
        """The (height, width) of an image before any transform, pixels. Reads the head of its file.

        Raises:
            BrokenImageError: that is no image's, also with `on_error="skip"`: what will replace it may have another size.
        """
        record = self.get_data_info(index)
        try:
            return read_size(record["img_path"])
        except OSError as error:
            raise BrokenImageError(f"cannot read the size of the image {record['img_path']}: {error}") from error

    def _classes(self, root: str, folders: Sequence[str]) -> tuple[str, ...]:
        classes = tuple(self._metainfo.get("classes", folders))
        for name in classes:
            if name not in folders:
                raise ConfigError(f"{os.path.abspath(root)} has no folder {name!r}.{did_you_mean(name, folders)} Its folders: "
                                  f"{', '.join(folders) or 'none'}.", ("metainfo", "classes"))
        if len(set(classes)) < len(classes):
            raise ConfigError(f"a class stands twice in {', '.join(classes)}", ("metainfo", "classes"))
        self._metainfo["classes"] = classes
        return classes

    def get_cat_ids(self, idx: int) -> list[int]:
        """The label of one image, for mmengine's ClassBalancedDataset."""
        record = self.get_data_info(idx)
        return [record["gt_label"]] if "gt_label" in record else []


def images_below(folder: str) -> Iterator[str]:
    """The paths of the images in `folder` or below it, relative to it, with `/` between their parts, sorted within each folder."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inner = os.path.relpath(parent, folder).replace(os.sep, "/")
        for name in sorted(files):
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                yield name if inner == "." else f"{inner}/{name}"
