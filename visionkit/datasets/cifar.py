"""CIFAR-10 and CIFAR-100 as their authors give them out (Krizhevsky 2009), read without running what is in a pickle."""
from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from visionkit.datasets.base import Dataset
from visionkit.datasets.roots import require
from visionkit.registry import DATASETS, ConfigError, did_you_mean

SIDE = 32                                                    # pixels
PIXELS = 3 * SIDE * SIDE                                     # bytes of an image: all red, then all green, then all blue, row by row


class Layout(NamedTuple):
    """How one of the four archives lays out its files."""
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: Mapping[str, tuple[str, str]]                     # kind of label -> file of the class names, key in it
    labels: Mapping[str, tuple[int, str]]                    # kind of label -> byte of a binary record, key of a pickle

    @property
    def binary(self) -> bool:
        return self.train[0].endswith(".bin")


TEN, HUNDRED = {"fine": (0, "labels")}, {"coarse": (0, "coarse_labels"), "fine": (1, "fine_labels")}
LAYOUTS = (
    Layout(tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",), {"fine": ("batches.meta.txt", "")}, TEN),
    Layout(tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",), {"fine": ("batches.meta", "label_names")}, TEN),
    Layout(("train.bin",), ("test.bin",), {"fine": ("fine_label_names.txt", ""), "coarse": ("coarse_label_names.txt", "")}, HUNDRED),
    Layout(("train",), ("test",), {"fine": ("meta", "fine_label_names"), "coarse": ("meta", "coarse_label_names")}, HUNDRED))


@DATASETS.register_module()
class CIFAR(Dataset):
    """CIFAR-10 or CIFAR-100, whichever lies in the folder, in the binary or the Python format.

    All images are in one array, which data-loader workers that are forked share; a record has `img`, a copy of its own, uint8 [32, 32, 3],
    RGB, `gt_label` and `img_id`, its place in the files from 0. `LoadImageFromFile` keeps that picture.

    Args:
        data_root: the folder that holds the files, such as `data/cifar10/cifar-10-batches-bin`.
        split: `train` or `test`.
        coarse: the 20 classes of classes of CIFAR-100.
        metainfo: `dict(classes=...)` chooses classes by name and gives the order of their labels; images of others are left out.
        pipeline: transforms, in order.
        indices: see Dataset.
        test_mode: see Dataset.
        lazy_init: see Dataset.

    Raises:
        ConfigError: a file is missing or is not what its name says, or a pickle wants something that such a file has no need of.
    """

    PREFIXES: dict[str, str] = {"img": ""}

    def __init__(self, data_root: str = "", split: str = "train", coarse: bool = False, metainfo: Mapping[str, Any] | None = None,
                 pipeline: Sequence[Mapping[str, Any] | Callable[[dict], dict | None]] = (), indices: int | Sequence[int] | None = None,
                 test_mode: bool = False, lazy_init: bool = False) -> None:
        if split not in ("train", "test"):
            raise ConfigError(f"split is 'train' or 'test', got {split!r}", ("split",))
        self.split = split
        self.kind = "coarse" if coarse else "fine"
        self.images = np.zeros((0, SIDE, SIDE, 3), np.uint8)
        super().__init__(data_root=data_root, metainfo=metainfo, pipeline=pipeline, indices=indices, test_mode=test_mode,
                         lazy_init=lazy_init)

    def load_data_list(self) -> list[dict[str, Any]]:
        folder = require(self.data_prefix["img"] or ".", "folder", asked=self.data_root, key="data_root")
        layout = self._layout(folder)
        names = _read_names(os.path.join(folder, layout.names[self.kind][0]), layout.names[self.kind][1])
        read = _read_binary if layout.binary else _read_pickle
        parts = []
        for name in layout.train if self.split == "train" else layout.test:
            file = require(os.path.join(folder, name), f"file of the {self.split} split", asked=os.path.join(self.data_root, name),
                           key="data_root")
            parts.append(read(file, layout, self.kind))
        images, labels = (np.concatenate(some) for some in zip(*parts, strict=True))
        if labels.max(initial=0) >= len(names):
            raise ConfigError(f"{folder} has the label {labels.max()}, but {len(names)} names of classes", ("data_root",))
        self.images = np.ascontiguousarray(images.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
        classes = tuple(self._metainfo.get("classes", names))
        for name in classes:
            if name not in names:
                raise ConfigError(f"{folder} has no class {name!r}.{did_you_mean(name, names)} Its classes: {', '.join(names)}.",
                                  ("metainfo", "classes"))
        self._metainfo["classes"] = classes
        label_of = {names.index(name): label for label, name in enumerate(classes)}
        return [{"img_id": row, "img_path": None, "height": SIDE, "width": SIDE, "gt_label": label_of[label]}
                for row, label in enumerate(labels.tolist()) if label in label_of]

    def _layout(self, folder: str) -> Layout:
        there = sorted(os.listdir(folder))
        found = [layout for layout in LAYOUTS if layout.train[0] in there or layout.test[0] in there]
        if not found:
            raise ConfigError(f"{os.path.abspath(folder)} holds none of {', '.join(layout.train[0] for layout in LAYOUTS)}, with which the "
                              f"archives of CIFAR begin; it has: {', '.join(there[:12]) or 'nothing'}. data_root is the folder with the "
                              f"files, such as cifar-10-batches-bin", ("data_root",))
        if self.kind not in found[0].names:
            raise ConfigError("only CIFAR-100 has coarse classes, and this is CIFAR-10", ("coarse",))
        return found[0]

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """One record, its picture `img` included."""
        record = super().get_data_info(idx)
        return {**record, "img": self.images[record["img_id"]].copy()}                 # a transform may write into it

    def get_cat_ids(self, idx: int) -> list[int]:
        """The label of one image, for mmengine's ClassBalancedDataset."""
        return [super().get_data_info(idx)["gt_label"]]


def _read_binary(file: str, layout: Layout, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 3072] and int64 [N] of a file of records: a byte or two of labels, then the image."""
    record = len(layout.labels) + PIXELS
    data = np.fromfile(file, np.uint8)
    if not len(data) or len(data) % record:
        raise ConfigError(f"{file} has {len(data)} bytes, which is no whole number of records of {record}: it is cut short, or no such "
                          f"file", ("data_root",))
    rows = data.reshape(-1, record)
    return rows[:, len(layout.labels):], rows[:, layout.labels[kind][0]].astype(np.int64)


def _read_pickle(file: str, layout: Layout, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The same of a pickled dict."""
    content = read_pickle(file)
    images, labels = (content.get(key.encode()) for key in ("data", layout.labels[kind][1]))
    if not isinstance(images, np.ndarray) or images.ndim != 2 or images.shape[1] != PIXELS or not isinstance(labels, list) \
            or len(labels) != len(images) or not all(type(label) is int and label >= 0 for label in labels):
        raise ConfigError(f"{file} is not a batch of CIFAR: wanted `data`, uint8 [N, {PIXELS}], and {layout.labels[kind][1]!r}, a list of "
                          f"N whole numbers; found {', '.join(map(repr, content)) or 'nothing'}", ("data_root",))
    return images, np.array(labels, np.int64)


def _read_names(file: str, key: str) -> list[str]:
    require(file, "file of the names of the classes", asked=file, key="data_root")
    if not key:
        with open(file, encoding="utf-8") as stream:
            return [line.strip() for line in stream if line.strip()]
    names = read_pickle(file).get(key.encode())
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise ConfigError(f"{file} has no list of names {key!r}", ("data_root",))
    return [name.decode() for name in names]


# -------------------------------------------------------------------------------------------------------------- a tame pickle

class _Refused(pickle.UnpicklingError):
    """A pickle that holds what none of CIFAR's does."""


class _Dtype:
    """Stands for numpy.dtype: remembers its letters, and does nothing."""
    __slots__ = ("code",)

    def __init__(self, code: Any = "", align: Any = False, copy: Any = False) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """The byte order and the like, which bytes do not have."""


class _Array:
    """Stands for numpy.ndarray: remembers shape, type and bytes, and does nothing."""
    __slots__ = ("shape", "code", "fortran", "data")

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.shape, self.code, self.fortran, self.data = shape, dtype.code, fortran, data


class _Blank:
    """Stands for numpy's `_reconstruct`, which makes the array that is then filled."""

    def __new__(cls, kind: Any, shape: Any, code: Any) -> _Array:
        return _Array()

    def __setstate__(self, state: Any) -> None:
        raise _Refused("a function has no state")


class _Bytes:
    """Stands for `_codecs.encode`, by which a Python 3 writes bytes in a form that a Python 2 reads."""

    def __new__(cls, text: Any, codec: Any = "latin1") -> bytes:
        return str.encode(text, "latin1")

    def __setstate__(self, state: Any) -> None:
        raise _Refused("a function has no state")


HARMLESS = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Dtype, ("numpy.core.multiarray", "_reconstruct"): _Blank,
            ("numpy._core.multiarray", "_reconstruct"): _Blank, ("_codecs", "encode"): _Bytes}


class _TameUnpickler(pickle.Unpickler):
    """Reads lists, dicts, numbers, text and arrays of bytes. Whatever else a pickle names is refused before anything is called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in HARMLESS:
            raise _Refused(f"it wants {module}.{name}")
        return HARMLESS[module, name]


def read_pickle(file: str) -> dict[bytes, Any]:
    """The dict in a pickle of CIFAR's Python format, its keys bytes and its arrays numpy's. Nothing in the file is run.

    Raises:
        ConfigError: the pickle names anything but an array, or is no dict.
    """
    with open(file, "rb") as stream:
        try:
            content = _TameUnpickler(stream, encoding="bytes").load()
            if not isinstance(content, dict):
                raise _Refused(f"it holds a {type(content).__name__}")
            return {key.encode() if isinstance(key, str) else key: _real(value) for key, value in content.items()}
        except _Refused as error:
            raise ConfigError(f"{file} is refused: a batch of CIFAR is a pickled dict of lists, text and arrays of bytes, and needs "
                              f"nothing else, but {error}. Nothing in it was run; take the file from where CIFAR is given out",
                              ("data_root",)) from error
        except Exception as error:                           # a damaged pickle fails in any way
            raise ConfigError(f"{file} cannot be read, it may be damaged: {type(error).__name__}: {error}", ("data_root",)) from error


def _real(value: Any) -> Any:
    """The array that a stand-in remembers; names that a Python 3 wrote as text become bytes, as those of a Python 2 are."""
    if isinstance(value, list):
        return [item.encode() if isinstance(item, str) else item for item in value]
    if not isinstance(value, _Array):
        return value
    if value.code not in ("u1", b"u1"):
        raise _Refused(f"it has an array of type {value.code!r}")
    flat = np.frombuffer(value.data, np.uint8)
    return flat.reshape(value.shape, order="F" if value.fortran else "C")
