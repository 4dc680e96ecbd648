"""What every probe of frozen features shares: two splits, standardised features, and one encoder at a time."""
from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visionkit.evaluation.image_metric import ImageMetric
from visionkit.registry import ConfigError

# N training images, M test images, D values of a feature vector

COLUMNS = 256                                                # that are standardised at a time, so that no second matrix is needed
CONSTANT = 1e-6                                              # a value whose deviation is below so much of its mean says nothing


class ProbeMetric(ImageMetric):
    """How well a simple classifier on the features of one frozen encoder knows the labels, at each point where features are taken.

    Samples have `features`, a vector a point, `gt_label`, and as meta information `split` (`train` or `test`), `encoder` and `seed`, as
    `ProbeLoop` gives them, which measures the network at random initialisation beside. A subclass writes `measure`, and gives its `suffix`.
    """
    default_prefix = "probe"
    suffix: str

    @abstractmethod
    def measure(self, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
        """The accuracy on the test images.

        Args:
            train: [N, D] float32, standardised, in an order that the seed draws; may be changed.
            train_labels: [N] int64.
            test: [M, D], by the mean and deviation of `train`; may be changed.
            test_labels: [M].
        """

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Keep label and features of each image; the features stay where they are, uncopied."""
        for sample in data_samples:
            origin = "a probe runs in a test_cfg of type ProbeLoop, which takes it from the model"
            features = self.wanted(sample, "features", origin)
            label = self.wanted(sample, "gt_label", "a probe needs labelled images, such as those of ImageFolder")
            self.results.append({
                **{key: self.wanted(sample, key, origin) for key in ("img_id", "split", "encoder", "seed")}, "label": int(label),
                # as numpy: of a row of a tensor, a pickle to another process would hold the whole tensor
                "features": {name: vector.detach().float().cpu().numpy() for name, vector in features.items()}})

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """The accuracy at each point, from 0 to 1, named `<point>_<suffix>`."""
        encoders = {(image["encoder"], image["seed"]) for image in results}
        if len(encoders) != 1:
            raise ConfigError(f"{type(self).__name__} measures one encoder at a time, and was given "
                              f"{', '.join(f'{name} {seed}' for name, seed in sorted(encoders)) or 'no image'}")
        (_, seed), = encoders
        images = sorted(self.once_each(results, "split"), key=lambda image: str(image["img_id"]))      # in whatever order they came
        train, test = ([image for image in images if image["split"] == split] for split in ("train", "test"))
        classes = {image["label"] for image in train}
        if not test or len(train) < 10 or len(classes) < 2:
            raise ConfigError(f"a probe needs at least 10 training images of two classes and a test image, got {len(train)} of "
                              f"{len(classes)} and {len(test)}")
        train = [train[index] for index in np.random.default_rng(seed).permutation(len(train))]
        labels = [torch.tensor([image["label"] for image in split]) for split in (train, test)]
        accuracies = {}
        for name in train[0]["features"]:
            features = [self._matrix(split, name) for split in (train, test)]
            standardise(*features)
            accuracies[f"{name}_{self.suffix}"] = self.measure(features[0], labels[0], features[1], labels[1])
        return accuracies

    def _matrix(self, images: Sequence[Mapping[str, Any]], name: str) -> Tensor:
        """[number of images, D] the features at a point."""
        length = images[0]["features"][name].size
        matrix = np.empty((len(images), length), np.float32)
        for row, image in zip(matrix, images, strict=True):
            vector = image["features"][name]
            if vector.size != length:
                raise ConfigError(f"at {name!r} image {image['img_id']!r} has {vector.size} features and others {length}; bring all images "
                                  f"to one size in the pipeline, or set pool of this point")
            row[:] = vector.reshape(-1)
        if not np.isfinite(matrix.sum()):
            raise ConfigError(f"the features at {name!r} are not all finite numbers; look at the encoder's weights")
        return torch.from_numpy(matrix)


def standardise(train: Tensor, *others: Tensor) -> None:
    """Subtract the mean of `train` from each value and divide by its deviation there, in place; a constant value becomes 0.

    Args:
        train: [N, D] float32.
        others: [M, D], by the same mean and deviation.
    """
    for start in range(0, train.shape[1], COLUMNS):
        block = train[:, start:start + COLUMNS]
        exact = block.double()
        mean, deviation = exact.mean(0), exact.std(0, unbiased=False)
        scale = torch.where(deviation > CONSTANT * mean.abs(), 1 / deviation.clamp(min=torch.finfo().tiny), 0.0)
        for matrix in (train, *others):
            matrix[:, start:start + COLUMNS] = (matrix[:, start:start + COLUMNS].double() - mean) * scale
