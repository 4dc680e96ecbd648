"""How often a model solves the puzzles that it is trained on, beside chance."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mmengine.logging import print_log

from visionkit.evaluation.accuracy import chance_to_be_right
from visionkit.evaluation.image_metric import ImageMetric, to_array
from visionkit.registry import METRICS, ConfigError


@METRICS.register_module()
class PretextAccuracy(ImageMetric):
    """The share of all puzzles that are solved, beside what guessing solves: 1/K of K possible answers, averaged where K varies.

    It tells whether pretraining works, and nothing about what the features are worth; that a probe measures (`ProbeLoop`). Answers of equal
    score count as in `Accuracy`, so that a model that collapsed to one answer for everything scores chance, whichever answer is right.

    Args:
        per_answer: also print the accuracy for each right answer, where there are at most so many; 0 for never.
        collect_device: where results of several processes meet, `cpu` or `gpu`.
        prefix: put before the name of each number, as in `pretext/accuracy`.

    Raises:
        ConfigError: a sample has no `pretext`, or a label that is none of its answers.
    """
    default_prefix = "pretext"

    def __init__(self, per_answer: int = 16, collect_device: str = "cpu", prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if per_answer < 0:
            raise ConfigError(f"per_answer is the most answers to print a line of, 0 for none; got {per_answer}", ("per_answer",))
        self.per_answer = per_answer

    @property
    def reported(self) -> list[str]:
        """The names of the numbers, as `save_best` of a checkpoint hook takes them."""
        return [f"{self.prefix}/accuracy", f"{self.prefix}/chance"]

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Keep of each image how its puzzles came out."""
        for sample in data_samples:
            puzzles = self.wanted(sample, "pretext", "it is for models of the room self_supervised, whose `predict` fills it in")
            scores, labels = (to_array(puzzles[key]) for key in ("scores", "labels"))
            if scores.ndim != 2 or labels.shape != scores.shape[:1] or ((labels < 0) | (labels >= scores.shape[1])).any():
                raise ConfigError(f"the puzzles of image {sample['img_id']!r} need `scores` [T, K] and `labels` [T] from 0 to K - 1; got "
                                  f"{list(scores.shape)} and the labels {labels.tolist()[:8]}")
            self.results.append({"img_id": sample["img_id"], "labels": labels, "answers": scores.shape[1],
                                 "right": chance_to_be_right(scores, labels)})

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """`accuracy` and `chance`, from 0 to 1; -1 without a puzzle."""
        images = [image for image in self.once_each(results) if len(image["labels"])]
        if not images:
            self.warn("no puzzle in the evaluated images: every number is -1")
            return {"accuracy": -1.0, "chance": -1.0}
        right, labels = (np.concatenate([image[key] for image in images]) for key in ("right", "labels"))
        answers = np.repeat([image["answers"] for image in images], [len(image["labels"]) for image in images])
        accuracy, chance = float(right.mean()), float((1 / answers).mean())
        text = f"\n{len(right)} puzzles of {len(images)} images: accuracy {accuracy:.3f}, chance {chance:.3f}"
        if answers.max() <= self.per_answer:
            text += f"\n {'right answer':<12}  {'puzzles':>8}  accuracy"
            for answer in range(answers.max()):
                solved = right[labels == answer]
                text += f"\n {answer:<12}  {len(solved):>8}  {f'{solved.mean():.3f}' if len(solved) else '-':>8}"
        print_log(text, logger="current")
        return {"accuracy": accuracy, "chance": chance}
