"""What every data set shares: paths, the pipeline, seeds, and images that cannot be read."""
from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from mmengine.utils import is_abs

from visionkit.datasets.roots import resolve
from visionkit.datasets.sampler import Draw, draw_seed, generators_kept, seed_generators, seeded
from visionkit.registry import ConfigError, did_you_mean
from visionkit.transforms import BrokenImageError, build_pipeline, output_size, random_size

MAX_REPLACEMENTS = 20


class Dataset(BaseDataset):
    """Records in one packed buffer, which data-loader workers share, and a pipeline that turns one into a sample.

    `dataset[draw]` seeds `random`, numpy and torch from the draw for the length of the pipeline; `dataset[i]` of a plain int
    takes its randomness from where they stand.

    Args:
        ann_file: the annotation file, relative to `data_root`.
        data_root: by convention `data/<name>/`, which VISIONKIT_DATA moves.
        data_prefix: folders below `data_root`, by what they hold.
        metainfo: facts about the data set, such as `dict(classes=("cat", "dog"))`, or the name of a file with one class a line.
        pipeline: transforms, in order.
        filter_cfg: which records to leave out; a subclass says what it knows.
        indices: only the first (a negative number: the last) so many records, or those of a list.
        on_error: an image that cannot be read raises `BrokenImageError` (`raise`), or is replaced by another (`skip`); then
            `replaced`, a list of what could not be read, is in the sample's meta information.
        test_mode: the data set is for evaluation: `on_error="skip"` is refused, because a score over replaced images is another
            data set's score.
        lazy_init: read the annotation file at the first access.
    """

    PREFIXES: dict[str, str] = {"img": ""}                   # what data_prefix may name, and where it lies by default
    FILTERS: tuple[str, ...] = ()                            # what filter_cfg may name

    def __init__(self, ann_file: str = "", data_root: str = "", data_prefix: Mapping[str, str] | None = None,
                 metainfo: Mapping[str, Any] | None = None,
                 pipeline: Sequence[Mapping[str, Any] | Callable[[dict], dict | None]] = (),
                 filter_cfg: Mapping[str, Any] | None = None, indices: int | Sequence[int] | None = None,
                 on_error: str = "raise", test_mode: bool = False, lazy_init: bool = False) -> None:
        if on_error not in ("raise", "skip"):
            raise ConfigError(f"on_error must be 'raise' or 'skip', got {on_error!r}", ("on_error",))
        if on_error == "skip" and test_mode:
            raise ConfigError("an evaluation cannot replace images that it cannot read: its score would be another data set's. "
                              "Repair the files, or leave them out of the annotation file", ("on_error",))
        _check_keys(data_prefix or {}, tuple(self.PREFIXES), "data_prefix")
        _check_keys(filter_cfg or {}, self.FILTERS, "filter_cfg")
        self.on_error = on_error
        self.asked_ann_file = os.path.join(data_root, ann_file) if ann_file else ""
        super().__init__(ann_file=ann_file, data_root=data_root, data_prefix={**self.PREFIXES, **(data_prefix or {})}, metainfo=metainfo,
                         filter_cfg=dict(filter_cfg or {}), indices=indices, pipeline=[], test_mode=test_mode, lazy_init=True)
        self.pipeline = build_pipeline(pipeline)
        if not lazy_init:
            self.full_init()

    def _join_prefix(self) -> None:
        def place(path: str) -> str:
            return path if is_abs(path) else resolve(os.path.join(self.data_root, path))

        self.ann_file = place(self.ann_file) if self.ann_file else ""
        self.data_prefix = {key: place(prefix) for key, prefix in self.data_prefix.items()}

    def _serialize_data(self) -> tuple[np.ndarray, np.ndarray]:
        if not self.data_list:
            raise ConfigError(f"{type(self).__name__} has no records: {self.ann_file or 'the annotation file'} lists no image"
                              + (f" that passes filter_cfg={self.filter_cfg}" if self.filter_cfg else ""))
        return super()._serialize_data()

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """One record, without its image."""
        return super().get_data_info(idx + len(self) if idx < 0 else idx)        # mmengine fails at -len

    @property
    def random_size(self) -> bool:
        """Whether the pipeline draws the size of an image, so that it depends on the draw's seed."""
        return random_size(self.pipeline)

    def image_size(self, index: int) -> tuple[int, int]:
        """The (height, width) of an image before any transform, pixels. Loads nothing.

        Raises:
            ConfigError: the records do not tell.
        """
        record = Dataset.get_data_info(self, index)          # not a subclass's, which may make the picture
        if not record.get("height") or not record.get("width"):
            raise ConfigError(f"the records of {type(self).__name__} have no `height` and `width`, so an image's size is not known before "
                              f"it is loaded")
        return record["height"], record["width"]

    def output_sizes(self, indices: Iterable[int]) -> list[tuple[int, int]]:
        """The (height, width) of the images that `dataset[index]` gives for each index or draw. Loads nothing.

        Raises:
            ConfigError: the records do not tell, or a transform does not.
        """
        sizes = []
        with generators_kept():                              # transforms such as RandomFlip draw, whether or not that makes another size
            seeds = self.random_size
            for index in indices:
                if seeds and isinstance(index, Draw):
                    seed_generators(index.seed)
                sizes.append(output_size(self.pipeline, *self.image_size(index)))
        return sizes

    def __getitem__(self, index: int) -> Any:
        with seeded(index.seed if isinstance(index, Draw) else None):
            try:
                return super().__getitem__(index)
            except BrokenImageError as error:
                if self.on_error == "raise":
                    raise
                return self._replace(index, [str(error)])

    def _replace(self, index: int, messages: list[str]) -> Any:
        seed = index.seed if isinstance(index, Draw) else index % len(self)
        for attempt in range(1, MAX_REPLACEMENTS + 1):
            other = draw_seed(seed, attempt, 0) % len(self)
            try:
                sample = self.pipeline({**self.get_data_info(other), "replaced": messages})
            except BrokenImageError as error:
                messages.append(str(error))
            else:
                if sample is not None:                       # None: a transform found nothing to use in this image
                    return sample
        raise BrokenImageError(f"no usable image in {MAX_REPLACEMENTS + 1} draws; {len(messages)} could not be read, the last: "
                               f"{messages[-1]}")

    def _log(self, message: str, level: int = logging.INFO) -> None:
        print_log(f"{type(self).__name__}: {message}", logger="current", level=level)


def _check_keys(given: Mapping[str, Any], known: tuple[str, ...], argument: str) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"{argument} has no {key!r}.{did_you_mean(key, known)} It takes: {', '.join(known) or 'nothing'}.",
                              (argument, key))
