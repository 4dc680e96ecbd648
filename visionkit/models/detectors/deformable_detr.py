"""Deformable DETR (Zhu et al. 2020, arXiv:2010.04159), with iterative box refinement and in two stages."""
from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.models.base import Model
from visionkit.models.layers import MLP, Attention, FeedForward, sinusoid
from visionkit.models.losses import mean_over_ranks
from visionkit.models.targets import set_targets
from visionkit.ops import clip_boxes, cxcywh_to_xyxy, ms_deform_attn
from visionkit.ops.checkpointing import Checkpointing, run_blocks
from visionkit.registry import BACKBONES, LOSSES, MODELS, NECKS, TARGETS
from visionkit.structures import ImageBatch, InstanceData, Sample

# B images, L levels, S pixels of all levels, Q queries, C classes, D channels, M heads, P points a head and level


class Pyramid(NamedTuple):
    """What attention must know of the levels besides their pixels. The first dimension is 1 where no image of the batch is padded."""
    shapes: Tensor              # [L, 2] (h, w), padding included
    starts: Tensor              # [L] where each level starts in S
    levels: Tensor              # [S] the level of each pixel
    pixel_sizes: Tensor         # [L, 1, 2] of one pixel, (w, h) in fractions of its map with padding
    valid_ratios: Tensor        # [1 or B, L, 2] the share of each map, along x and y, that is the image and not its padding
    centers: Tensor             # [1 or B, S, 2] of each pixel, (x, y) in fractions of the image
    padding: Tensor | None      # [B, S] true on padding


class Prediction(NamedTuple):
    """What one decoder layer, or the first stage, sees."""
    logits: Tensor              # [B, Q, C], each the logit of a sigmoid
    boxes: Tensor               # [B, Q, 4] (cx, cy, w, h) in fractions of the image without its padding


class Predictions(NamedTuple):
    first_stage: Prediction | None      # of every pixel; the logit of class 0 is the one for "an object"
    layers: list[Prediction]            # of every decoder layer


class Decoding(NamedTuple):
    """What a decoder layer gives to the next one."""
    hidden: Tensor                              # [B, Q, D]
    reference: Tensor                           # [B, Q, 2 or 4] where each query looks, a point or a box
    prediction: Prediction | None = None        # of that layer


