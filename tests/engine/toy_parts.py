"""A model and a data set that take milliseconds and use every source of randomness; configs import this module by its name."""
import os
import random
import signal
import time

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from torch import nn

from visionkit.datasets.sampler import seeded
from visionkit.models.base import Model
from visionkit.registry import DATASETS, HOOKS, LENGTHS, METRICS, MODELS
from visionkit.structures import Sample

SEEN: list[tuple[int, float]] = []                           # image id and content of what the model was trained on, in order
LOSSES: list[float] = []
RATES: list[float] = []


@MODELS.register_module(force=True)
class ToyModel(Model):
    """The mean brightness of an image by a small net with dropout.

    Args:
        width: channels.
        dropout: probability.
    """

    def __init__(self, width: int = 4, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(width, 1)

    def forward(self, images):
        return self.classify(self.dropout(self.features(images.tensor).mean((2, 3))))[:, 0]

    def loss(self, images, samples):
        SEEN.extend((sample.img_id, image.sum().item()) for sample, image in zip(samples, images.tensor, strict=True))
        target = torch.tensor([sample.target for sample in samples])
        noise = torch.rand(len(samples)) + random.random() + np.random.rand() if self.dropout.p else 0  # as target sampling would use
        return {"loss_brightness": (self(images) - target - noise).square().mean()}

    def predict(self, images, samples):
        for sample, score in zip(samples, self(images), strict=True):
            sample.score = score
        return samples


@DATASETS.register_module(force=True)
class ToyData:
    """Random images, augmented at random."""
    metainfo = {"classes": ("bright",)}

    def __init__(self, length: int, augment: bool = True, broken: tuple[int, ...] = (), seconds: float = 0.0) -> None:
        self.length, self.augment, self.broken, self.seconds = length, augment, broken, seconds

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, draw):
        time.sleep(self.seconds)
        image = torch.from_numpy(np.random.default_rng(int(draw)).integers(0, 200, (3, 8, 8), np.uint8))
        with seeded(getattr(draw, "seed", None)):
            if self.augment:
                image = image + int(torch.randint(9, ())) + random.randrange(9) + np.random.randint(9)
        metainfo = {"img_id": int(draw), "target": float(image.float().mean()) / 255}
        if int(draw) in self.broken:
            metainfo["replaced"] = [f"image {int(draw)} is cut short"]
        return {"inputs": image, "data_samples": Sample(metainfo=metainfo)}


@LENGTHS.register_module(force=True)
class ToyLength:
    """2 to 11 tokens by the draw's seed."""

    def __call__(self, dataset, draw):
        return 2 + draw.seed % 10


@LENGTHS.register_module(force=True)
class WrongToyLength(ToyLength):
    """Says another thing of an image that it sees."""

    def of_size(self, height, width):
        return 12


@METRICS.register_module(force=True)
class ToyMetric(BaseMetric):
    """Mean absolute error; logs nothing else."""

    def __init__(self, prefix: str = "toy") -> None:
        super().__init__(prefix=prefix)

    def process(self, data_batch, data_samples):
        self.results += [abs(float(sample["score"]) - sample["target"]) for sample in data_samples]

    def compute_metrics(self, results):
        return {"error": float(np.mean(results))}


@HOOKS.register_module(force=True)
class ToyRecorder(Hook):
    """Notes loss and learning rate, and at one iteration, or in a validation, sends the first process a signal."""
    priority = "VERY_HIGH"

    def __init__(self, signal_at: int | None = None, signal_in_val: bool = False, slow: float = 0.0) -> None:
        self.signal_at, self.signal_in_val, self.slow = signal_at, signal_in_val, slow

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        RATES.append(runner.optim_wrapper.param_groups[0]["lr"])
        if runner.iter == self.signal_at and runner.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        LOSSES.append(float(outputs["loss"]))
        if "TOY_LOSSES" in os.environ:
            with open(f"{os.environ['TOY_LOSSES']}.{runner.rank}", "a") as file:
                file.write(f"{LOSSES[-1]!r}\n")

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if self.signal_in_val:
            os.kill(os.getpid(), signal.SIGTERM)
