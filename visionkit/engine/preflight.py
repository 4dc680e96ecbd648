"""Before the first iteration: is every component, argument, file and category of a config what the run needs?

A typo in the last hook, a missing image or an annotation file with other class names shall be told in seconds, not after an
epoch. The order is from cheap to dear: names and arguments of the whole config, then real builds, then data.
"""
from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import mmengine.evaluator
import mmengine.registry as mm
import mmengine.visualization  # noqa: F401  (its registry is filled by its import)
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from visionkit.registry import (
    BACKBONES,
    DATASETS,
    HEADS,
    HOOKS,
    LOOPS,
    LOSSES,
    METRICS,
    MODELS,
    NECKS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    SAMPLERS,
    TRANSFORMS,
    ConfigError,
    check_arguments,
    did_you_mean,
    registries,
)

Path = tuple[str | int, ...]

# The registry of a dict with a `type`, by the key it stands under: what surrounds the model, and a model's parts.
RUN_KEYS: tuple[tuple[str, mm.Registry], ...] = (
    ("model", MODELS), ("model_wrapper_cfg", mm.MODEL_WRAPPERS), ("dataset", DATASETS), ("datasets", DATASETS),
    ("sampler", SAMPLERS), ("batch_sampler", SAMPLERS), ("collate_fn", mm.FUNCTIONS), ("worker_init_fn", mm.FUNCTIONS),
    ("pipeline", TRANSFORMS), ("transforms", TRANSFORMS), ("*_evaluator", METRICS), ("metrics", METRICS),
    ("optim_wrapper", OPTIM_WRAPPERS), ("optimizer", OPTIMIZERS), ("param_scheduler", PARAM_SCHEDULERS),
    ("default_hooks", HOOKS), ("custom_hooks", HOOKS), ("train_cfg", LOOPS), ("val_cfg", LOOPS), ("test_cfg", LOOPS),
    ("visualizer", mm.VISUALIZERS), ("vis_backends", mm.VISBACKENDS), ("log_processor", mm.LOG_PROCESSORS))
PART_KEYS: tuple[tuple[str, mm.Registry], ...] = (
    ("data_preprocessor", MODELS), ("backbone", BACKBONES), ("neck", NECKS), ("*head", HEADS), ("rpn", HEADS), ("roi", HEADS),
    ("loss*", LOSSES), ("*_loss", LOSSES))
LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
# What the Runner takes from a component's dict for itself.
RUNNER_TAKES = {HOOKS: {"priority"}, PARAM_SCHEDULERS: {"convert_to_iter_based"}, OPTIM_WRAPPERS: {"constructor", "paramwise_cfg"}}
LOADER_TAKES = {"dataset", "sampler", "batch_sampler", "collate_fn", "worker_init_fn", "num_batch_per_epoch",
                "disable_subprocess_warning"}
# Top-level keys that somebody reads, beside the arguments of mmengine's Runner.
OTHER_KEYS = {"custom_imports", "runner_type", "model_wrapper_cfg", "sync_bn"}


def preflight(cfg: Config, training: bool = True) -> None:
    """Check a whole config before any long work.

    Args:
        cfg: as `load_config` returns it.
        training: also check what only training uses; otherwise the model and the test part.

    Raises:
        ConfigError: what was wanted, what came and what to change, with the path in the config.
    """
    check_keys(cfg)
    check_components(cfg)


# ------------------------------------------------------------------------------------------------------ names and arguments

def check_keys(cfg: Mapping[str, Any]) -> None:
    """Top-level keys that nobody reads: a near miss of one that is read is an error, an unused component is told.

    Names of a user's own, such as `data_root` or `train_pipeline`, are fine: the config itself uses them.
    """
    known = _known_keys()
    used = [part for key in known & set(cfg) for part in _parts(cfg[key])]
    for key in sorted(set(cfg) - known):
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        if near:
            raise ConfigError(f"nothing reads this key. Did you mean {near[0]!r}?", (key,))
        for part in _parts(cfg[key]):
            if isinstance(part, Mapping) and "type" in part and part not in used:
                print_log(f"config: nothing reads `{key}`, so its {part['type']} is not used", logger="current", level=logging.WARNING)
                break


def check_components(cfg: Mapping[str, Any]) -> None:
    """Look up every `type` of the config and compare the arguments with its signature; nothing is built."""
    for key in sorted(_known_keys() & set(cfg)):
        section = cfg[key]
        if isinstance(section, Mapping):
            section = _with_default_type(key, section)
            if key in LOADERS:
                _check_arguments(DataLoader, set(section) - LOADER_TAKES, (key,))
        _check_below(section, (key,))


