"""What the features of a pretrained network are worth, beside those of the same network at random initialisation."""
from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mmengine.dist import all_gather_object, get_world_size
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner, TestLoop
from torch import Tensor
from torch.utils.data import DataLoader

from visionkit.datasets.sampler import seeded
from visionkit.engine.checkpoint import load_weights
from visionkit.engine.preflight import dataset_classes, leaves
from visionkit.evaluation import ProbeComparison
from visionkit.models.base import Model
from visionkit.registry import LOOPS, MODELS, ConfigError, did_you_mean
from visionkit.structures import Sample

FEWEST_SEEDS = 3

# B images, D features of one image


class Point(NamedTuple):
    """Where features are taken, and how a map becomes a vector."""
    feature: str                # its name in what the model's `extract_features` returns
    pool: int | None = None     # cells of the grid, each way, over which a map is averaged; None: every location counts by itself


@LOOPS.register_module()
class ProbeLoop(TestLoop):
    """Measure frozen features by probes, as `test_cfg=dict(type="ProbeLoop", ...)`.

    Each encoder is in evaluation mode, without gradients, and is compared before and after: a probe that trains its encoder measures
    something else. Beside the pretrained one, the same network at random initialisation is always measured, built anew from the config with
    each of the seeds. The metrics (`LinearProbe`, `KNNProbe`) see one encoder at a time.

    Args:
        runner: the runner; it gives itself, the data loader and the evaluator.
        dataloader: of the labelled test images.
        evaluator: of metrics that are probes.
        train_dataloader: of the labelled training images; its pipeline should change nothing at random.
        points: by a name of yours, `dict(feature="map1", pool=2)`: an entry of what the model's `extract_features` returns, averaged over a
            grid of 2x2 cells; `pool=None`, the default, takes the map as it is. A vector is taken as it is.
        seeds: of the networks at random initialisation, at least three; the probes draw their held-out images by them.
        checkpoints: one or more further checkpoints of the same pretraining with other seeds, so that the pretrained row has a spread.

    Raises:
        ConfigError: fewer than three seeds, no point, a point that the model does not have, training and test images that share a file or
            have other classes, an encoder that changes while it is looked at, or networks of two seeds that are the same.
    """

    def __init__(self, runner: Runner, dataloader: DataLoader | dict, evaluator: Any, train_dataloader: DataLoader | Mapping[str, Any],
                 points: Mapping[str, Mapping[str, Any]], seeds: Sequence[int] = (0, 1, 2),
                 checkpoints: Sequence[str] | str = ()) -> None:
        checkpoints = [checkpoints] if isinstance(checkpoints, str) else checkpoints
        if not isinstance(seeds, Sequence) or len(set(seeds)) < max(FEWEST_SEEDS, len(seeds)):
            raise ConfigError(f"networks at random initialisation are needed from at least {FEWEST_SEEDS} different seeds, got {seeds}",
                              ("test_cfg", "seeds"))
        self.points = read_points(points)
        self.seeds = tuple(seeds)
        self.checkpoints = tuple(checkpoints)
        files = [os.path.realpath(file) for file in (*self.checkpoints, runner._load_from or "")]
        if len(set(files)) < len(files):
            raise ConfigError(f"a checkpoint stands twice in {', '.join(files)}; its spread would be none", ("test_cfg", "checkpoints"))
        absent = [file for file in self.checkpoints if not os.path.isfile(file)]
        if absent:
            raise ConfigError(f"no file {absent[0]!r} to load weights from", ("test_cfg", "checkpoints"))
        if train_dataloader is None:
            raise ConfigError("a probe learns from labelled training images; give it a loader of them", ("test_cfg", "train_dataloader"))
        super().__init__(runner, dataloader, evaluator)
        if isinstance(train_dataloader, Mapping):
            train_dataloader = runner.build_dataloader(dict(train_dataloader), seed=runner.seed)
        self.train_dataloader = train_dataloader
        check_splits(train_dataloader.dataset, self.dataloader.dataset)

    def run(self) -> dict[str, float]:
        self.runner.call_hook("before_test")
        self.runner.call_hook("before_test_epoch")
        comparison = ProbeComparison()
        baselines: dict[int, dict[str, Tensor]] = {}
        for encoder, seed, model in self.encoders():
            start = time.perf_counter()
            numbers, first = self.measure(model, encoder, seed)
            if encoder == "random":
                check_random(baselines, seed, first)
            comparison.add(encoder, numbers)
            found = ", ".join(f"{name.rpartition('/')[2]} {value:.3f}" for name, value in numbers.items())
            self.runner.logger.info(f"{encoder} encoder, seed {seed}: {found} ({time.perf_counter() - start:.0f} s)")
        self.runner.logger.info(f"frozen features of {len(self.train_dataloader.dataset)} training and {len(self.dataloader.dataset)} test "
                                f"images\n{comparison.table()}")
        metrics = comparison.numbers()
        self.runner.call_hook("after_test_epoch", metrics=metrics)
        self.runner.call_hook("after_test")
        return metrics

    def encoders(self) -> Iterator[tuple[str, int, Model]]:
        """`pretrained` or `random`, the seed, and the network; one after the other, so that one is in memory beside the runner's."""
        model = self.runner.model.module if is_model_wrapper(self.runner.model) else self.runner.model
        device = next(model.parameters()).device
        yield "pretrained", self.seeds[0], model
        strict = self.runner.cfg.get("load_from_strict", True)
        for number, checkpoint in enumerate(self.checkpoints, 1):
            other = MODELS.make(self.runner.cfg.model, at="model")
            load_weights(other, checkpoint, strict)
            yield "pretrained", self.seeds[number % len(self.seeds)], other.to(device)
        for seed in self.seeds:
            yield "random", seed, random_network(self.runner.cfg.model, seed).to(device)

    def measure(self, model: Model, encoder: str, seed: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        """What the probes find, and the features of the first image."""
        first: dict[str, Tensor] = {}
        count = 0
        with frozen(model):
            for split, loader in (("train", self.train_dataloader), ("test", self.dataloader)):
                for batch in loader:
                    vectors, samples = features_of(model, batch, self.points)
                    first = first or {name: vector[0].clone() for name, vector in vectors.items()}
                    self.evaluator.process([_labelled(sample, split, encoder, seed, {name: vector[row] for name, vector in vectors.items()})
                                            for row, sample in enumerate(samples)])
                    count += len(samples)
        total = sum(all_gather_object(count)) if get_world_size() > 1 else count
        return self.evaluator.evaluate(total), first


def _labelled(sample: Sample, split: str, encoder: str, seed: int, features: dict[str, Tensor]) -> Sample:
    probed = Sample(metainfo={"img_id": sample.get("img_id"), "split": split, "encoder": encoder, "seed": seed})
    probed.features = features
    if "gt_label" in sample:
        probed.gt_label = sample.gt_label
    return probed


def read_points(points: Mapping[str, Mapping[str, Any]]) -> dict[str, Point]:
    """The points of a config.

    Raises:
        ConfigError: there is none, or one is not `dict(feature=..., pool=...)`.
    """
    if not points or not isinstance(points, Mapping):
        raise ConfigError("a probe needs a point at which features are taken, such as points=dict(block2=dict(feature=\"map1\", pool=2))",
                          ("test_cfg", "points"))
    for name, point in points.items():
        known = isinstance(point, Mapping) and "feature" in point and not set(point) - {"feature", "pool"}
        pool = point.get("pool") if known else None
        if not known or not (pool is None or type(pool) is int and pool >= 1):
            raise ConfigError(f"a point is dict(feature=<name>, pool=<cells each way, or None>), got {point!r}",
                              ("test_cfg", "points", name))
    return {name: Point(**point) for name, point in points.items()}


@contextlib.contextmanager
def frozen(model: Model) -> Iterator[None]:
    """In the block `model` is in evaluation mode and no gradient is kept; it stays in evaluation mode.

    Raises:
        ConfigError: afterwards a parameter or buffer is not what it was.
    """
    def values() -> dict[str, Tensor]:
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}

    before = {name: value.detach().clone() for name, value in values().items()}
    model.eval()
    with torch.no_grad():
        yield
    after = values()
    changed = [name for name in before if not torch.allclose(before[name], after[name], rtol=0, atol=0, equal_nan=True)]
    if changed:
        raise ConfigError(f"a probe measures a frozen encoder, but looking at its features changed {', '.join(changed[:5])} of "
                          f"{type(model).__name__}; keep `extract_features` from training and from updating batch statistics", ("model",))


