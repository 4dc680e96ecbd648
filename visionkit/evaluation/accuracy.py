"""How often a classifier of whole images is right."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mmengine.logging import print_log

from visionkit.evaluation.image_metric import ImageMetric, to_array
from visionkit.registry import METRICS, ConfigError

# N images, C classes, K answers to a question


@METRICS.register_module()
class Accuracy(ImageMetric):
    """The share of images whose class is among the k surest answers.

    Answers of equal score count as a fair draw between them would on average, so that a classifier that says nothing scores what chance
    does and not what the order of the classes makes of it. Scores that are not finite are wrong.

    Args:
        top_k: how many answers are allowed, or several such numbers.
        per_class: also print a line a class.
        collect_device: where results of several processes meet, `cpu` or `gpu`.
        prefix: put before the name of each number, as in `accuracy/top1`.

    Raises:
        ConfigError: `top_k` is none of the above, exceeds the classes, or a sample lacks label or scores.
    """
    default_prefix = "accuracy"

    def __init__(self, top_k: int | Sequence[int] = 1, per_class: bool = False, collect_device: str = "cpu",
                 prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.top_k = (top_k,) if isinstance(top_k, int) else tuple(top_k)
        if not self.top_k or not all(isinstance(k, int) and k >= 1 for k in self.top_k):
            raise ConfigError(f"top_k is a number of answers from 1 on, or several, got {top_k!r}", ("top_k",))
        self.per_class = per_class

    @property
    def reported(self) -> list[str]:
        """The names of the numbers, as `save_best` of a checkpoint hook takes them."""
        return [f"{self.prefix}/top{k}" for k in self.top_k]

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Keep label and chances of each image."""
        for sample in data_samples:
            label = int(self.wanted(sample, "gt_label", "take a data set with labels, such as ImageFolder"))
            scores = to_array(self.wanted(sample, "pred_scores", "the model's `predict` fills it in"))
            if not 0 <= label < len(scores) or max(self.top_k) > len(scores):
                raise ConfigError(f"image {sample['img_id']!r} has the label {label}, and the model scores {len(scores)} classes, of which "
                                  f"top_k={self.top_k} are allowed; make the model's num_classes that of the data set")
            self.results.append({"img_id": sample["img_id"], "label": label,
                                 "right": [float(chance_to_be_right(scores[None], np.array([label]), k)[0]) for k in self.top_k]})

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """`top1` and the like, from 0 to 1; -1 without images."""
        images = self.once_each(results)
        right = np.array([image["right"] for image in images]).reshape(-1, len(self.top_k))
        labels = np.array([image["label"] for image in images], int)
        means = right.mean(0) if len(right) else np.full(len(self.top_k), -1.0)
        names = [f"top{k}" for k in self.top_k]
        text = f"\n{len(images)} images: " + ", ".join(f"{name} {mean:.3f}" for name, mean in zip(names, means, strict=True))
        if self.per_class:
            rows = {self.class_name(label): right[labels == label] for label in sorted(set(labels.tolist()))}
            width = max(map(len, ("class", *rows)))
            text += f"\n {'class':<{width}}  {'images':>7}" + "".join(f"  {name:>6}" for name in names)
            for name, chances in rows.items():
                text += f"\n {name:<{width}}  {len(chances):>7}" + "".join(f"  {mean:>6.3f}" for mean in chances.mean(0))
        print_log(text, logger="current")
        return dict(zip(names, map(float, means), strict=True))


def chance_to_be_right(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> np.ndarray:
    """[N] in [0, 1]: how likely the right answer is among the k best when a fair draw orders answers of equal score.

    Args:
        scores: [N, K] of the answers.
        labels: [N] int, which is right.
        k: how many answers are allowed.

    Returns:
        0 where a score is not finite.
    """
    of_right = np.take_along_axis(scores, labels[:, None], 1)
    better, equal = (scores > of_right).sum(1), (scores == of_right).sum(1)
    return np.where(np.isfinite(scores).all(1), np.clip((k - better) / np.maximum(equal, 1), 0, 1), 0.0)
