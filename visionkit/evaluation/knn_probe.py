"""What the nearest neighbours in the space of frozen features say (Wu et al. 2018, arXiv:1805.01978, sec. 3.4)."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from visionkit.evaluation.accuracy import chance_to_be_right
from visionkit.evaluation.probe import ProbeMetric
from visionkit.registry import METRICS, ConfigError

# N training images, M test images, C classes

ROWS = 512                                                   # test images that are compared with all training images at a time


@METRICS.register_module()
class KNNProbe(ProbeMetric):
    """The vote of the nearest training images by the cosine of standardised features: `probe/<point>_knn`, the accuracy on the test images.

    A neighbour of similarity s votes for its class with exp(s / temperature).

    Args:
        neighbours: that vote; the paper takes 200.
        temperature: the paper's 0.07.
        collect_device: where results of several processes meet, `cpu` or `gpu`.
        prefix: put before the name of each number.

    Raises:
        ConfigError: an argument out of range, more neighbours than training images, or samples that ProbeLoop did not make.
    """
    suffix = "knn"

    def __init__(self, neighbours: int = 200, temperature: float = 0.07, collect_device: str = "cpu", prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if neighbours < 1 or temperature <= 0:
            raise ConfigError(f"neighbours is at least 1 and temperature above 0; got {neighbours=}, {temperature=}")
        self.neighbours = neighbours
        self.temperature = temperature

    def measure(self, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
        if self.neighbours > len(train):
            raise ConfigError(f"{self.neighbours} neighbours are to vote and there are {len(train)} training images; set fewer, as in "
                              f"dict(type='KNNProbe', neighbours={max(1, len(train) // 10)})", ("neighbours",))
        for matrix in (train, test):
            matrix /= matrix.norm(dim=1, keepdim=True).clamp(min=1e-12)
        classes = int(max(train_labels.max(), test_labels.max())) + 1
        ballots = F.one_hot(train_labels, classes).float()                                                              # [N, C]
        right = 0.0
        for queries, labels in zip(test.split(ROWS), test_labels.split(ROWS), strict=True):
            similarity, nearest = (queries @ train.T).topk(self.neighbours)                                             # [M, neighbours]
            votes = ((similarity / self.temperature).exp()[..., None] * ballots[nearest]).sum(1)                        # [M, C]
            right += float(chance_to_be_right(votes.numpy(), labels.numpy()).sum())
        return right / len(test)
