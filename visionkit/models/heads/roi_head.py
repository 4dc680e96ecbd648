"""What every second stage does with its regions: examples, losses, detections (Girshick 2015, Fast R-CNN, arXiv:1504.08083, sec. 2.3)."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.models.losses import mean_over_ranks
from visionkit.models.targets import BalancedSampler, BoxCoder, IoUMatcher
from visionkit.ops import NMS, clip_boxes, detections_from_scores
from visionkit.ops.detections import Thinning
from visionkit.registry import OPS, TARGETS
from visionkit.structures import InstanceData, Sample

# R RoIs of all images, C classes without background


class Examples(NamedTuple):
    """Regions of a batch, and what is to be said of them."""
    boxes: list[Tensor]     # [R_i, 4] an image, image pixels
    labels: Tensor          # [R] C for background
    deltas: Tensor          # [R, 4] that lead to the object, 0 for background


class RoIHead(nn.Module):
    """A second stage without its layers. A subclass gives those, and `forward(features, boxes)`, which classifies and refines boxes:

        features: feature maps, each [B, C_l, h_l, w_l].
        boxes: one [R_i, 4] an image, image pixels.
        returns: logits [R, C + 1], background last, and deltas [R, C or 1, 4], RoIs in the order of the boxes; float32 at least.

    Args:
        num_classes: without background, which is the last logit.
        box_stds: of the four box offsets, see `BoxCoder`.
        matcher: by default positive from IoU 0.5, negative below.
        sampler: by default 512 boxes an image, a quarter of them positive at most.
        smooth_l1_beta: where the box loss goes over from a parabola to L1; 0: L1 everywhere.
        score_threshold: predictions below are dropped.
        nms: how predictions that overlap are thinned out, `nms`, `soft_nms` or `box_voting`; by default `dict(type="nms", iou=0.5)`.
        max_per_image: predictions kept, best first.
    """

    def __init__(self, num_classes: int, box_stds: Sequence[float] = (0.1, 0.1, 0.2, 0.2), matcher: dict | nn.Module | None = None,
                 sampler: dict | nn.Module | None = None, smooth_l1_beta: float = 0.0, score_threshold: float = 0.05,
                 nms: dict | Thinning | None = None, max_per_image: int = 100) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes counts the classes without background and must be positive, got {num_classes}")
        if smooth_l1_beta < 0:
            raise ValueError(f"smooth_l1_beta must be 0 (L1) or positive, got {smooth_l1_beta}")
        self.num_classes = num_classes
        self.coder = BoxCoder(box_stds)
        self.matcher = TARGETS.make(matcher or IoUMatcher(0.5, 0.5), at="matcher")
        self.sampler = TARGETS.make(sampler or BalancedSampler(512, 0.25), at="sampler")
        self.smooth_l1_beta = smooth_l1_beta
        self.score_threshold = score_threshold
        self.nms = OPS.make(nms or NMS(0.5), at="nms")
        self.max_per_image = max_per_image

    def examples(self, proposals: Sequence[Tensor], samples: Sequence[Sample]) -> Examples:
        """What `sampler` takes of the objects and the proposals of each image."""
        boxes, labels, deltas = [], [], []
        for proposed, sample in zip(proposals, samples, strict=True):
            objects = sample.gt_instances
            candidates = torch.cat([objects.bboxes, proposed])              # the objects themselves are examples too
            matched = self.matcher(candidates, objects.bboxes, sample.ignored_instances.bboxes)
            positives, negatives = self.sampler(matched)
            boxes.append(candidates[torch.cat([positives, negatives])])
            labels.append(F.pad(objects.labels[matched[positives]], (0, len(negatives)), value=self.num_classes))
            deltas.append(F.pad(self.coder.encode(candidates[positives], objects.bboxes[matched[positives]]), (0, 0, 0, len(negatives))))
        return Examples(boxes, torch.cat(labels), torch.cat(deltas))

    def losses_of_each(self, logits: Tensor, deltas: Tensor, examples: Examples) -> tuple[Tensor, Tensor]:
        """[R] cross entropies, and [R] box losses, summed over the four deltas of the true class; 0 for background."""
        positive = examples.labels < self.num_classes
        slots = examples.labels.where(positive, 0) if deltas.shape[1] > 1 else torch.zeros_like(examples.labels)
        deltas = deltas[torch.arange(len(slots), device=slots.device), slots]
        off = F.smooth_l1_loss(deltas, examples.deltas, reduction="none", beta=self.smooth_l1_beta).sum(1)
        return F.cross_entropy(logits, examples.labels, reduction="none"), off * positive

    def loss(self, features: Sequence[Tensor], proposals: list[Tensor], samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Cross entropy over all sampled boxes, smooth L1 on the box of the positives' true class, both over the number of samples."""
        examples = self.examples(proposals, samples)
        class_losses, box_losses = self.losses_of_each(*self(features, examples.boxes), examples)
        normaliser = mean_over_ranks(len(class_losses), class_losses.device)
        return {"loss_class": class_losses.sum() / normaliser, "loss_box": box_losses.sum() / normaliser}

    def predict(self, features: Sequence[Tensor], proposals: list[Tensor], samples: Sequence[Sample]) -> Sequence[Sample]:
        """`samples` with `pred_instances`: `bboxes` in original-image pixels, `scores` descending, `labels`."""
        logits, deltas = self(features, proposals)
        scores = logits.softmax(-1)[:, :-1]                                 # [R, C]
        boxes = self.coder.decode(torch.cat(proposals)[:, None], deltas)    # [R, C or 1, 4]
        counts = [len(proposed) for proposed in proposals]
        for sample, score, box in zip(samples, scores.split(counts), boxes.split(counts), strict=True):
            box = clip_boxes(box, *sample.img_shape)
            box, score, label = detections_from_scores(score, box, self.score_threshold, self.nms, self.max_per_image)
            scale = box.new_tensor(sample.scale_factor).repeat(2)
            sample.pred_instances = InstanceData(bboxes=clip_boxes(box / scale, *sample.ori_shape), scores=score, labels=label)
        return samples
