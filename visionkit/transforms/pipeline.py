"""A list of transforms, built so that an error names its place in the config."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmengine.dataset import Compose
from mmengine.registry import DefaultScope

from visionkit.registry import SCOPE, TRANSFORMS, ConfigError


def build_pipeline(transforms: Sequence[Mapping[str, Any] | Callable[[dict], dict | None]]) -> Compose:
    """Build transforms in order; those that are built already are taken as they are.

    Raises:
        ConfigError: one cannot be built; its path is `pipeline[i]` and what is below.
    """
    built = []
    with DefaultScope.overwrite_default_scope(SCOPE):        # mmcv's wrappers build what they wrap through the root registry
        for index, transform in enumerate(transforms):
            try:
                built.append(TRANSFORMS.make(transform, at=index))
            except ConfigError as error:
                raise error.under("pipeline") from error.__cause__
            except (TypeError, AssertionError) as error:     # how mmcv's constructors refuse an argument
                raise ConfigError(f"{transform.get('type')}: {error}", ("pipeline", index)) from error
    return Compose(built)


# Transforms that leave an image its size; those of the second line draw random numbers.
SAME_SIZE = {"LoadImageFromFile", "LoadAnnotations", "LoadPanopticAnnotations", "BoxesFromMasks", "PackSample"}
SAME_SIZE_AT_RANDOM = {"PhotoMetricDistortion", "RandomGrayscale"}


def random_size(pipeline: Compose) -> bool:
    """Whether one of the transforms draws the size of the image: whether it has `random_size`, and that is true."""
    return any(getattr(transform, "random_size", False) for transform in pipeline.transforms)


def output_size(pipeline: Compose, height: int, width: int) -> tuple[int, int]:
    """The (height, width) of the image that comes out of a pipeline, without an image.

    Every transform that may change the size has a method `output_size(height, width)`, which draws the same random numbers as the transform
    does, and in the same order.

    Raises:
        ConfigError: what a transform does to the size is not known, or cannot be repeated.
    """
    drew = ""                                                # a transform that draws numbers that are not drawn here
    for transform in pipeline.transforms:
        name = getattr(transform, "__name__", type(transform).__name__)
        names = {base.__name__ for base in type(transform).__mro__}
        if hasattr(transform, "output_size"):
            if drew and getattr(transform, "random_size", False):
                raise ConfigError(f"{name} draws the size of the image after {drew} has drawn other numbers, so that it is not known "
                                  f"before the image is loaded; put {name} first", ("pipeline",))
            height, width = transform.output_size(height, width)
        elif names & SAME_SIZE_AT_RANDOM:
            drew = name
        elif not names & SAME_SIZE:
            raise ConfigError(f"what {name} does to the size of an image is not known before the image is loaded; a transform tells it by "
                              f"a method output_size(height, width) that returns both", ("pipeline",))
    return height, width
