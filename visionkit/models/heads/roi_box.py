"""The second stage: what is in each proposal, and where exactly (Girshick 2015, Fast R-CNN, arXiv:1504.08083)."""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.models.losses import mean_over_ranks
from visionkit.models.targets import BalancedSampler, BoxCoder, IoUMatcher
from visionkit.ops import NMS, boxes_to_rois, clip_boxes, detections_from_scores, pyramid_roi_align
from visionkit.ops.detections import Thinning
from visionkit.registry import HEADS, OPS, TARGETS
from visionkit.structures import InstanceData, Sample

# R RoIs of all images, C classes without background, P x P cells a RoI


@HEADS.register_module()
class RoIBoxHead(nn.Module):
    """RoIAlign on the pyramid level of each box's size, fully connected layers, a class and a box for each class.

    Args:
        num_classes: without background, which is the last logit.
        in_channels: of each pyramid level, all the same.
        strides: of each pyramid level; only levels up to stride 32 are pooled from (FPN, arXiv:1612.03144, sec. 4.2).
        hidden_channels: of each fully connected layer.
        pool_size: P.
        sampling_ratio: samples a cell along each axis, -1 for as many as the cell has feature pixels.
        finest_size: boxes with sides below twice this many pixels (geometric mean) are pooled from the finest level.
        class_agnostic: one box for all classes.
        box_stds: of the four box offsets, see `BoxCoder`.
        matcher: by default positive from IoU 0.5, negative below.
        sampler: by default 512 boxes an image, a quarter of them positive at most.
        score_threshold: predictions below are dropped.
        nms: how predictions that overlap are thinned out, `nms`, `soft_nms` or `box_voting`; by default `dict(type="nms", iou=0.5)`.
        max_per_image: predictions kept, best first.
    """

    def __init__(self, num_classes: int, in_channels: Sequence[int], strides: Sequence[int], hidden_channels: Sequence[int] = (1024, 1024),
                 pool_size: int = 7, sampling_ratio: int = 2, finest_size: float = 56.0, class_agnostic: bool = False,
                 box_stds: Sequence[float] = (0.1, 0.1, 0.2, 0.2), matcher: dict | nn.Module | None = None,
                 sampler: dict | nn.Module | None = None, score_threshold: float = 0.05,
                 nms: dict | Thinning | None = None, max_per_image: int = 100) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes counts the classes without background and must be positive, got {num_classes}")
        if len(set(in_channels)) != 1:
            raise ValueError(f"the box head is shared by all levels and needs the same channels on each, got {tuple(in_channels)}; "
                             f"put a neck before it")
        self.num_classes = num_classes
        self.scales = [1 / stride for stride in strides if stride <= 32]
        self.pool_size = pool_size
        self.sampling_ratio = sampling_ratio
        self.finest_size = finest_size
        self.box_classes = 1 if class_agnostic else num_classes
        self.coder = BoxCoder(box_stds)
        self.matcher = TARGETS.make(matcher or IoUMatcher(0.5, 0.5), at="matcher")
        self.sampler = TARGETS.make(sampler or BalancedSampler(512, 0.25), at="sampler")
        self.score_threshold = score_threshold
        self.nms = OPS.make(nms or NMS(0.5), at="nms")
        self.max_per_image = max_per_image
        widths = (in_channels[0] * pool_size**2, *hidden_channels)
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.classify = nn.Linear(widths[-1], num_classes + 1)
        self.regress = nn.Linear(widths[-1], self.box_classes * 4)
        for layer in self.hidden:
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.normal_(self.regress.weight, std=0.001)
        for layer in (*self.hidden, self.classify, self.regress):
            nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Classify and refine boxes.

        Args:
            features: the pyramid, each [B, channels, h_l, w_l].
            boxes: one [R_i, 4] an image, image pixels.

        Returns:
            logits [R, C + 1], background last, and deltas [R, C or 1, 4], RoIs in the order of the boxes.
        """
        rois = boxes_to_rois(boxes)
        pooled = pyramid_roi_align(features[:len(self.scales)], rois, self.level_of(rois[:, 1:]), self.pool_size, self.scales,
                                   self.sampling_ratio)
        hidden = pooled.permute(0, 2, 3, 1).flatten(1)          # bin by bin, as it lies in memory: no copy of the largest tensor here
        for layer in self.hidden:
            hidden = F.relu(layer(hidden), inplace=True)
        return self.classify(hidden).float(), self.regress(hidden).view(-1, self.box_classes, 4).float()

    def level_of(self, boxes: Tensor) -> Tensor:
        """[R] the pyramid level of each box [R, 4]: finer for smaller boxes (FPN, eq. 1)."""
        side = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1).sqrt()
        return (side / self.finest_size + 1e-6).log2().floor().clamp(0, len(self.scales) - 1).long()

    def loss(self, features: Sequence[Tensor], proposals: list[Tensor], samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Cross entropy over all sampled boxes, L1 on the box of the true class of the positives, both over the number of samples."""
        boxes, labels, targets = [], [], []
        for proposed, sample in zip(proposals, samples, strict=True):
            objects = sample.gt_instances
            candidates = torch.cat([objects.bboxes, proposed])              # the objects themselves are examples too
            matched = self.matcher(candidates, objects.bboxes, sample.ignored_instances.bboxes)
            positives, negatives = self.sampler(matched)
            boxes.append(candidates[torch.cat([positives, negatives])])
            labels.append(torch.cat([objects.labels[matched[positives]], negatives.new_full((len(negatives),), self.num_classes)]))
            targets.append(self.coder.encode(candidates[positives], objects.bboxes[matched[positives]]))
        logits, deltas = self(features, boxes)
        labels = torch.cat(labels)
        positive = (labels < self.num_classes).nonzero()[:, 0]
        slots = labels[positive] if self.box_classes > 1 else torch.zeros_like(positive)
        normaliser = mean_over_ranks(len(labels), logits.device)
        return {
            "loss_class": F.cross_entropy(logits, labels, reduction="sum") / normaliser,
            "loss_box": F.l1_loss(deltas[positive, slots], torch.cat(targets), reduction="sum") / normaliser,
        }

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