@torch.no_grad()
def features_of(model: Model, batch: Mapping[str, Any], points: Mapping[str, Point]) -> tuple[dict[str, Tensor], list[Sample]]:
    """[B, D] float32 at each point, on the CPU, and the samples of the batch.

    Args:
        model: in evaluation mode.
        batch: as a data loader gives it.
        points: by name.

    Raises:
        ConfigError: the model has no such feature, or the images are not of one size.
    """
    data = model.data_preprocessor(batch, training=False)
    images = data["images"]
    if len(set(images.sizes)) > 1:
        raise ConfigError(f"a probe compares images of one size, but a batch has {' and '.join(f'{w}x{h}' for h, w in set(images.sizes))}; "
                          f"let the pipeline bring all to one, such as with Resize", ("test_dataloader", "dataset", "pipeline"))
    found = model(images, mode="features")
    vectors = {}
    for name, point in points.items():
        if point.feature not in found:
            raise ConfigError(f"{type(model).__name__} has no features {point.feature!r}.{did_you_mean(point.feature, found)} It has: "
                              f"{', '.join(found)}.", ("test_cfg", "points", name, "feature"))
        feature = found[point.feature].float()
        if feature.dim() > 2 and point.pool is not None:
            if point.pool > min(feature.shape[-2:]):
                raise ConfigError(f"{point.feature!r} has {' x '.join(map(str, feature.shape[-2:]))} locations here, and {point.pool} x "
                                  f"{point.pool} cells would only repeat them; pool at most {min(feature.shape[-2:])}, or None for all",
                                  ("test_cfg", "points", name, "pool"))
            feature = F.adaptive_avg_pool2d(feature, point.pool)
        vectors[name] = feature.flatten(1).contiguous().cpu()
    return vectors, data["samples"]


