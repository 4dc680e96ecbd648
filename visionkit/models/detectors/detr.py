"""DETR: object detection as set prediction (Carion et al. 2020, arXiv:2005.12872)."""
from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.models.base import Model
from visionkit.models.layers import MLP, LearnedPositionEncoding, SinePositionEncoding, Transformer
from visionkit.models.losses import SetPredictionLoss, mean_over_ranks
from visionkit.models.targets import HungarianMatcher, SetTarget, set_targets
from visionkit.ops import clip_boxes, cxcywh_to_xyxy
from visionkit.registry import BACKBONES, LOSSES, MODELS, TARGETS
from visionkit.structures import ImageBatch, InstanceData, Sample

# B images, Q queries, C classes, D channels of the transformer, h x w positions of the feature map


class SetPrediction(NamedTuple):
    """What a decoder layer says of every query."""
    logits: Tensor      # [B, Q, C + 1], no-object last
    boxes: Tensor       # [B, Q, 4] as (cx, cy, w, h), fractions of the image without its padding


class Decoded(NamedTuple):
    """What the transformer made of the images."""
    layers: list[SetPrediction]     # of every decoder layer, the last one last
    hidden: Tensor                  # [B, Q, D] of the last one
    memory: Tensor                  # [B, h * w, D] what the encoder read
    features: Tensor                # [B, D, h, w] what it was given
    valid: Tensor                   # [B, h, w] false on padding


