"""Before the first iteration: is every component, argument, file and category of a config what the run needs?

A typo in the last hook, a missing image or an annotation file with other class names shall be told in seconds, not after an
epoch. The order is from cheap to dear: names and arguments of the whole config, then real builds, then data.
"""
from __future__ import annotations

import contextlib
import difflib
import inspect
import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.logging import print_log
from mmengine.optim import OptimWrapperDict, build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS as ROOT_SCHEDULERS
from mmengine.registry import DefaultScope
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from visionkit.datasets.lengths import ImageTokens
from visionkit.datasets.packed_batches import PackedBatchSampler
from visionkit.datasets.sampler import InfiniteDrawSampler, seeded
from visionkit.engine.activation_checkpointing import parts_to_recompute
from visionkit.engine.checkpoint import part_of
from visionkit.models.base import Model
from visionkit.registry import (
    BACKBONES,
    DATASETS,
    EVALUATORS,
    FUNCTIONS,
    HEADS,
    HOOKS,
    LENGTHS,
    LOG_PROCESSORS,
    LOOPS,
    LOSSES,
    METRICS,
    MODEL_WRAPPERS,
    MODELS,
    NECKS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PACKERS,
    PARAM_SCHEDULERS,
    SAMPLERS,
    SCOPE,
    TRANSFORMS,
    VISBACKENDS,
    VISUALIZERS,
    ConfigError,
    Registry,
    check_arguments,
    did_you_mean,
    dotted,
    registries,
)
from visionkit.structures import Sample
from visionkit.transforms import BrokenImageError

Path = tuple[str | int, ...]

# The registry of a dict with a `type`, by the key it stands under: what surrounds the model, and a model's parts.
RUN_KEYS: tuple[tuple[str, Registry], ...] = (
    ("model", MODELS), ("model_wrapper_cfg", MODEL_WRAPPERS), ("dataset", DATASETS), ("datasets", DATASETS),
    ("sampler", SAMPLERS), ("batch_sampler", SAMPLERS), ("packer", PACKERS), ("length", LENGTHS), ("collate_fn", FUNCTIONS),
    ("worker_init_fn", FUNCTIONS),
    ("pipeline", TRANSFORMS), ("transforms", TRANSFORMS), ("*_evaluator", METRICS), ("metrics", METRICS),
    ("optim_wrapper", OPTIM_WRAPPERS), ("optimizer", OPTIMIZERS), ("param_scheduler", PARAM_SCHEDULERS),
    ("default_hooks", HOOKS), ("custom_hooks", HOOKS), ("train_cfg", LOOPS), ("val_cfg", LOOPS), ("test_cfg", LOOPS),
    ("visualizer", VISUALIZERS), ("vis_backends", VISBACKENDS), ("log_processor", LOG_PROCESSORS))
PART_KEYS: tuple[tuple[str, Registry], ...] = (
    ("data_preprocessor", MODELS), ("backbone", BACKBONES), ("puzzle", TRANSFORMS), ("neck", NECKS), ("*head", HEADS), ("rpn", HEADS),
    ("roi", HEADS), ("loss*", LOSSES), ("*_loss", LOSSES))
LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
# What the Runner takes from a component's dict for itself.
RUNNER_TAKES = {HOOKS: {"priority"}, PARAM_SCHEDULERS: {"convert_to_iter_based"}, OPTIM_WRAPPERS: {"constructor", "paramwise_cfg"}}
LOADER_TAKES = {"dataset", "sampler", "batch_sampler", "collate_fn", "worker_init_fn", "num_batch_per_epoch",
                "disable_subprocess_warning"}
# Top-level keys that somebody reads, beside the arguments of mmengine's Runner.
OTHER_KEYS = {"custom_imports", "runner_type", "model_wrapper_cfg", "sync_bn", "load_from_strict", "load_from_part",
              "find_unused_parameters", "tta", "activation_checkpointing"}
FILES = (".pth", ".pt", ".safetensors")                       # what weights are called that lie here
# What the Runner wants all together or not at all.
SECTIONS = (("train_dataloader", "train_cfg", "optim_wrapper"), ("val_dataloader", "val_cfg", "val_evaluator"),
            ("test_dataloader", "test_cfg", "test_evaluator"))


