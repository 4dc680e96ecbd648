"""Region proposal network (Ren et al. 2015, Faster R-CNN, arXiv:1506.01497, sec. 3.1)."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.models.losses import mean_over_ranks
from visionkit.models.targets import IGNORED, NEGATIVE, AnchorGrid, BalancedSampler, BoxCoder, IoUMatcher
from visionkit.ops import batched_nms, clip_boxes
from visionkit.registry import HEADS, TARGETS
from visionkit.structures import Sample

# B images, L pyramid levels, A anchors a position, N anchors an image over all levels


class Objectness(NamedTuple):
    """What the network says of every anchor, one entry a level; without gradient, see `RPN.loss`."""
    logits: list[Tensor]        # [B, N_l]
    deltas: list[Tensor]        # [B, N_l, 4]
    anchors: list[Tensor]       # [N_l, 4] image pixels


class FirstStage(NamedTuple):
    """What a second stage works on."""
    features: tuple[Tensor, ...]    # [B, C_l, h_l, w_l] a pyramid level, or a stage of the backbone
    objectness: Objectness
    proposals: list[Tensor]         # [P, 4] an image, best first, image pixels


@HEADS.register_module()
class RPN(nn.Module):
    """A 3x3 convolution, then for each anchor a score and a box.

    Args:
        in_channels: of each pyramid level, all the same.
        strides: of each pyramid level.
        hidden_channels: of the 3x3 convolution; None: as many as come in.
        anchor_scales: sides of the square anchor, in strides.
        anchor_ratios: heights over widths.
        matcher: by default positive from IoU 0.7, negative below 0.3, and each object keeps its best anchors from 0.3 on.
        sampler: by default 256 anchors an image, half of them positive at most.
        nms_iou: proposals of one level that overlap by more are thinned out.
        pre_nms: proposals a level kept before that, in training and in testing.
        post_nms: proposals an image kept after it, in training and in testing.
        smooth_l1_beta: where the box loss goes over from a parabola to L1, 1/9 in the paper's code; 0: L1 everywhere.
        cross_boundary: whether anchors that reach beyond the image are learned from, as with a pyramid (FPN, arXiv:1612.03144, sec. 5.1);
            the paper leaves them out (sec. 3.3).
    """

    def __init__(self, in_channels: Sequence[int], strides: Sequence[int], hidden_channels: int | None = None,
                 anchor_scales: Sequence[float] = (8.0,), anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
                 matcher: dict | nn.Module | None = None, sampler: dict | nn.Module | None = None, nms_iou: float = 0.7,
                 pre_nms: tuple[int, int] = (2000, 1000), post_nms: tuple[int, int] = (1000, 1000),
                 smooth_l1_beta: float = 0.0, cross_boundary: bool = True) -> None:
        super().__init__()
        if len(set(in_channels)) != 1:
            raise ValueError(f"an RPN is shared by all levels and needs the same channels on each, got {tuple(in_channels)}; "
                             f"put a neck before it")
        if smooth_l1_beta < 0:
            raise ValueError(f"smooth_l1_beta must be 0 (L1) or positive, got {smooth_l1_beta}")
        for name, counts in (("pre_nms", pre_nms), ("post_nms", post_nms)):
            if not isinstance(counts, Sequence) or len(counts) != 2 or min(counts) < 1:
                raise ValueError(f"{name} is how many proposals to keep in training and in testing, such as (2000, 1000), got {counts}")
        hidden_channels = hidden_channels or in_channels[0]
        self.anchors = AnchorGrid(strides, anchor_scales, anchor_ratios)
        self.coder = BoxCoder()
        self.matcher = TARGETS.make(matcher or IoUMatcher(0.7, 0.3, rescue_from=0.3), at="matcher")
        self.sampler = TARGETS.make(sampler or BalancedSampler(256, 0.5), at="sampler")
        self.nms_iou = nms_iou
        self.pre_nms = tuple(pre_nms)
        self.post_nms = tuple(post_nms)
        self.smooth_l1_beta = smooth_l1_beta
        self.cross_boundary = cross_boundary
        self.conv = nn.Conv2d(in_channels[0], hidden_channels, 3, padding=1)
        self.classify = nn.Conv2d(hidden_channels, self.anchors.per_position, 1)
        self.regress = nn.Conv2d(hidden_channels, self.anchors.per_position * 4, 1)
        for layer in (self.conv, self.classify, self.regress):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    @torch.no_grad()
    def forward(self, features: Sequence[Tensor]) -> Objectness:
        """[B, C, h_l, w_l] a level to scores and boxes of every anchor."""
        logits, deltas = [], []
        for feature in features:
            hidden = F.relu(self.conv(feature), inplace=True)
            logits.append(self.classify(hidden).permute(0, 2, 3, 1).flatten(1).float())                          # [B, h * w * A]
            deltas.append(self.regress(hidden).permute(0, 2, 3, 1).reshape(len(feature), -1, 4).float())         # [B, h * w * A, 4]
        return Objectness(logits, deltas, self.anchors([feature.shape[2:] for feature in features]))

    def loss(self, features: Sequence[Tensor], objectness: Objectness, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Eq. 1 with both terms over the number of sampled anchors.

        Of the tens of thousands of anchors of an image, `sampler` takes a few hundred, and only those have a gradient. So the dense pass
        keeps none, and the network is run once more, with gradient, at the sampled positions alone: the same numbers, for a third of
        the work.
        """
        anchors = torch.cat(objectness.anchors)
        chosen, positive, targets = [], [], []
        for index, sample in enumerate(samples):
            objects = sample.gt_instances.bboxes
            matched = self._match(anchors, sample)
            positives, negatives = self.sampler(matched)
            targets.append(self.coder.encode(anchors[positives], objects[matched[positives]]))
            positive.append(torch.arange(len(positives) + len(negatives), device=anchors.device) < len(positives))
            chosen.append(torch.cat([positives, negatives]) + index * len(anchors))
        chosen, positive, targets = torch.cat(chosen), torch.cat(positive), torch.cat(targets)
        logits, deltas = self._at(features, chosen)
        normaliser = mean_over_ranks(len(chosen), logits.device)
        return {
            "loss_rpn_class": F.binary_cross_entropy_with_logits(logits, positive.to(logits), reduction="sum") / normaliser,
            "loss_rpn_box": F.smooth_l1_loss(deltas[positive], targets, reduction="sum", beta=self.smooth_l1_beta) / normaliser,
        }

    def _match(self, anchors: Tensor, sample: Sample) -> Tensor:
        """[N] the object of each anchor, or NEGATIVE, or IGNORED."""
        objects, crowds = sample.gt_instances.bboxes, sample.ignored_instances.bboxes
        size = anchors.new_tensor(sample.img_shape).flip(0)
        if self.cross_boundary:
            matched = self.matcher(anchors, objects, crowds)
            on_padding = ((anchors[:, :2] + anchors[:, 2:]) / 2 >= size).any(1)             # of the batch: the image ends before
            matched[(matched == NEGATIVE) & on_padding] = IGNORED
            return matched
        within = ((anchors[:, :2] >= 0) & (anchors[:, 2:] <= size)).all(1)
        matched = torch.full_like(within, IGNORED, dtype=torch.int64)
        matched[within] = self.matcher(anchors[within], objects, crowds)                    # an object keeps the best of these
        return matched

    def _at(self, features: Sequence[Tensor], chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [S] and boxes [S, 4] of the anchors `chosen` [S] of a batch, counted image by image, level by level, as `forward` does."""
        sizes = torch.tensor([feature.shape[2:] for feature in features], device=chosen.device)                # [L, 2]
        positions = sizes.prod(1)
        first_of_level = positions.cumsum(0) - positions
        position, shape = chosen // self.anchors.per_position, chosen % self.anchors.per_position
        image, position = position // positions.sum(), position % positions.sum()
        level = torch.bucketize(position, positions.cumsum(0), right=True)
        height, width = sizes[level].unbind(1)
        position = position - first_of_level[level]
        y, x = position // width, position % width
        # the 3x3 window around each, as rows of a table of all levels; what lies outside the map is padding and counts as 0
        step = torch.tensor([-1, 0, 1], device=chosen.device)
        rows, columns = y[:, None, None] + step[:, None], x[:, None, None] + step                              # [S, 3, 1], [S, 1, 3]
        inside = (rows >= 0) & (rows < height[:, None, None]) & (columns >= 0) & (columns < width[:, None, None])
        start = first_of_level[level] * len(features[0]) + image * height * width
        reads = (start[:, None, None] + rows * width[:, None, None] + columns).where(inside, 0)
        table = torch.cat([feature.permute(0, 2, 3, 1).flatten(0, 2) for feature in features])                 # [pixels, C]
        windows = table.index_select(0, reads.flatten()).unflatten(0, reads.shape) * inside[..., None]         # [S, 3, 3, C]
        hidden = F.relu(F.linear(windows.flatten(1), self.conv.weight.permute(0, 2, 3, 1).flatten(1), self.conv.bias))
        logits = F.linear(hidden, self.classify.weight.flatten(1), self.classify.bias)                         # [S, A]
        deltas = F.linear(hidden, self.regress.weight.flatten(1), self.regress.bias).unflatten(1, (-1, 4))     # [S, A, 4]
        each = torch.arange(len(chosen), device=chosen.device)
        return logits[each, shape].float(), deltas[each, shape].float()

    @torch.no_grad()
    def propose(self, objectness: Objectness, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """The best boxes of each image.

        Args:
            objectness: of a batch.
            sizes: the (h, w) of each image, which proposals are clipped to.

        Returns:
            one [P, 4] an image, best first, image pixels; P is at most `post_nms`.
        """
        pre_nms, post_nms = (counts[0 if self.training else 1] for counts in (self.pre_nms, self.post_nms))
        boxes, scores, levels = [], [], []
        for level, (logits, deltas, anchors) in enumerate(zip(*objectness, strict=True)):
            score, top = logits.topk(min(pre_nms, logits.shape[1]))                                            # [B, K]
            delta = deltas.gather(1, top[..., None].expand(-1, -1, 4))
            boxes.append(self.coder.decode(anchors[top], delta))
            scores.append(score)
            levels.append(torch.full_like(top, level))
        boxes, scores, levels = torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(levels, 1)                # [B, K, ...]
        boxes = torch.stack([clip_boxes(box, *size) for box, size in zip(boxes, sizes, strict=True)])
        image = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(levels)
        some = ((boxes[..., 2:] - boxes[..., :2]) > 0).all(-1)                                                 # clipping leaves some empty
        boxes, scores, image, levels = boxes[some], scores[some], image[some], levels[some]
        keep = batched_nms(boxes, scores, image * len(objectness.anchors) + levels, self.nms_iou)
        return [boxes[keep[image[keep] == index][:post_nms]] for index in range(len(sizes))]