def random_network(cfg: Mapping[str, Any], seed: int) -> Model:
    """The network of a config as its constructors draw it from `seed`: what its `init_weights` would load is not loaded."""
    with seeded(seed):
        return MODELS.make(cfg, at="model")


def check_random(baselines: dict[int, dict[str, Tensor]], seed: int, first: dict[str, Tensor]) -> None:
    """Note the features of the first image at one seed.

    Raises:
        ConfigError: another seed has the same at a point, so that it is no random network.
    """
    for other, features in baselines.items():
        for name, vector in first.items():
            if torch.equal(vector, features[name]):
                raise ConfigError(f"at {name!r} the networks of the seeds {other} and {seed} have the same features, so they are not at "
                                  f"random initialisation; a part of the model loads its weights when it is built, or the features are "
                                  f"constant", ("test_cfg", "points", name))
    baselines[seed] = first


def check_splits(train: Any, test: Any) -> None:
    """Training and test images have the same classes and share no file.

    Raises:
        ConfigError: they have others, or do; a probe of such splits would not tell what it seems to.
    """
    classes, test_classes = dataset_classes(train), dataset_classes(test)
    if classes != test_classes:
        raise ConfigError(f"its classes are {', '.join(classes) or 'none'}, but those of test_dataloader.dataset are "
                          f"{', '.join(test_classes) or 'none'}; a label is an index into them, so they have to be the same",
                          ("test_cfg", "train_dataloader", "dataset"))
    shared = _files(train) & _files(test)
    if shared:
        raise ConfigError(f"{len(shared)} images are also test images, such as {min(shared)}; a probe is tested on images that it has not "
                          f"seen", ("test_cfg", "train_dataloader", "dataset"))


def _files(dataset: Any) -> set[str]:
    """The image files of a data set; none where it keeps or makes its images itself."""
    files = set()
    for _, leaf in leaves(dataset, ()):
        if hasattr(leaf, "get_data_info") and len(leaf) and "img" not in leaf.get_data_info(0):
            files |= {os.path.abspath(file) for file in (leaf.get_data_info(index).get("img_path") for index in range(len(leaf))) if file}
    return files
