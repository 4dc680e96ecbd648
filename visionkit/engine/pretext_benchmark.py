"""How long a step of rotation training takes beside supervised training on as many images, and how many puzzles are made in a second."""
from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionkit.engine.memory import keep_freed_memory
from visionkit.engine.op_benchmark import in_turns
from visionkit.models.self_supervised import Rotation
from visionkit.registry import BACKBONES, TRANSFORMS
from visionkit.structures import ImageBatch
from visionkit.transforms import FourRotations

BAR = 1.1                                                    # rotation over supervised, the most that it is to be
TRUNKS: Mapping[str, Mapping[str, Any]] = {"ConvBlocks": {"type": "ConvBlocks"}, "NIN": {"type": "NIN"}}
# Puzzles, the side of the images that they are made of, and how many of them an image makes.
PUZZLES: Mapping[str, tuple[Mapping[str, Any], int, int]] = {
    "FourRotations, 32 px": ({"type": "FourRotations"}, 32, 4),
    "FourRotations, 224 px": ({"type": "FourRotations"}, 224, 4),
    "PatchGrid": ({"type": "PatchGrid", "patch": 64, "gap": 21, "jitter": 10, "color": None, "resampled": 0}, 255, 8),
    "PatchGrid, project": ({"type": "PatchGrid", "patch": 64, "gap": 21, "jitter": 10, "color": "project", "resampled": 0}, 255, 8),
    "PatchGrid, drop, resampled": ({"type": "PatchGrid", "patch": 64, "gap": 21, "jitter": 10, "color": "drop"}, 255, 8),
    "JigsawTiles": ({"type": "JigsawTiles", "tile": 64, "per_image": 8}, 225, 8),
}


@dataclass
class Training:
    """A step with rotations beside one without; medians."""
    trunk: str
    images: int                                              # of which four views each are learned from
    rotation_seconds: float
    supervised_seconds: float
    ratio: float                                             # median over timings that followed each other


@dataclass
class Making:
    """Puzzles of a batch."""
    puzzle: str
    images: int
    seconds: float                                           # median
    puzzles_per_second: float


def measure_training(images: int = 32, side: int = 32, repeats: int = 9, device: str = "cpu",
                     trunks: Mapping[str, Mapping[str, Any]] = TRUNKS) -> Iterator[Training]:
    """Time a step of `Rotation` and one of the same trunk and head on the same views, turned beforehand, in turns."""
    keep_freed_memory()
    batch = _images(images, side, device)
    for name, trunk in trunks.items():
        steps = [rotation_step(trunk, batch), supervised_step(trunk, batch)]
        for step in steps:
            step()                                           # libraries set themselves up
        turns = in_turns(steps, repeats, device)
        rotation, supervised = map(statistics.median, zip(*turns, strict=True))
        yield Training(name, images, rotation, supervised, statistics.median(ours / theirs for ours, theirs in turns))


def rotation_step(trunk: Mapping[str, Any], batch: Tensor) -> Callable[[], Tensor]:
    """A step that turns the images, and learns; its loss."""
    torch.manual_seed(0)
    model = Rotation(dict(trunk)).to(batch.device)
    given = ImageBatch(batch, [tuple(batch.shape[2:])] * len(batch))
    return _step(model, lambda: model.loss(given, [])["loss_pretext"])


def supervised_step(trunk: Mapping[str, Any], batch: Tensor) -> Callable[[], Tensor]:
    """The same step where the views and their labels come from a data loader; its loss."""
    views, labels = FourRotations()(batch)
    views, labels = views.flatten(0, 1), labels.flatten().clone()
    torch.manual_seed(0)
    backbone = BACKBONES.build(dict(trunk))
    classify = nn.Linear(backbone.out_channels[-1], 4)
    nn.init.normal_(classify.weight, std=0.01)
    nn.init.zeros_(classify.bias)
    model = nn.ModuleDict({"backbone": backbone, "classify": classify}).to(batch.device)
    return _step(model, lambda: nn.functional.cross_entropy(classify(backbone(views)[-1].mean((2, 3))), labels))


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step() -> Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()
    return step


def measure_puzzles(images: int = 64, repeats: int = 9, device: str = "cpu",
                    puzzles: Mapping[str, tuple[Mapping[str, Any], int, int]] = PUZZLES) -> Iterator[Making]:
    """Time each puzzle on a batch."""
    keep_freed_memory()
    for name, (config, side, per_image) in puzzles.items():
        puzzle, batch = TRANSFORMS.build(dict(config)).to(device), _images(images, side, device)
        puzzle(batch)
        seconds = statistics.median(turn[0] for turn in in_turns([functools.partial(puzzle, batch)], repeats, device))
        yield Making(name, images, seconds, images * per_image / seconds)


def _images(count: int, side: int, device: str) -> Tensor:
    """In the memory order that models get images in."""
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    return images.to(device).contiguous(memory_format=torch.channels_last)