@MODELS.register_module()
class DETR(Model):
    """A transformer turns learned queries into objects, all at once: no anchors, no proposals, no suppression of duplicates.

    Args:
        backbone: images to feature maps, of which the last is read.
        num_classes: C. The published checkpoints have 91: their labels are COCO's category ids.
        num_queries: Q, more than an image has objects.
        channels: D.
        num_heads: of each attention.
        hidden_channels: of the feed-forward networks.
        encoder_layers: how many.
        decoder_layers: how many.
        dropout: of what each sublayer of the transformer adds.
        inner_dropout: of attention weights and of hidden units; the authors' code takes the same as `dropout`, the paper has none.
        pre_norm: normalise before each sublayer instead of after.
        position: `sine`, or `learned` for feature maps of up to 50x50.
        auxiliary_losses: every decoder layer learns to predict, not only the last one.
        matcher: by default the paper's costs, see `HungarianMatcher`.
        set_loss: by default the paper's weights, see `SetPredictionLoss`.
        score_threshold: predictions below are dropped; by default none is.
        checkpointing: of the transformer's layers: less memory, more time; see `Transformer`.
        data_preprocessor: raw images to a batch.
    """
    learns_from = ("gt_instances",)

    def __init__(self, backbone: dict | nn.Module, num_classes: int, num_queries: int = 100, channels: int = 256, num_heads: int = 8,
                 hidden_channels: int = 2048, encoder_layers: int = 6, decoder_layers: int = 6, dropout: float = 0.1,
                 inner_dropout: float = 0.0, pre_norm: bool = False, position: str = "sine", auxiliary_losses: bool = True,
                 matcher: dict | nn.Module | None = None, set_loss: dict | nn.Module | None = None, score_threshold: float = 0.0,
                 checkpointing: bool | str | Mapping = False, data_preprocessor: dict | nn.Module | None = None) -> None:
        super().__init__(data_preprocessor)
        if min(num_classes, num_queries, decoder_layers) < 1:
            raise ValueError(f"num_classes, num_queries and decoder_layers must be positive, got {num_classes}, {num_queries} and "
                             f"{decoder_layers}")
        if position not in ("sine", "learned"):
            raise ValueError(f"position must be 'sine' or 'learned', got {position!r}")
        self.num_classes = num_classes
        self.auxiliary_losses = auxiliary_losses
        self.score_threshold = score_threshold
        self.backbone = BACKBONES.make(backbone, at="backbone")
        self.project = nn.Conv2d(self.backbone.out_channels[-1], channels, 1)
        self.position = SinePositionEncoding(channels) if position == "sine" else LearnedPositionEncoding(channels)
        self.queries = nn.Embedding(num_queries, channels)
        self.transformer = Transformer(channels, num_heads, hidden_channels, encoder_layers, decoder_layers, dropout, inner_dropout,
                                       pre_norm=pre_norm, decoder_norm=True, checkpointing=checkpointing)
        self.classify = nn.Linear(channels, num_classes + 1)
        self.regress = MLP(channels, channels, 4, num_layers=3)
        self.matcher = TARGETS.make(matcher or HungarianMatcher(), at="matcher")
        self.set_loss = LOSSES.make(set_loss or SetPredictionLoss(), at="set_loss")

    def forward(self, images: ImageBatch) -> list[SetPrediction]:
        """One prediction a decoder layer, the last one last."""
        return self.decode(self.backbone(images.tensor)[-1], images).layers

    def decode(self, features: Tensor, images: ImageBatch) -> Decoded:
        """What queries find in `features` [B, C_b, h, w], the backbone's last map of `images`."""
        features = self.project(features)                                                                   # [B, D, h, w]
        valid = valid_positions(images, features.shape[2:])                                                 # [B, h, w]
        tokens, positions = features.flatten(2).transpose(1, 2), self.position(valid, features.dtype).flatten(1, 2)  # [B, h * w, D]
        queries = self.queries.weight.expand(len(images), -1, -1)                                           # [B, Q, D]
        hidden, memory = self.transformer(tokens, torch.zeros_like(queries), positions, queries,
                                          source_valid=valid.flatten(1) if images.padded else None)
        hidden = torch.stack(hidden)                                                                        # [layers, B, Q, D]
        return Decoded(self.read_out(hidden), hidden[-1], memory, features, valid)

    def read_out(self, hidden: Tensor) -> list[SetPrediction]:
        """What the queries [layers, B, Q, D] say, layer by layer."""
        precision = torch.promote_types(hidden.dtype, torch.float32)                                        # also under autocast
        return list(map(SetPrediction, self.classify(hidden).to(precision), self.regress(hidden).to(precision).sigmoid()))

    def loss(self, images: ImageBatch, samples: list[Sample]) -> dict[str, Tensor]:
        """Eq. 2 of the last decoder layer, and, with the layer's number in their names, of those before (sec. 3.2)."""
        targets = set_targets(samples)
        num_boxes = mean_over_ranks(sum(len(target.labels) for target in targets), images.device)
        *earlier, last = self(images)
        losses = self._set_loss(last, targets, num_boxes)
        for layer, prediction in enumerate(earlier if self.auxiliary_losses else ()):
            losses |= {f"{name}_{layer}": term for name, term in self._set_loss(prediction, targets, num_boxes).items()}
        return losses

    def _set_loss(self, prediction: SetPrediction, targets: list[SetTarget], num_boxes: float) -> dict[str, Tensor]:
        pairs = self.matcher(*prediction, targets)
        return self.set_loss(*prediction, targets, pairs, num_boxes)

    def predict(self, images: ImageBatch, samples: list[Sample]) -> list[Sample]:
        """Every query's best class and its box, cut at the image's borders."""
        logits, boxes = self(images)[-1]
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)                                               # [B, Q]: no-object is no answer
        for sample, score, label, box in zip(samples, scores, labels, cxcywh_to_xyxy(boxes), strict=True):
            height, width = sample.ori_shape
            order = score.argsort(descending=True, stable=True)
            order = order[score[order] >= self.score_threshold]
            box = clip_boxes(box[order] * box.new_tensor([width, height, width, height]), height, width)
            sample.pred_instances = InstanceData(bboxes=box, scores=score[order], labels=label[order])
        return samples


def valid_positions(images: ImageBatch, size: tuple[int, int]) -> Tensor:
    """[B, h, w] bool: which positions of a feature map of `size` (h, w) lie on the images, not on their padding, by the nearest pixel."""
    return F.interpolate(images.valid()[:, None].float(), size)[:, 0].bool()
