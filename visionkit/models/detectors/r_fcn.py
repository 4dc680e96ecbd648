"""R-FCN (Dai et al. 2016, arXiv:1605.06409), and its deformable form (Dai et al. 2017, Deformable ConvNets, arXiv:1703.06211)."""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.models.base import Model
from visionkit.models.heads.roi_head import Examples, RoIHead
from visionkit.models.heads.rpn import FirstStage
from visionkit.models.losses import mean_over_ranks
from visionkit.models.targets import AllSampler
from visionkit.ops import boxes_to_rois, deform_ps_roi_pool, ps_roi_pool
from visionkit.ops.detections import Thinning
from visionkit.registry import BACKBONES, HEADS, MODELS
from visionkit.structures import ImageBatch, Sample

Maps = Tensor | tuple[Tensor, Tensor]       # of scores, or of scores and of offsets

# B images, R RoIs of all images, C classes without background, k x k bins a RoI


@MODELS.register_module()
class RFCN(Model):
    """A fully convolutional second stage: all its layers are shared by the whole image, and a region costs a pooling.

    Args:
        backbone: gives C4, and C5 dilated to the same stride; where it gives one map, both stages work on that.
        rpn: the first map to proposals.
        roi: the last map and proposals to detections; see `PositionSensitiveHead`.
        data_preprocessor: raw images to a batch.
    """
    learns_from = ("gt_instances",)

    def __init__(self, backbone: dict | nn.Module, rpn: dict | nn.Module, roi: dict | nn.Module,
                 data_preprocessor: dict | nn.Module | None = None) -> None:
        super().__init__(data_preprocessor)
        self.backbone = BACKBONES.make(backbone, at="backbone")
        channels, strides = self.backbone.out_channels, self.backbone.strides
        if len(channels) > 2:
            raise ValueError(f"R-FCN works on C4 and C5, or on one map, but the backbone gives {len(channels)}; set its out_stages")
        self.rpn = HEADS.make(rpn, at="rpn", in_channels=channels[:1], strides=strides[:1])
        self.roi = HEADS.make(roi, at="roi", in_channels=channels[-1:], strides=strides[-1:])

    def forward(self, images: ImageBatch) -> FirstStage:
        features = self.backbone(images.tensor)
        objectness = self.rpn(features[:1])
        return FirstStage(features, objectness, self.rpn.propose(objectness, images.sizes))

    def loss(self, images: ImageBatch, samples: list[Sample]) -> dict[str, Tensor]:
        features, objectness, proposals = self(images)
        return {**self.rpn.loss(features[:1], objectness, samples), **self.roi.loss(features[-1:], proposals, samples)}

    def predict(self, images: ImageBatch, samples: list[Sample]) -> list[Sample]:
        features, _, proposals = self(images)
        return self.roi.predict(features[-1:], proposals, samples)


