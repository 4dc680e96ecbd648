"""Where data lies: `data/<name>/` in a config, moved as a whole by the environment variable VISIONKIT_DATA."""
from __future__ import annotations

import os
from pathlib import Path, PurePath

from visionkit.registry import ConfigError

VARIABLE = "VISIONKIT_DATA"

# folder below data/, in lower case -> where its owners offer it
SOURCES = {
    "coco": "https://cocodataset.org/#download: train2017.zip, val2017.zip, annotations_trainval2017.zip, unpacked side by side",
    "voc": "http://host.robots.ox.ac.uk/pascal/VOC/: the VOCdevkit archives; data_root is the folder that holds JPEGImages",
    "bccd": "https://github.com/Shenggan/BCCD_Dataset (MIT): images and VOC annotations",
    "nuclei": "https://bbbc.broadinstitute.org/BBBC038 (CC0): stage1_train",
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "imagenet": "https://www.image-net.org/download.php (registration needed)",
    "lvis": "https://www.lvisdataset.org/dataset; the images are COCO's",
    "objects365": "https://www.objects365.org",
    "openimages": "https://storage.googleapis.com/openimages/web/download_v7.html",
    "cityscapes": "https://www.cityscapes-dataset.com/downloads/ (registration needed)",
    "ade20k": "https://ade20k.csail.mit.edu",
}


def resolve(path: str) -> str:
    """`path` as written in a config to where it lies: `data/bccd/` is `$VISIONKIT_DATA/bccd` where that variable is set."""
    parts = PurePath(path).parts
    root = os.environ.get(VARIABLE)
    return os.path.join(root, *parts[1:]) if root and parts[:1] == ("data",) else path


def require(path: str, what: str, *, asked: str, key: str) -> str:
    """`path` if it exists.

    Args:
        path: where to look, resolved.
        what: how the error calls it, such as `annotation file`.
        asked: the same place as the config writes it.
        key: the config's key, for the error's path.

    Raises:
        ConfigError: nothing is there; says where it looked, what moves that, and where to get the data.
    """
    if "://" in path or os.path.exists(path):
        return path
    message = f"no {what} at {os.path.abspath(path)}"
    if PurePath(asked).parts[:1] == ("data",):
        root = os.environ.get(VARIABLE)
        message += (f" ({asked}, looked up in {VARIABLE}={root})." if root else
                    f" ({asked}). If your data lies elsewhere, set {VARIABLE} to the folder that stands for data/.")
    else:
        message += "."
    for parent in (Path(path), *Path(path).parents):
        if parent.is_dir():
            message += f" {parent.resolve()} has: {', '.join(sorted(entry.name for entry in parent.iterdir())[:12]) or 'nothing'}."
            break
    hint = source(asked)
    raise ConfigError(message + (f" Where to get the data: {hint}" if hint else ""), (key,))


def source(path: str) -> str:
    """Where the data of a known folder comes from, or an empty string."""
    parts = PurePath(path.lower()).parts
    name = parts[1] if parts[:1] == ("data",) and len(parts) > 1 else ""
    return next((text for known, text in SOURCES.items() if name.startswith(known)), "")