def preflight(cfg: Config, training: bool = True) -> None:
    """Check a whole config before any long work.

    The generators of random numbers are afterwards as they were.

    Args:
        cfg: as `load_config` returns it.
        training: check what training and validation use; otherwise what a test uses.

    Raises:
        ConfigError: what was wanted, what came and what to change, with the path in the config.
    """
    check_keys(cfg)
    check_components(cfg)
    check_sections(cfg, training)
    with seeded(0), DefaultScope.overwrite_default_scope(SCOPE):
        model = build_parts(cfg, training)
        if training and cfg.get("load_from_part"):
            part_of(model, cfg.load_from_part)
        if training and cfg.get("activation_checkpointing"):
            parts_to_recompute(model, cfg.activation_checkpointing)
        classes: dict[Path, tuple[str, ...]] = {}
        for path, section in _loaders(cfg, training):
            dataset, sampler, batch_sampler = build_data(section, *path)
            check_batches(cfg, sampler, batch_sampler, path)
            if path == ("train_dataloader",):
                check_last_batch(model, section, sampler, batch_sampler, path)
            check_tokens(model, batch_sampler, path)
            check_data(dataset, (*path, "dataset"), training=path == ("train_dataloader",))
            first = load_first(dataset, sampler, (*path, "dataset"))
            check_sample(model, first, (*path, "dataset"), training=path == ("train_dataloader",))
            if path == ("train_dataloader",):
                with _at(*path, "batch_sampler"):
                    batches = -(-len(sampler) // section.get("batch_size", 1)) if batch_sampler is None else len(batch_sampler)
                build_schedule(cfg, model, epoch_length=max(1, batches))
            if dataset_classes(dataset):
                classes[(*path, "dataset")] = dataset_classes(dataset)
        check_classes(cfg.model, model, classes)


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
        for path, node in _components(section, (key,)):
            _check_component(node, path)


def _loaders(cfg: Mapping[str, Any], training: bool) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """The data loaders of training and validation, or those of a test: the images that a probe learns from are a part of its loop."""
    for key in LOADERS[:2] if training else LOADERS[2:]:
        if cfg.get(key):
            yield (key,), cfg[key]
    section = (cfg.get("test_cfg") or {}).get("train_dataloader")
    if section and not training:
        yield ("test_cfg", "train_dataloader"), section


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


def _components(node: Any, path: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Every dict with a `type` in `node`, with its path."""
    if isinstance(node, Mapping):
        if "type" in node:
            yield path, node
        foreign = getattr(TRANSFORMS.module_dict.get(node.get("type")), "FOREIGN", ())
        for key, value in node.items():
            if key not in foreign:                           # names another package's classes
                yield from _components(value, (*path, key))
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _components(value, (*path, index))


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


def _check_component(node: Mapping[str, Any], path: Path) -> None:
    """Look one component up and compare its arguments.

    Where the key does not tell the registry, the owner may interpret the dict by itself, as mmcv does with
    `norm_cfg=dict(type="BN", requires_grad=True)`; then it is left to the real build. A part of a model may also live in another
    registry than its key suggests, if its owner looks there.
    """
    registry = _registry_at(path, node)
    if registry is None:
        return
    if path[0] == "model" and node["type"] not in registry and any(node["type"] in other for other in registries()):
        return
    component = node["type"]
    if isinstance(component, str):
        with _at(*path):
            component = registry.get(component)
    if not callable(component):
        raise ConfigError(f"a type is a name or a class, got {component!r}", (*path, "type"))
    if registry is PARAM_SCHEDULERS and inspect.isclass(component):
        component = _without_mixin(component)
    _check_arguments(component, set(node) - {"type", "_scope_"} - RUNNER_TAKES.get(registry, set()), path)


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


def _registry_at(path: Path, node: Mapping[str, Any]) -> Registry | None:
    """The registry of the component at `path`; None where it can be any."""
    keys = [key for key in path if isinstance(key, str)]
    if keys[0] in ("default_hooks", "custom_hooks"):
        return HOOKS if len(keys) == 1 or (len(keys) == 2 and keys[0] == "default_hooks") else None
    if keys[0].endswith("_evaluator") and len(keys) == 1 and "metrics" in node:
        return EVALUATORS
    table = PART_KEYS if keys[0] == "model" and len(keys) > 1 else RUN_KEYS
    return next((registry for pattern, registry in table if fnmatchcase(keys[-1], pattern)), None)


# --------------------------------------------------------------------------------------------------------------- real builds

def check_sections(cfg: Mapping[str, Any], training: bool) -> None:
    """What the Runner wants only together is there together, and the weights to start from are there."""
    if cfg.get("model") is None:
        raise ConfigError("the config has no `model`", ("model",))
    for key in dict.fromkeys((*itertools.chain(*SECTIONS), "param_scheduler", "visualizer", "log_processor")):
        _refuse_name(cfg.get(key), (key,))
    if isinstance(cfg.get("optim_wrapper"), Mapping):
        _refuse_name(cfg.optim_wrapper.get("optimizer"), ("optim_wrapper", "optimizer"))
    weights = cfg.get("load_from")
    if weights is not None and not isinstance(weights, str):
        raise ConfigError(f"this is the path of a checkpoint, got {weights!r}", ("load_from",))
    if weights and "://" not in weights and not os.path.isfile(os.path.expanduser(weights)):
        raise ConfigError(f"no file {weights!r} to load weights from", ("load_from",))
    if cfg.get("load_from_part") and not weights:
        raise ConfigError("this says what of the model to fill from `load_from`, which is not set", ("load_from_part",))
    if cfg.get("load_from_part") and (cfg.get("default_hooks") or {}).get("checkpoint", True) is None:
        raise ConfigError("it is the CheckpointHook that reads this; leave default_hooks.checkpoint as it is", ("load_from_part",))
    for path, weights in _pretrained(cfg.model, ("model",)) if training else ():
        if not os.path.isfile(os.path.expanduser(weights)):
            raise ConfigError(f"no file {weights!r} to load weights from", path)
    for group in SECTIONS:
        absent = [key for key in group if cfg.get(key) is None]
        needed = group[0] == ("train_dataloader" if training else "test_dataloader")
        if absent and (needed or len(absent) < len(group)):
            raise ConfigError(f"{', '.join(group)} belong together, and the config has no {' and no '.join(absent)}; "
                              f"{'set it' if needed else 'set it, or set all three to None'}", (absent[0],))


def _pretrained(node: Any, path: Path) -> Iterator[tuple[Path, str]]:
    """Every file that a part of the model is to be filled from, with its path in the config."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            initial = key == "checkpoint" and path[-1] == "init_cfg"
            if (key == "pretrained" or initial) and isinstance(value, str) and "://" not in value and value.endswith(FILES):
                yield (*path, key), value
            yield from _pretrained(value, (*path, key))


def build_parts(cfg: Config, training: bool) -> nn.Module:
    """Build the metrics, hooks, log processor and model; the model is returned."""
    metrics = [_build(METRICS, node, path) for path, node in _metrics(cfg, "val_evaluator" if training else "test_evaluator")]
    hooks = {("default_hooks", name): hook for name, hook in (cfg.get("default_hooks") or {}).items()}
    hooks |= {("custom_hooks", index): hook for index, hook in enumerate(cfg.get("custom_hooks") or ())}
    for path, hook in hooks.items():
        if hook is not None:
            with contextlib.suppress(RuntimeError):          # a hook may want the Runner's visualizer, which is not there yet
                _check_watched(_build(HOOKS, hook, path), metrics if training else [], path)
    if cfg.get("log_processor"):
        _build(LOG_PROCESSORS, _with_default_type("log_processor", cfg.log_processor), ("log_processor",))
    return _build(MODELS, cfg.model, ("model",))


def _metrics(cfg: Config, key: str) -> Iterator[tuple[Path, Any]]:
    section = cfg.get(key)
    path: Path = (key,)
    if isinstance(section, Mapping) and "metrics" in section:
        section, path = section["metrics"], (key, "metrics")
    if isinstance(section, (list, tuple)):
        yield from (((*path, index), metric) for index, metric in enumerate(section))
    elif section is not None:
        yield path, section


def _check_watched(hook: Any, metrics: Sequence[Any], path: Path) -> None:
    """The numbers that a hook watches, to keep the best checkpoint or to stop early, are among those that validation reports."""
    if not metrics or not all(hasattr(metric, "reported") for metric in metrics):
        return                                               # a metric does not tell its numbers before it is run
    known = [name for metric in metrics for name in metric.reported]
    for key, watched in (("save_best", getattr(hook, "metrics", ())), ("monitor", [getattr(hook, "monitor", "auto")])):
        for name in watched:
            if isinstance(name, str) and name != "auto" and name not in known:
                raise ConfigError(f"validation will not report {name!r}.{did_you_mean(name, known)} It reports: {', '.join(known)}.",
                                  (*path, key))


def build_data(section: Mapping[str, Any], *path: str) -> tuple[Any, Any, Any]:
    """Build the data set, the sampler and, where there is one, the batch sampler of the loader at `path`, and check its other settings."""
    for needed in ("dataset", "sampler"):
        if needed not in section:
            raise ConfigError(f"a loader needs a `{needed}`, and this one has only {', '.join(section)}", path)
    dataset = _build(DATASETS, section["dataset"], (*path, "dataset"))
    with _at(*path, "dataset"):
        if hasattr(dataset, "full_init"):
            dataset.full_init()
    sampler = _build(SAMPLERS, section["sampler"], (*path, "sampler"), dataset=dataset, seed=0)
    batch_sampler = None
    for key, owner in (("shuffle", "sampler"), ("drop_last", "batch_sampler")):
        if section.get(key) and section.get(owner):
            raise ConfigError(f"it is the {owner} that decides on this; leave {key} out", (*path, key))
    if section.get("batch_sampler"):
        if "batch_size" not in section:
            raise ConfigError("a loader needs a `batch_size` also with a `batch_sampler`, which is told it", path)
        batch_sampler = _build(SAMPLERS, section["batch_sampler"], (*path, "batch_sampler"), sampler=sampler,
                               batch_size=section["batch_size"])
    with _at(*path):                                         # number of workers, prefetching, ...: torch's own checks
        Runner.build_dataloader({**section, "dataset": range(8), "sampler": None, "batch_sampler": None})
    return dataset, sampler, batch_sampler


def check_batches(cfg: Mapping[str, Any], sampler: Any, batch_sampler: Any, path: Path) -> None:
    """Only training takes packs, and by epochs only from a sampler that comes to an end."""
    if path != ("train_dataloader",):
        if isinstance(batch_sampler, PackedBatchSampler):
            raise ConfigError("packs are for training: their last step is filled from the next pass, so that a score would count some "
                              "images twice; leave the batch_sampler out, a plain batch holds images of any size", (*path, "batch_sampler"))
        return
    loop = _with_default_type("train_cfg", cfg.get("train_cfg") or {}).get("type")
    loop = LOOPS.get(loop) if isinstance(loop, str) else loop
    if inspect.isclass(loop) and issubclass(loop, EpochBasedTrainLoop) and isinstance(sampler, (InfiniteDrawSampler, InfiniteSampler)):
        raise ConfigError(f"{type(sampler).__name__} never comes to the end of an epoch, which {loop.__name__} waits for; take a "
                          f"DrawSampler, or train by iterations: train_cfg=dict(type='IterLoop', max_iters=...)", (*path, "sampler"))


def check_last_batch(model: nn.Module, section: Mapping[str, Any], sampler: Any, batch_sampler: Any, path: Path) -> None:
    """The last batch of an epoch, which may be smaller than the others, is large enough for the model's loss."""
    least, batch_size = getattr(model, "least_images", 1), section.get("batch_size", 1)
    if batch_sampler is not None:                            # it tells by itself
        return
    if batch_size < least:
        raise ConfigError(f"{type(model).__name__} learns from at least {least} images at a time, got {batch_size}", (*path, "batch_size"))
    whole = section.get("drop_last") or isinstance(sampler, (InfiniteDrawSampler, InfiniteSampler))
    left = 0 if whole else len(sampler) % batch_size
    if 0 < left < least:
        raise ConfigError(f"{len(sampler)} images in batches of {batch_size} leave {left} for the last one, and {type(model).__name__} "
                          f"learns from at least {least} at a time; leave it out with drop_last=True", path)


def check_tokens(model: nn.Module, batch_sampler: Any, path: Path) -> None:
    """Images are filled up to whole tokens, and packs count the patches that the model's backbone makes of an image."""
    length = getattr(batch_sampler, "length", None)
    backbone = getattr(model, "backbone", None)
    if not hasattr(backbone, "patch_size"):
        return
    stride = backbone.strides[-1]
    multiple = getattr(getattr(model, "data_preprocessor", None), "multiple", stride)
    if multiple % stride:
        raise ConfigError(f"a token of {type(backbone).__name__} is {stride} pixels each way, and images are filled up to multiples of "
                          f"{multiple}; set it to {stride}", ("model", "data_preprocessor", "multiple"))
    if not isinstance(length, ImageTokens):
        return
    if (length.patch_size, length.patch_size * length.merge) != (backbone.patch_size, multiple):
        counted = length.patch_size * length.merge
        raise ConfigError(f"the model cuts patches of {backbone.patch_size} pixels out of images that are filled up to multiples of "
                          f"{multiple}, and packs count patches of {length.patch_size} pixels and multiples of {counted}; take "
                          f"dict(type='ImageTokens', patch_size={backbone.patch_size}, merge={multiple // backbone.patch_size})",
                          (*path, "batch_sampler", "length"))


def build_schedule(cfg: Config, model: nn.Module, epoch_length: int) -> None:
    """Build the optimizer on the model's parameters, and the schedulers on it."""
    with _at("optim_wrapper"):
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper) if isinstance(cfg.optim_wrapper, Mapping) else cfg.optim_wrapper
    schedulers = cfg.get("param_scheduler") or ()
    if isinstance(wrapper, OptimWrapperDict):                # several optimizers: their names and arguments are checked above
        return
    alone = isinstance(schedulers, Mapping)
    for index, scheduler in enumerate([schedulers] if alone else schedulers):
        path = ("param_scheduler",) if alone else ("param_scheduler", index)
        with _at(*path):
            by_epoch = scheduler.get("by_epoch", True)
            iterations = cfg.train_cfg.get("max_iters") or cfg.train_cfg.get("max_epochs", 1) * epoch_length
            end = cfg.train_cfg.get("max_epochs", iterations // epoch_length) if by_epoch else iterations
            # through the root: its build function knows convert_to_iter_based
            ROOT_SCHEDULERS.build({"end": end, **scheduler}, default_args={"optimizer": wrapper, "epoch_length": epoch_length})


def _refuse_name(node: Any, path: Path) -> None:
    if isinstance(node, str):
        raise ConfigError(f"a component is dict(type={node!r}, ...) here, got the text {node!r}", path)


def _build(registry: Registry, node: Any, path: Path, **offered: Any) -> Any:
    _refuse_name(node, path)
    if not isinstance(node, Mapping):
        return node
    node = {key: value for key, value in node.items() if key not in RUNNER_TAKES.get(registry, ())}
    with _at(*path):
        return registry.build(node, default_args=offered) if offered else registry.build(node)


@contextlib.contextmanager
def _at(*path: str | int) -> Iterator[None]:
    """Errors from the block get their place in the config. Those that tell of a bug rather than of a setting pass through."""
    try:
        yield
    except ConfigError as error:
        raise error.under(*path) from error.__cause__
    except (ValueError, TypeError, LookupError, AssertionError, ImportError, OSError) as error:
        kind = "" if type(error) is ValueError or isinstance(error, BrokenImageError) else f"{type(error).__name__}: "
        raise ConfigError(f"{kind}{error}", path) from error


# ------------------------------------------------------------------------------------------------------------------------ data

def leaves(dataset: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """The data sets within wrappers such as ConcatDataset, with their paths in the config."""
    if hasattr(dataset, "datasets"):
        for index, part in enumerate(dataset.datasets):
            yield from leaves(part, (*path, "datasets", index))
    elif hasattr(dataset, "dataset"):
        yield from leaves(dataset.dataset, (*path, "dataset"))
    else:
        yield path, dataset


def check_data(dataset: Any, path: Path, training: bool) -> None:
    """Every image file exists; for training, there is a box to learn from where boxes are what a pipeline loads."""
    boxes = [_has_boxes(leaf) for _, leaf in leaves(dataset, path) if _loads_annotations(leaf)]
    if training and boxes and all(found is False for found in boxes):
        raise ConfigError(
            f"no box is left to train on in {len(dataset)} images. Classes: {', '.join(dataset_classes(dataset)) or 'none'}. "
            f"Compare them with the annotation file, and look at filter_cfg", path)
    for leaf_path, leaf in leaves(dataset, path):
        missing = missing_files(leaf)
        if missing:
            named = ", ".join(f"{file} (image id {img_id})" for img_id, file in missing[:3])
            message = f"{len(missing)} of {len(leaf)} image files do not exist: {named}{', ...' if len(missing) > 3 else ''}"
            if getattr(leaf, "on_error", "raise") == "skip":
                print_log(f"{dotted(leaf_path)}: {message}; others replace them", logger="current", level=logging.WARNING)
            else:
                raise ConfigError(f"{message}. Look at data_root and data_prefix, or set on_error='skip' to train without them", leaf_path)


def missing_files(dataset: Any) -> list[tuple[Any, str]]:
    """(image id, path) of each image file that is not there; a listing a folder, not a question a file."""
    if not hasattr(dataset, "get_data_info") or "img" in dataset.get_data_info(0):
        return []                                            # generated
    listings: dict[str, set[str]] = {}
    missing = []
    for index in range(len(dataset)):
        record = dataset.get_data_info(index)
        file = record.get("img_path")
        if not file or "://" in file:
            continue
        folder, name = os.path.split(file)
        if folder not in listings:
            listings[folder] = {entry.name for entry in os.scandir(folder or ".")} if os.path.isdir(folder or ".") else set()
        if name not in listings[folder]:
            missing.append((record.get("img_id", index), file))
    return missing


def load_first(dataset: Any, sampler: Any, path: Path) -> Any:
    """The first sample, through the whole pipeline; where that fails, the error names the transform."""
    draw = next(iter(sampler), None)
    if draw is None:                                         # more processes than images
        return None
    try:
        return dataset[draw]
    except Exception as error:
        for leaf_path, leaf in leaves(dataset, path):
            if leaf is dataset and hasattr(getattr(leaf, "pipeline", None), "transforms"):
                results = leaf.get_data_info(draw)
                for index, transform in enumerate(leaf.pipeline.transforms):
                    with _at(*leaf_path, "pipeline", index):
                        results = transform(results)
                    if results is None:
                        break
        with _at(*path):
            raise error


def check_sample(model: nn.Module, first: Any, path: Path, training: bool) -> None:
    """The first sample is one for a model of ours, and in training has what its loss reads."""
    if not isinstance(model, Model) or first is None:
        return
    if not isinstance(first, Mapping) or not {"inputs", "data_samples"} <= set(first):
        given = f"a dict of {', '.join(map(str, first)) or 'nothing'}" if isinstance(first, Mapping) else f"a {type(first).__name__}"
        raise ConfigError(f"a model takes dict(inputs=..., data_samples=...), and the pipeline ends with {given}; let it end with "
                          f"dict(type='PackSample')", (*path, "pipeline"))
    sample = first["data_samples"]                           # several views of an image are a list
    absent = [field for field in model.learns_from if isinstance(sample, Sample) and field not in sample]
    if absent and training:
        advice = {"gt_instances": "let its pipeline load them, with LoadAnnotations before PackSample, from a data set of objects",
                  "gt_label": "take a data set with labels, such as ImageFolder"}
        raise ConfigError(f"{type(model).__name__} learns from {' and '.join(absent)}, which the samples here do not have; "
                          f"{advice.get(absent[0], 'let its pipeline load them')}", path)


def dataset_classes(dataset: Any) -> tuple[str, ...]:
    """The names of the classes; empty where the data set has none."""
    return tuple((getattr(dataset, "metainfo", None) or {}).get("classes", ()))


def check_classes(model_cfg: Any, model: nn.Module, classes: Mapping[Path, tuple[str, ...]]) -> None:
    """All data sets have the same classes in the same order, and the model predicts as many."""
    if not classes:
        return
    (first_path, first), *others = classes.items()
    for path, names in others:
        if names != first:
            raise ConfigError(f"its classes are {', '.join(names)}, but those of {dotted(first_path)} are {', '.join(first)}; a label is "
                              f"an index into them, so set metainfo=dict(classes=...) to the same in both", path)
    for place, number in _class_numbers(model_cfg, model):
        if number != len(first):
            raise ConfigError(f"the model has {number} classes, but {dotted(first_path)} has {len(first)} ({', '.join(first)}); "
                              f"set num_classes={len(first)}", place)


def _class_numbers(model_cfg: Any, model: nn.Module) -> list[tuple[Path, int]]:
    """Every `num_classes` of the model, the backbone's aside: those in the config, or else those of the modules."""
    found = [((*path, "num_classes"), node["num_classes"]) for path, node in _components(model_cfg, ("model",)) if "num_classes" in node]
    if not found:
        found = [(("model", *name.split("."), "num_classes") if name else ("model", "num_classes"), module.num_classes)
                 for name, module in model.named_modules() if isinstance(getattr(module, "num_classes", None), int)]
    return [(path, number) for path, number in found if "backbone" not in path]


def _loads_annotations(dataset: Any) -> bool:
    """Whether a pipeline takes more than the images; true where it does not tell."""
    transforms = getattr(getattr(dataset, "pipeline", None), "transforms", None)
    return transforms is None or any(base.__name__.endswith("Annotations") for transform in transforms for base in type(transform).__mro__)


def _has_boxes(dataset: Any) -> bool | None:
    """Whether any object counts; None where the data set is not of objects."""
    if not hasattr(dataset, "get_data_info") or not len(dataset) or "instances" not in dataset.get_data_info(0):
        return None
    return any(not instance.get("ignore_flag") for index in range(len(dataset)) for instance in dataset.get_data_info(index)["instances"])
