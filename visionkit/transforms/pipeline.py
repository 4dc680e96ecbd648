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
