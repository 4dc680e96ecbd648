"""The nearest neighbours of images in the space of a network's features, to look at."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DefaultScope
from torch import Tensor

from visionkit.engine.checkpoint import load_weights
from visionkit.engine.pictures import original_image
from visionkit.engine.preflight import dataset_classes
from visionkit.engine.probing import Point, features_of, frozen, random_network, read_points
from visionkit.evaluation.probe import standardise
from visionkit.models.base import Model
from visionkit.registry import DATASETS, MODELS, SCOPE, ConfigError, did_you_mean
from visionkit.visualization.neighbours import draw_neighbours

BATCH = 64

# N images, D features, Q queries, K neighbours


class Gallery(NamedTuple):
    """Images with the features of a network."""
    features: Tensor            # [N, D] float32, standardised over the N images
    images: list[np.ndarray]    # uint8 [h, w, 3], RGB, in the original size
    labels: list[int | None]


def neighbour_sheet(cfg: Config, checkpoint: str | None, *, point: str | None = None, queries: int = 8, neighbours: int = 8,
                    images: int = 2000, seed: int = 0, device: str | None = None) -> np.ndarray:
    """A picture with a row for each of some test images: the image, and the test images nearest to it.

    Args:
        cfg: from `load_config`.
        checkpoint: .pth or .safetensors; None for the network at random initialisation, drawn from `seed`.
        point: one of the points of a ProbeLoop; by default its last one, or without such a loop the mean of the last feature.
        queries: rows; which images depends on `seed` alone.
        neighbours: images a row, the query not counted.
        images: of the test set, at equal distances in its order, among which neighbours are looked for; 0 for all.
        seed: of the choice of queries, and of a random network.
        device: such as `cuda:1` or `cpu`; by default a GPU if there is one.

    Raises:
        ConfigError: the config, the checkpoint or the point cannot be used, or there are too few images.
    """
    if queries < 1 or neighbours < 1 or images < 0:
        raise ConfigError(f"at least one query and one neighbour are drawn, of 0 (all) or more images; got {queries}, {neighbours} and "
                          f"{images}")
    with DefaultScope.overwrite_default_scope(SCOPE):
        model = random_network(cfg.model, seed) if checkpoint is None else MODELS.make(cfg.model, at="model")
        if not cfg.get("test_dataloader"):
            raise ConfigError("neighbours are looked for among the test images, and the config has none", ("test_dataloader",))
        dataset = DATASETS.build(dict(cfg.test_dataloader["dataset"]))
    if checkpoint is not None:
        load_weights(model, checkpoint, strict=cfg.get("load_from_strict", True))
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # a folder of classes lists one class after the other, so that the first images would be of one class
    places = np.linspace(0, len(dataset) - 1, min(images or len(dataset), len(dataset))).round().astype(int).tolist()
    gallery = gather(model, (dataset[place] for place in places), _point(cfg, point))
    if len(gallery.images) <= neighbours:
        raise ConfigError(f"{neighbours} neighbours of an image are wanted among {len(gallery.images)} images, itself not counted")
    chosen = torch.randperm(len(gallery.images), generator=torch.Generator().manual_seed(seed))[:queries]
    found = nearest(gallery.features, chosen, neighbours)
    rows = torch.cat([chosen[:, None], found], 1).tolist()
    return draw_neighbours([[gallery.images[index] for index in row] for row in rows],
                           [[gallery.labels[index] for index in row] for row in rows], dataset_classes(dataset))


def gather(model: Model, packed: Iterator[Mapping[str, Any]], point: Point | None) -> Gallery:
    """The features of images.

    Args:
        model: is put into evaluation mode.
        packed: images as PackSample gives them.
        point: where features are taken; None for the mean of the last feature that the model gives.
    """
    vectors, images, labels = [], [], []
    with frozen(model):
        while batch := list(islice(packed, BATCH)):
            if point is None:
                data = model.data_preprocessor(pseudo_collate(batch), training=False)
                point = Point(list(model(data["images"], mode="features"))[-1], 1)
            images += [original_image(one["inputs"], one["data_samples"]) for one in batch]
            labels += [int(one["data_samples"].gt_label) if "gt_label" in one["data_samples"] else None for one in batch]
            vectors.append(features_of(model, pseudo_collate(batch), {"point": point})[0]["point"])
    features = torch.cat(vectors)
    standardise(features)
    return Gallery(features, images, labels)


def nearest(features: Tensor, queries: Tensor, count: int) -> Tensor:
    """[Q, K] the images nearest to each query by the cosine of their features, the nearest first, itself left out.

    Args:
        features: [N, D].
        queries: [Q] indices of images.
        count: K.
    """
    unit = features / features.norm(dim=1, keepdim=True).clamp(min=1e-12)
    similarity = unit[queries] @ unit.T                                                                                 # [Q, N]
    similarity[torch.arange(len(queries)), queries] = -torch.inf
    return similarity.topk(count)[1]


def _point(cfg: Config, name: str | None) -> Point | None:
    """The point of that name in the config's ProbeLoop, or its last one; None where the config has no such loop and no name is given."""
    configured = (cfg.get("test_cfg") or {}).get("points") or {}
    if name is None and not configured:
        return None
    points = read_points(configured)
    if name is not None and name not in points:
        raise ConfigError(f"no point {name!r}.{did_you_mean(name, points)} The config has: {', '.join(points)}.", ("test_cfg", "points"))
    return points[name or list(points)[-1]]