@HEADS.register_module()
class PositionSensitiveHead(RoIHead):
    """Position-sensitive score maps, pooling that reads each bin from maps of its own, and a vote: the mean over the bins (sec. 2).

    Nothing is learned after pooling. As in the authors' code, boxes are class-agnostic, coded as two classes, background and foreground, of
    which the second is used; so there are 8 k^2 box maps, where the paper has 4 k^2. Background is the last class, there the first.

    The authors' boxes end with their last pixel, ours after it: what they write as x2 - x1 + 1 is x2 - x1 here. A box covers the same
    pixels, and has the same deltas, in both.

    Args:
        in_channels: of each feature map.
        strides: of each feature map; only the last is used.
        bins: k.
        hidden_channels: of the 1x1 convolution before the score maps.
        hidden_std: standard deviation of its weights at the start, the authors' by default, who fine-tune; None: He et al. 2015
            (arXiv:1502.01852), which training from scratch needs.
        deformable: bins move, those of each class by offsets of its own (arXiv:1703.06211, sec. 2.2).
        sampler: by default all proposals and objects.
        hard_per_image: of what `sampler` takes, so many with the largest loss are learned from (online hard example mining, Shrivastava et
            al. 2016, arXiv:1604.03540); None: all of it.
        nms: by default `dict(type="nms", iou=0.3)`.
        others: as of `RoIHead`.
    """

    def __init__(self, num_classes: int, in_channels: Sequence[int], strides: Sequence[int], bins: int = 7, hidden_channels: int = 1024,
                 hidden_std: float | None = 0.01, deformable: bool = False, box_stds: Sequence[float] = (0.1, 0.1, 0.2, 0.2),
                 matcher: dict | nn.Module | None = None, sampler: dict | nn.Module | None = None, hard_per_image: int | None = 128,
                 smooth_l1_beta: float = 1.0, score_threshold: float = 0.05, nms: dict | Thinning | None = None,
                 max_per_image: int = 100) -> None:
        super().__init__(num_classes, box_stds, matcher, sampler or AllSampler(), smooth_l1_beta, score_threshold,
                         nms or {"type": "nms", "iou": 0.3}, max_per_image)
        if bins < 1 or (hard_per_image is not None and hard_per_image < 1):
            raise ValueError(f"bins and hard_per_image must be positive, got {bins} and {hard_per_image}; None mines no hard examples")
        self.hard_per_image = hard_per_image
        self.conv_new = nn.Conv2d(in_channels[-1], hidden_channels, 1)
        if hidden_std is None:
            nn.init.kaiming_normal_(self.conv_new.weight, nonlinearity="relu")
        else:
            nn.init.normal_(self.conv_new.weight, std=hidden_std)
        nn.init.zeros_(self.conv_new.bias)
        if deformable:
            self.classify = DeformablePositionSensitiveScores(hidden_channels, num_classes + 1, bins, strides[-1], moving=num_classes + 1)
            self.regress = DeformablePositionSensitiveScores(hidden_channels, 2 * 4, bins, strides[-1], moving=1)
        else:
            self.classify = PositionSensitiveScores(hidden_channels, num_classes + 1, bins, strides[-1])
            self.regress = PositionSensitiveScores(hidden_channels, 2 * 4, bins, strides[-1])

    def forward(self, features: Sequence[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [R, C + 1] and deltas [R, 1, 4] of boxes, see `RoIHead`."""
        return self.vote(self.score_maps(features), boxes)

    def score_maps(self, features: Sequence[Tensor]) -> tuple[Maps, Maps]:
        """All that is computed of an image, whatever its regions are: maps of the classes and of the boxes."""
        hidden = F.relu(self.conv_new(features[-1]), inplace=True)
        return self.classify(hidden), self.regress(hidden)

    def vote(self, maps: tuple[Maps, Maps], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [R, C + 1] and deltas [R, 1, 4] of boxes, [R_i, 4] an image."""
        rois = boxes_to_rois(boxes)
        rois[:, 3:] -= 1                                                    # to the last pixel, as the pooling rule counts
        class_maps, box_maps = maps
        slots = self.regress.vote(box_maps, rois).view(-1, 2, 4)            # background, foreground
        return self.classify.vote(class_maps, rois).float(), slots[:, 1:].float()

    def loss(self, features: Sequence[Tensor], proposals: list[Tensor], samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Cross entropy over the number of regions learned from. Smooth L1 on the boxes of the positives, over the same number, or over
        `hard_per_image` for each image however few there are, as in the authors' code."""
        maps = self.score_maps(features)
        examples = self.examples(proposals, samples)
        if self.hard_per_image is not None:
            with torch.no_grad():                                           # sec. 2: ranking costs a vote of every region, and no gradient
                error = sum(self.losses_of_each(*self.vote(maps, examples.boxes), examples))
            examples = self._hardest(examples, error)
        class_losses, box_losses = self.losses_of_each(*self.vote(maps, examples.boxes), examples)
        count = len(class_losses)
        asked = count if self.hard_per_image is None else self.hard_per_image * len(samples)
        return {
            "loss_class": class_losses.sum() / mean_over_ranks(count, class_losses.device),
            "loss_box": box_losses.sum() / mean_over_ranks(asked, box_losses.device),
        }

    def _hardest(self, examples: Examples, error: Tensor) -> Examples:
        """The examples of the largest `error` [R] of each image."""
        start, kept, boxes = 0, [], []
        for candidates in examples.boxes:
            hardest = error[start:start + len(candidates)].topk(min(self.hard_per_image, len(candidates))).indices
            boxes.append(candidates[hardest])
            kept.append(start + hardest)
            start += len(candidates)
        kept = torch.cat(kept)
        return Examples(boxes, examples.labels[kept], examples.deltas[kept])


class PositionSensitiveScores(nn.Module):
    """k^2 maps for each number that is said of a region, from a 1x1 convolution.

    Channel (i * k + j) * N + c is number c of N in bin (i, j): all that a bin reads lies together. The authors have (c * k + i) * k + j.
    """

    def __init__(self, in_channels: int, numbers: int, bins: int, stride: int) -> None:
        super().__init__()
        self.bins = bins
        self.scale = 1 / stride
        self.maps = nn.Conv2d(in_channels, numbers * bins**2, 1)
        nn.init.normal_(self.maps.weight, std=0.01)
        nn.init.zeros_(self.maps.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, in_channels, h, w] to maps [B, N * k^2, h, w]."""
        return self.maps(hidden)

    def vote(self, maps: Tensor, rois: Tensor) -> Tensor:
        """[R, N] of `rois` [R, 5]: image index and box, the last pixel inside."""
        return ps_roi_pool(maps, rois, self.bins, self.scale, rule="r_fcn", bin_major=True).mean((2, 3))


class DeformablePositionSensitiveScores(PositionSensitiveScores):
    """The same with bins that move: each of `moving` blocks of numbers by offsets of its own, which start at zero.

    The offsets of a bin are pooled from maps of their own, with the bin in place. Pooling is by bilinear samples, not by whole pixels.
    """

    def __init__(self, in_channels: int, numbers: int, bins: int, stride: int, moving: int) -> None:
        super().__init__(in_channels, numbers, bins, stride)
        self.offset = nn.Conv2d(in_channels, moving * 2 * bins**2, 1)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[B, in_channels, h, w] to maps [B, N * k^2, h, w] and offset maps [B, moving * 2 * k^2, h, w], (dx, dy) of each block. Both are
        in the authors' order, which this pooling reads."""
        return tuple(torch.channel_shuffle(layer(hidden), self.bins**2) for layer in (self.maps, self.offset))

    def vote(self, maps: tuple[Tensor, Tensor], rois: Tensor) -> Tensor:
        """[R, N] of `rois` [R, 5]: image index and box, the last pixel inside."""
        scores, offsets = maps
        moves = deform_ps_roi_pool(offsets, rois, None, self.bins, self.scale)              # [R, moving * 2, k, k]
        return deform_ps_roi_pool(scores, rois, moves, self.bins, self.scale).mean((2, 3))
