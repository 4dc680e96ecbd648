"""What a training step of DETR R50 costs beside the one of Hugging Face transformers, with the same random batch."""
from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from visionkit.engine.memory import keep_freed_memory
from visionkit.engine.op_benchmark import in_turns, peak_of
from visionkit.ops import cxcywh_to_xyxy
from visionkit.registry import MODELS
from visionkit.structures import ImageBatch, InstanceData, Sample

OURS = "visionkit"
PEERS = ("transformers, the same layers frozen", "transformers, as it comes")
_HEIGHT, _WIDTH, _CLASSES, _OBJECTS = 480, 640, 91, (7, 12)

Step = Callable[[], None]


@dataclass
class StepCost:
    """Of forward, loss and backward; times are medians."""
    peer: str
    ours_seconds: float
    peer_seconds: float
    time_ratio: float                                        # ours over theirs, the median over steps that followed each other
    ours_bytes: int | None                                   # at the peak, over the model; None where the system does not tell
    peer_bytes: int | None


def measure_steps(repeats: int = 9, peers: Sequence[str] = PEERS, memory: bool = True) -> Iterator[StepCost]:
    """Times in turns, the peak memory of each in a process of its own."""
    bytes_of = {name: _peak_in_a_process(name) if memory else None for name in (OURS, *peers)}
    keep_freed_memory()
    ours = build_step(OURS)
    for peer in peers:
        turns = in_turns([ours, build_step(peer)], repeats)
        mine, theirs = map(statistics.median, zip(*turns, strict=True))
        yield StepCost(peer, mine, theirs, statistics.median(a / b for a, b in turns), bytes_of[OURS], bytes_of[peer])


def build_step(name: str) -> Step:
    """Forward, loss and backward of OURS or one of PEERS, in training mode with dropout, frozen normalisation, auxiliary losses."""
    torch.manual_seed(0)
    images = torch.randn(len(_OBJECTS), 3, _HEIGHT, _WIDTH)
    boxes = [torch.cat([torch.rand(count, 2) * 0.6 + 0.2, torch.rand(count, 2) * 0.3 + 0.05], 1) for count in _OBJECTS]
    labels = [torch.randint(0, _CLASSES, (count,)) for count in _OBJECTS]
    return _our_step(images, boxes, labels) if name == OURS else _their_step(images, boxes, labels, freeze=name == PEERS[0])


def _our_step(images: Tensor, boxes: list[Tensor], labels: list[Tensor]) -> Step:
    model = MODELS.build({"type": "DETR", "num_classes": _CLASSES, "backbone": {
        "type": "ResNet", "depth": 50, "norm": "FrozenBN", "frozen_stages": 2, "out_stages": (5,)}}).train()
    batch = ImageBatch(images.contiguous(memory_format=torch.channels_last), [(_HEIGHT, _WIDTH)] * len(images))     # as ImagePreprocessor
    samples = []
    for box, label in zip(boxes, labels, strict=True):
        sample = Sample(metainfo={"img_shape": (_HEIGHT, _WIDTH)})
        sample.gt_instances = InstanceData(bboxes=cxcywh_to_xyxy(box) * torch.tensor([_WIDTH, _HEIGHT] * 2), labels=label)
        samples.append(sample)

    def step() -> None:
        sum(model.loss(batch, samples).values()).backward()
        model.zero_grad(set_to_none=True)                    # so that the next step's gradients count in its peak
    return step


def _their_step(images: Tensor, boxes: list[Tensor], labels: list[Tensor], freeze: bool) -> Step:
    from transformers import DetrConfig, DetrForObjectDetection

    model = DetrForObjectDetection(DetrConfig(num_labels=_CLASSES, auxiliary_loss=True)).train()
    if freeze:                                               # the stem and the first residual stage, which it trains with timm's backbone
        for name, parameter in model.model.backbone.named_parameters():
            parameter.requires_grad_(any(stage in name for stage in ("layer2", "layer3", "layer4")))
    targets = [{"class_labels": label, "boxes": box} for box, label in zip(boxes, labels, strict=True)]
    mask = torch.ones(len(images), _HEIGHT, _WIDTH, dtype=torch.long)

    def step() -> None:
        model(pixel_values=images, pixel_mask=mask, labels=targets).loss.backward()
        model.zero_grad(set_to_none=True)
    return step


def _peak_in_a_process(name: str) -> int | None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_peak, name, torch.get_num_threads()).result()


def _peak(name: str, threads: int) -> int | None:
    torch.set_num_threads(threads)
    peak_of(lambda: None, "cpu")                             # from here on what is freed goes back to the system, also before it counts
    step = build_step(name)
    step()                                                   # libraries set themselves up
    return peak_of(step, "cpu")