@MODELS.register_module()
class DeformableDETR(Model):
    """Detection as set prediction where attention reads a few sampled points of a feature pyramid.

    Args:
        backbone: images to feature maps; tells the neck its channels and strides.
        neck: feature maps to a pyramid of equal channels, D.
        num_classes: C, each with a sigmoid of its own; there is no class for no-object.
        num_queries: Q, more than an image has objects; in two stages, as many proposals are taken.
        num_heads: M, of each attention.
        num_points: P, that each head of a deformable attention reads on each level.
        encoder_layers: how many.
        decoder_layers: how many.
        hidden_channels: of the feed-forward networks.
        dropout: of what each sublayer of the transformer adds, of the weights of self-attention and of hidden units.
        with_box_refine: each decoder layer refines the box of the one before (sec. 4.2), with heads of its own.
        two_stage: queries start from the best of the boxes that the encoder's pixels propose (sec. 4.2); with `with_box_refine` only.
        matcher: by default the costs of class, box and generalized IoU are weighted 2, 5, 2.
        set_loss: the loss of one layer, by default weighted likewise.
        max_per_image: predictions kept, best first, of all queries and classes.
        score_threshold: predictions below are dropped; by default none is.
        checkpointing: which activations of the transformer's layers are computed again in the backward pass, less memory for more time:
            True, `dict(policy="sqrt")`, `dict(policy="selective")`, see `visionkit.ops.checkpointing.Checkpointing`.
        data_preprocessor: raw images to a batch.
    """
    learns_from = ("gt_instances",)

    def __init__(self, backbone: dict | nn.Module, neck: dict | nn.Module, num_classes: int, num_queries: int = 300, num_heads: int = 8,
                 num_points: int = 4, encoder_layers: int = 6, decoder_layers: int = 6, hidden_channels: int = 1024,
                 dropout: float = 0.1, with_box_refine: bool = False, two_stage: bool = False, matcher: dict | nn.Module | None = None,
                 set_loss: dict | nn.Module | None = None, max_per_image: int = 100, score_threshold: float = 0.0,
                 checkpointing: bool | str | Mapping = False, data_preprocessor: dict | nn.Module | None = None) -> None:
        super().__init__(data_preprocessor)
        if min(num_classes, num_queries, decoder_layers) < 1:
            raise ValueError(f"num_classes, num_queries and decoder_layers must be positive, got {num_classes}, {num_queries} and "
                             f"{decoder_layers}")
        if two_stage and not with_box_refine:
            raise ValueError("two_stage refines the boxes of its first stage: set with_box_refine=True too")
        self.backbone = BACKBONES.make(backbone, at="backbone")
        self.neck = NECKS.make(neck, at="neck", in_channels=self.backbone.out_channels, strides=self.backbone.strides)
        channels, num_levels = self.neck.out_channels[0], len(self.neck.out_channels)
        self.num_queries = num_queries
        self.with_box_refine = with_box_refine
        self.two_stage = two_stage
        self.max_per_image = max_per_image
        self.score_threshold = score_threshold
        self.checkpointing = Checkpointing.of(checkpointing)

        layer = channels, num_heads, num_levels, num_points, hidden_channels, dropout
        self.level_embedding = nn.Parameter(torch.randn(num_levels, channels))
        self.encoder = nn.ModuleList(DeformableEncoderLayer(*layer) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DeformableDecoderLayer(*layer) for _ in range(decoder_layers))
        if two_stage:
            self.proposal_features = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels))
            self.proposal_query = nn.Sequential(nn.Linear(2 * channels, 2 * channels), nn.LayerNorm(2 * channels))
        else:
            self.queries = nn.Embedding(num_queries, 2 * channels)              # position and content
            self.reference_points = nn.Linear(channels, 2)
        # One head for all layers, or one for each; in two stages one more, the first stage's, at the end.
        self.classify, self.regress = nn.ModuleList(), nn.ModuleList()
        for index in range(decoder_layers + two_stage):
            if index == 0 or with_box_refine:
                classify, regress = nn.Linear(channels, num_classes), MLP(channels, channels, 4, num_layers=3)
            self.classify.append(classify)
            self.regress.append(regress)
        self._initialise()
        self.matcher = TARGETS.make(matcher or {"type": "HungarianMatcher", "class_cost": 2.0}, at="matcher", classification="sigmoid")
        self.set_loss = LOSSES.make(set_loss or {"type": "SetPredictionLoss", "class_weight": 2.0}, at="set_loss", classification="sigmoid")

    def forward(self, images: ImageBatch) -> Predictions:
        return self.transform(self.neck(self.backbone(images.tensor)), images)

    def transform(self, features: Sequence[Tensor], images: ImageBatch) -> Predictions:
        """The transformer, on feature maps [B, D, h_l, w_l] of `images`."""
        pyramid = _pyramid(features, images)
        memory = self.encode(features, pyramid)
        if self.two_stage:
            first_stage, reference = self.propose(memory, pyramid)                              # reference [B, Q, 4]
            position, hidden = self.proposal_query(sinusoid(2 * math.pi * reference, memory.shape[2] // 2).flatten(2)).chunk(2, -1)
        else:
            first_stage = None
            position, hidden = self.queries.weight.expand(len(memory), -1, -1).chunk(2, -1)     # [B, Q, D] each
            reference = self.reference_points(position).to(pyramid.centers.dtype).sigmoid()     # [B, Q, 2]
        steps = [functools.partial(_decode, layer, classify, regress, self.with_box_refine)
                 for layer, classify, regress in zip(self.decoder, self.classify, self.regress, strict=False)]
        states = run_blocks(steps, Decoding(hidden, reference), position, memory, pyramid, checkpointing=self.checkpointing,
                            outputs_of=range(len(steps)))
        return Predictions(first_stage, [state.prediction for state in states])

    def encode(self, features: Sequence[Tensor], pyramid: Pyramid) -> Tensor:
        """[B, S, D]: each pixel attends to points around itself on every level."""
        memory = torch.cat([feature.flatten(2).transpose(1, 2) for feature in features], 1)
        position = sinusoid(2 * math.pi * pyramid.centers.flip(-1), memory.shape[2] // 2).flatten(2)    # of y, then of x
        position = position + self.level_embedding[pyramid.levels]
        reference = _on_levels(pyramid.centers, pyramid)                                        # [1 or B, S, L, 2]
        return run_blocks(self.encoder, memory, position, reference, pyramid, checkpointing=self.checkpointing)

    def propose(self, memory: Tensor, pyramid: Pyramid) -> tuple[Prediction, Tensor]:
        """The first stage: every pixel says whether an object is around it, and where (appendix A.4).

        Returns:
            what each of the S pixels predicts, and the boxes [B, Q, 4] of the best, which the second stage takes as given.
        """
        size = 0.05 * 2.0 ** pyramid.levels.to(pyramid.centers.dtype)                           # [S] in fractions of the image
        prior = torch.cat([pyramid.centers, size[:, None].expand_as(pyramid.centers)], -1)      # [1 or B, S, 4]
        usable = ((prior > 0.01) & (prior < 0.99)).all(-1, keepdim=True)                        # away from the border, not on padding
        pixels = self.proposal_features(memory.where(usable, 0))
        boxes = _refine(prior, self.regress[-1](pixels)).where(usable, 1)                       # so the authors' code has it, at infinity
        logits = self.classify[-1](pixels).to(boxes.dtype)
        # The authors' code lets unusable pixels win where few others score above them; then predictions depend on the padding.
        score = logits[..., 0].masked_fill(~usable[..., 0], -math.inf)
        best = score.topk(min(self.num_queries, score.shape[1])).indices
        return Prediction(logits, boxes), boxes.detach().gather(1, best[..., None].expand(-1, -1, 4))

    def loss(self, images: ImageBatch, samples: list[Sample]) -> dict[str, Tensor]:
        """The loss of every layer, each with a matching of its own: of the last without a suffix, of those before with their number, of
        the first stage, to which all objects are of class 0, with `_proposal`."""
        first_stage, layers = self(images)
        targets = set_targets(samples)
        stages = {f"_{index}": (layer, targets) for index, layer in enumerate(layers[:-1])} | {"": (layers[-1], targets)}
        if first_stage is not None:
            stages["_proposal"] = first_stage, [target._replace(labels=torch.zeros_like(target.labels)) for target in targets]
        num_boxes = mean_over_ranks(sum(len(target.labels) for target in targets), images.device)
        losses = {}
        for suffix, (prediction, wanted) in stages.items():
            pairs = self.matcher(*prediction, wanted)
            losses |= {name + suffix: term for name, term in self.set_loss(*prediction, wanted, pairs, num_boxes).items()}
        return losses

    def predict(self, images: ImageBatch, samples: list[Sample]) -> list[Sample]:
        """The best pairs of query and class, without suppression of those that overlap."""
        logits, boxes = self(images).layers[-1]
        scores = logits.sigmoid().flatten(1)                                                    # [B, Q C]
        scores, best = scores.topk(min(self.max_per_image, scores.shape[1]))
        for sample, score, index, box in zip(samples, scores, best, cxcywh_to_xyxy(boxes), strict=True):
            height, width = sample.ori_shape
            keep = score >= self.score_threshold
            index, score = index[keep], score[keep]
            box = clip_boxes(box[index // logits.shape[2]] * box.new_tensor([width, height, width, height]), height, width)
            sample.pred_instances = InstanceData(bboxes=box, scores=score, labels=index % logits.shape[2])
        return samples

    def _initialise(self) -> None:
        """As the authors' code."""
        if self.two_stage:
            nn.init.xavier_uniform_(self.proposal_features[0].weight)
            nn.init.xavier_uniform_(self.proposal_query[0].weight)
        else:
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)
        for classify, regress in zip(self.classify, self.regress, strict=True):
            nn.init.constant_(classify.bias, -math.log(99))                                     # probability 0.01 (RetinaNet, sec. 4.1)
            nn.init.zeros_(regress.layers[-1].weight)                                           # boxes start where they are
            nn.init.zeros_(regress.layers[-1].bias)
        if not self.two_stage:
            nn.init.constant_(self.regress[0].layers[-1].bias[2:], -2.0)                        # and of side 0.12


def _decode(layer: nn.Module, classify: nn.Module, regress: nn.Module, refine: bool, state: Decoding, position: Tensor, memory: Tensor,
            pyramid: Pyramid) -> Decoding:
    """One decoder layer and what it predicts; with `refine`, the next one looks where this one sees a box."""
    hidden = layer(state.hidden, position, _on_levels(state.reference, pyramid), memory, pyramid)
    boxes = _refine(state.reference, regress(hidden))
    reference = boxes.detach() if refine else state.reference                                   # each layer learns its own step
    return Decoding(hidden, reference, Prediction(classify(hidden).to(boxes.dtype), boxes))


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention of all pixels, and two linear layers; normalised after each."""

    def __init__(self, channels: int, num_heads: int, num_levels: int, num_points: int, hidden_channels: int, dropout: float) -> None:
        super().__init__()
        self.attention = DeformableAttention(channels, num_heads, num_levels, num_points)
        self.attention_norm = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, hidden_channels, dropout)
        self.feed_forward_norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, pixels: Tensor, position: Tensor, reference: Tensor, pyramid: Pyramid) -> Tensor:
        """[B, S, D] to [B, S, D]; `reference` [1 or B, S, L, 2]."""
        pixels = self.attention_norm(pixels + self.dropout(self.attention(pixels + position, reference, pixels, pyramid)))
        return self.feed_forward_norm(pixels + self.dropout(self.feed_forward(pixels)))


class DeformableDecoderLayer(nn.Module):
    """Self-attention of the queries, deformable attention to the pixels, and two linear layers; normalised after each."""

    def __init__(self, channels: int, num_heads: int, num_levels: int, num_points: int, hidden_channels: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = Attention(channels, num_heads, dropout)
        self.self_attention_norm = nn.LayerNorm(channels)
        self.cross_attention = DeformableAttention(channels, num_heads, num_levels, num_points)
        self.cross_attention_norm = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, hidden_channels, dropout)
        self.feed_forward_norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, position: Tensor, reference: Tensor, memory: Tensor, pyramid: Pyramid) -> Tensor:
        """[B, Q, D] to [B, Q, D]; `reference` [B, Q, L, 2 or 4], `memory` [B, S, D]."""
        query = hidden + position
        hidden = self.self_attention_norm(hidden + self.dropout(self.self_attention(query, query, hidden)))
        hidden = self.cross_attention_norm(hidden + self.dropout(self.cross_attention(hidden + position, reference, memory, pyramid)))
        return self.feed_forward_norm(hidden + self.dropout(self.feed_forward(hidden)))


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (eq. 3): each query reads, with each head, a few points of each level, wherever it wants."""

    def __init__(self, channels: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise ValueError(f"the channels are divided among the heads: {channels} channels are no multiple of num_heads={num_heads}")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = nn.Linear(channels, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(channels, num_heads * num_levels * num_points)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        self._initialise()

    def forward(self, query: Tensor, reference: Tensor, pixels: Tensor, pyramid: Pyramid) -> Tensor:
        """Attend to points around a reference point, or within and around a reference box.

        Args:
            query: [B, Q, D].
            reference: [1 or B, Q, L, 2] (x, y) or [1 or B, Q, L, 4] (cx, cy, w, h), fractions of each map with its padding.
            pixels: [B, S, D] to read.
            pyramid: how they lie on the levels.

        Returns:
            [B, Q, D]
        """
        value = self.value(pixels)
        if pyramid.padding is not None:
            value = value.masked_fill(pyramid.padding[..., None], 0)
        points = *query.shape[:2], self.num_heads, self.num_levels, self.num_points
        offsets = self.sampling_offsets(query).view(*points, 2)
        weights = self.attention_weights(query).view(*points[:3], -1).softmax(-1).view(points)
        center, size = reference[:, :, None, :, None, :2], reference[:, :, None, :, None, 2:]       # [1 or B, Q, 1, L, 1, 2]
        # An offset of 1 is a pixel of each level; of a box, as much as lets the P-th point begin at its border (appendix A.4).
        unit = size / (2 * self.num_points) if size.shape[-1] else pyramid.pixel_sizes
        locations = torch.addcmul(center, offsets.to(center.dtype), unit)
        value = value.unflatten(2, (self.num_heads, -1))
        return self.output(ms_deform_attn(value, pyramid.shapes, pyramid.starts, locations, weights))

    @torch.no_grad()
    def _initialise(self) -> None:
        """Heads look into directions of their own, the k-th point k pixels far, all with the same weight (appendix A.4)."""
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction /= direction.abs().amax(1, keepdim=True)                                          # to the border of a square
        steps = torch.arange(1, self.num_points + 1)
        offsets = direction[:, None, None] * steps[:, None]                                         # [M, 1, P, 2]
        self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        for zero in (self.sampling_offsets.weight, self.attention_weights.weight, self.attention_weights.bias, self.value.bias,
                     self.output.bias):
            nn.init.zeros_(zero)
        for linear in (self.value, self.output):
            nn.init.xavier_uniform_(linear.weight)


def _pyramid(features: Sequence[Tensor], images: ImageBatch) -> Pyramid:
    """How the images, and the padding beside them, lie on the levels."""
    height, width = images.tensor.shape[2:]
    maps = [tuple(feature.shape[2:]) for feature in features]
    # A pixel of a map is of the image where the pixel at its top left is: ceil.
    valid = [[(-(-w * columns // width), -(-h * rows // height)) for rows, columns in maps]
             for h, w in (images.sizes if images.padded else images.sizes[:1])]
    valid = images.tensor.new_tensor(valid)                                                         # [1 or B, L, 2]
    centers = []
    for (rows, columns), size in zip(maps, valid.unbind(1), strict=True):
        y, x = (torch.arange(count, device=images.device) + 0.5 for count in (rows, columns))
        centers.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1) / size[:, None])
    shapes = torch.tensor(maps, device=images.device)
    centers = torch.cat(centers, 1)
    counts = shapes.prod(1)
    levels = torch.arange(len(shapes), device=images.device).repeat_interleave(counts, output_size=centers.shape[1])
    padding = (centers > 1).any(-1) if images.padded else None
    pixel_sizes = 1 / shapes.flip(1).to(valid.dtype)
    return Pyramid(shapes, counts.cumsum(0) - counts, levels, pixel_sizes[:, None], valid * pixel_sizes, centers, padding)


def _on_levels(reference: Tensor, pyramid: Pyramid) -> Tensor:
    """[., Q, 2 or 4] in fractions of the image to [., Q, L, 2 or 4] in fractions of each level with its padding."""
    return reference[:, :, None] * pyramid.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)[:, None]


def _refine(reference: Tensor, delta: Tensor) -> Tensor:
    """Boxes [..., 4]: `delta` is added to reference points [..., 2] or boxes [..., 4] where those are logits (sec. 4.2)."""
    reference = reference.clamp(0, 1)
    logits = torch.log(reference.clamp(min=1e-5) / (1 - reference).clamp(min=1e-5))
    return (delta + F.pad(logits, (0, 4 - reference.shape[-1]))).sigmoid()