def _known_keys() -> set[str]:
    return {*inspect.signature(Runner.__init__).parameters, *OTHER_KEYS} - {"self", "cfg"}


def _parts(node: Any) -> Iterator[Any]:
    """Every dict and list in `node`, itself first."""
    if isinstance(node, Mapping):
        yield node
        for value in node.values():
            yield from _parts(value)
    elif isinstance(node, (list, tuple)):
        yield node
        for value in node:
            yield from _parts(value)


def _with_default_type(key: str, section: Mapping[str, Any]) -> Mapping[str, Any]:
    """`section` with the type that the Runner gives it where it names none."""
    if "type" in section or not section:
        return section
    if key == "train_cfg":
        kind = "EpochBasedTrainLoop" if section.get("by_epoch", True) else "IterBasedTrainLoop"
        return {"type": kind, **{name: value for name, value in section.items() if name != "by_epoch"}}
    if key == "optim_wrapper" and "optimizer" not in section:
        return section                                       # several wrappers, each with its own type
    default = {"val_cfg": "ValLoop", "test_cfg": "TestLoop", "optim_wrapper": "OptimWrapper", "log_processor": "LogProcessor",
               "visualizer": "Visualizer"}
    return {"type": default[key], **section} if key in default else section


def _check_below(node: Any, path: Path) -> None:
    if isinstance(node, Mapping):
        if "type" in node:
            _check_component(node, path)
        for key, value in node.items():
            _check_below(value, (*path, key))
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            _check_below(value, (*path, index))


def _check_component(node: Mapping[str, Any], path: Path) -> None:
    registry = _registry_at(path, node)
    component = _look_up(node["type"], registry, path)
    if component is not None:
        given = set(node) - {"type", "_scope_"} - RUNNER_TAKES.get(registry, set())
        if registry is PARAM_SCHEDULERS and inspect.isclass(component):
            component = _without_mixin(component)
        _check_arguments(component, given, path)


def _without_mixin(scheduler: type) -> type:
    """mmengine's `CosineAnnealingLR(LRSchedulerMixin, CosineAnnealingParamScheduler)` takes `**kwargs`; its second base tells which."""
    takes_any = inspect.Parameter.VAR_KEYWORD
    return next((base for base in scheduler.__mro__
                 if all(p.kind is not takes_any for p in inspect.signature(base).parameters.values())), scheduler)


def _check_arguments(component: Any, given: set[str], path: Path) -> None:
    try:
        check_arguments(component, sorted(given), missing=False)
    except ConfigError as error:
        raise error.under(*path) from None


def _registry_at(path: Path, node: Mapping[str, Any]) -> mm.Registry | None:
    """The registry of the component at `path`; None where it can be any."""
    keys = [key for key in path if isinstance(key, str)]
    if keys[0] in ("default_hooks", "custom_hooks"):
        return HOOKS if len(keys) == 1 or (len(keys) == 2 and keys[0] == "default_hooks") else None
    if keys[0].endswith("_evaluator") and len(keys) == 1 and "metrics" in node:
        return mm.EVALUATOR
    table = PART_KEYS if keys[0] == "model" and len(keys) > 1 else RUN_KEYS
    return next((registry for pattern, registry in table if fnmatchcase(keys[-1], pattern)), None)


def _look_up(name: Any, registry: mm.Registry | None, path: Path) -> Any:
    """The component called `name`; None where it may be something that its owner interprets by itself.

    A part of a model may live in another registry than its key suggests, if its owner looks there, so all are searched before
    the name is called wrong.
    """
    if not isinstance(name, str):
        if not callable(name):
            raise ConfigError(f"a type is a name or a class, got {name!r}", (*path, "type"))
        return name
    for candidate in (registry, *registries()):
        if candidate is None:
            continue
        try:
            found = candidate.get(name)
        except (ConfigError, RuntimeError, KeyError):        # not there
            found = None
        if found is not None:
            return found
        if candidate is registry and path[0] != "model":     # what the Runner builds comes from this registry alone
            break
    if registry is None:
        return None
    try:
        registry.get(name)                                   # for its error
    except ConfigError as error:
        raise error.under(*path) from None
    except (RuntimeError, KeyError):
        pass
    known = ", ".join(sorted(registry.module_dict))
    near = did_you_mean(name, registry.module_dict) or f" Known: {known}."
    raise ConfigError(f"no {registry.name} named {name!r}.{near}", (*path, "type"))
