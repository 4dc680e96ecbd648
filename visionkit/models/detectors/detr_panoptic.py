"""Panoptic DETR: a mask for every query, and one segment for every pixel (Carion et al. 2020, arXiv:2005.12872, sec. 4.4)."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.models.detectors.detr import DETR, Decoded
from visionkit.models.losses import mean_over_ranks
from visionkit.models.targets import set_targets
from visionkit.ops import clip_boxes, cxcywh_to_xyxy, sigmoid_focal_loss
from visionkit.ops.checkpointing import Checkpointing, recompute
from visionkit.registry import MODELS, ConfigError
from visionkit.structures import ImageBatch, InstanceData, PanopticMap, Sample, Segment
from visionkit.structures.panoptic_map import areas_of

# B images of H x W pixels, Q queries, K of them chosen in an image, C classes, M heads, D channels of the transformer,
# h x w positions of the coarsest feature map


class Scene(NamedTuple):
    """What DETR made of the images; a mask can be asked for of any query."""
    decoded: Decoded
    finer: tuple[Tensor, ...]       # [B, C_l, h_l, w_l] the backbone's other stages, coarsest first


@MODELS.register_module()
class DetrPanoptic(DETR):
    """DETR with a head that turns each query's attention into a mask. Things and stuff are objects alike.

    The paper trains DETR first, on boxes around things and stuff, then freezes it and trains the mask head: `load_from` the weights of a
    `DETR` and set `freeze_detr`. Both at once work as well.

    Args:
        num_things: labels below are things, the others are stuff.
        freeze_detr: train the mask head only; the rest stays as at test time.
        mask_weight: of the focal loss of the masks.
        dice_weight: of their Dice loss.
        panoptic_threshold: a query is a segment if it is surer than this of its class.
        min_area: segments of as few pixels or fewer are dissolved.
        empty_label: the class that all of an image gets in which there is no segment. By default it stays void: the paper says nothing of
            it, and in the authors' code the class 1 (a category number: person) that stands for it never reaches the result.
        maps_gain: the mask head's first weights for the attention maps are this many times as large as its others. A map is a distribution
            over M heads and h x w positions, small beside the features; from scratch, about M * h * w lets the masks of queries part early.
        query_chunk: queries whose masks are computed at a time; fewer take less memory, in training with `checkpointing`.
        backbone: images to feature maps, of which the mask head reads the last four.
        num_classes and the arguments after query_chunk: of `DETR`; `checkpointing` holds for the mask head too, where chunks of queries do
            not depend on each other, so that `sqrt` is `every`.
    """

    def __init__(self, backbone: dict | nn.Module, num_classes: int, num_things: int, freeze_detr: bool = False, mask_weight: float = 1.0,
                 dice_weight: float = 1.0, panoptic_threshold: float = 0.85, min_area: int = 4, empty_label: int | None = None,
                 maps_gain: float = 1.0, query_chunk: int = 25, num_queries: int = 100, channels: int = 256, num_heads: int = 8,
                 hidden_channels: int = 2048, encoder_layers: int = 6, decoder_layers: int = 6, dropout: float = 0.1,
                 inner_dropout: float = 0.0, pre_norm: bool = False, position: str = "sine", auxiliary_losses: bool = True,
                 matcher: dict | nn.Module | None = None, set_loss: dict | nn.Module | None = None, score_threshold: float = 0.0,
                 checkpointing: bool | str | Mapping = False, data_preprocessor: dict | nn.Module | None = None) -> None:
        super().__init__(backbone, num_classes, num_queries=num_queries, channels=channels, num_heads=num_heads, dropout=dropout,
                         hidden_channels=hidden_channels, encoder_layers=encoder_layers, decoder_layers=decoder_layers,
                         inner_dropout=inner_dropout, pre_norm=pre_norm, position=position, auxiliary_losses=auxiliary_losses,
                         matcher=matcher, set_loss=set_loss, score_threshold=score_threshold, checkpointing=checkpointing,
                         data_preprocessor=data_preprocessor)
        if not 0 <= num_things <= num_classes:
            raise ValueError(f"num_things counts the classes that are things, 0 to num_classes={num_classes}; got {num_things}")
        if empty_label is not None and not 0 <= empty_label < num_classes:
            raise ValueError(f"empty_label is one of {num_classes} labels or None, got {empty_label}")
        if query_chunk < 1 or min_area < 0:
            raise ValueError(f"query_chunk is at least 1 and min_area not negative, got {query_chunk} and {min_area}")
        if len(self.backbone.out_channels) < 4:
            raise ConfigError(f"the mask head reads four stages of the backbone, which gives {len(self.backbone.out_channels)}; set "
                              f"out_stages=(2, 3, 4, 5)", ("backbone",))
        self.num_things = num_things
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        self.panoptic_threshold = panoptic_threshold
        self.min_area = min_area
        self.empty_label = empty_label
        self.query_chunk = query_chunk
        self.checkpointing = Checkpointing.of(checkpointing)
        self.freeze_detr = freeze_detr
        if freeze_detr:
            self.requires_grad_(False)                       # what is built from here on is trained
        self.mask_attention = MaskAttention(channels, num_heads)
        self.mask_head = MaskHead(channels, num_heads, self.backbone.out_channels[-2:-5:-1], maps_gain)

    def train(self, mode: bool = True) -> DetrPanoptic:
        super().train(mode)
        if self.freeze_detr:                                 # the authors' code leaves its dropout on
            for part in (self.backbone, self.transformer):
                part.eval()
        return self

    def forward(self, images: ImageBatch) -> Scene:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_detr):
            *finer, coarsest = self.backbone(images.tensor)[-4:]
            return Scene(self.decode(coarsest, images), tuple(reversed(finer)))

    def masks(self, scene: Scene, image: int, queries: Tensor) -> Tensor:
        """Logits [K, h_2, w_2], on the finest stage, of chosen queries [K] of one image. No query's mask depends on another's."""
        decoded, finer = scene.decoded, [stage[image] for stage in scene.finer]
        masks = [decoded.hidden.new_zeros(0, *finer[-1].shape[1:])]
        for chunk in queries.split(self.query_chunk) if len(queries) else ():
            maps = self.mask_attention(decoded.hidden[image, chunk], decoded.memory[image], decoded.valid[image])   # [K, M, h, w]
            masks.append(recompute(self.mask_head, maps, decoded.features[image], *finer, checkpointing=self.checkpointing))
        return torch.cat(masks).to(decoded.layers[-1].logits.dtype)

    def loss(self, images: ImageBatch, samples: list[Sample]) -> dict[str, Tensor]:
        """The terms of `DETR`, unless it is frozen, and those of the masks of the last layer's matched queries."""
        if any("masks" not in sample.gt_instances for sample in samples):
            raise ConfigError("a panoptic model learns from masks, and the samples have none: let the training pipeline load them with "
                              "LoadPanopticAnnotations")
        targets = set_targets(samples)
        num_boxes = mean_over_ranks(sum(len(target.labels) for target in targets), images.device)
        scene = self(images)
        *earlier, last = scene.decoded.layers
        pairs = self.matcher(*last, targets)
        losses = self._mask_losses(scene, images, samples, pairs, num_boxes)
        if not self.freeze_detr:
            losses |= self.set_loss(*last, targets, pairs, num_boxes)
            for layer, prediction in enumerate(earlier if self.auxiliary_losses else ()):
                losses |= {f"{name}_{layer}": term for name, term in self._set_loss(prediction, targets, num_boxes).items()}
        return losses

    def _mask_losses(self, scene: Scene, images: ImageBatch, samples: list[Sample], pairs: list[tuple[Tensor, Tensor]],
                     num_boxes: float) -> dict[str, Tensor]:
        """Focal loss, a mean over pixels, and Dice loss, both over the padded image, and summed over objects."""
        height, width = images.tensor.shape[2:]
        parameters = [*self.mask_attention.parameters(), *self.mask_head.parameters()]
        focal = dice = sum(parameter.sum() for parameter in parameters) * 0.0           # they take part where there is no object too
        for image, (queries, objects) in enumerate(pairs):
            if len(queries):
                logits = F.interpolate(self.masks(scene, image, queries)[:, None], (height, width), mode="bilinear")[:, 0]
                truth = samples[image].gt_instances.masks[objects]                      # [K, h', w'] without padding
                truth = F.pad(truth, (0, width - truth.shape[2], 0, height - truth.shape[1])).to(logits.dtype)
                focal = focal + sigmoid_focal_loss(logits, truth).mean((1, 2)).sum()
                dice = dice + dice_loss(logits, truth).sum()
        return {"loss_mask": self.mask_weight * focal / num_boxes, "loss_dice": self.dice_weight * dice / num_boxes}

    def predict(self, images: ImageBatch, samples: list[Sample]) -> list[Sample]:
        """Every query's best class, its box and its mask as `pred_instances`, and a map of the surest as `pred_panoptic`."""
        scene = self(images)
        last = scene.decoded.layers[-1]
        probabilities = last.logits.softmax(-1)                                                 # [B, Q, C + 1]
        boxes = cxcywh_to_xyxy(last.boxes)
        for index, sample in enumerate(samples):
            height, width = sample.ori_shape
            score, label = probabilities[index, :, :-1].max(-1)                                 # no-object is no answer
            seen = (score >= min(self.score_threshold, self.panoptic_threshold)).nonzero()[:, 0]
            score, label, masks = score[seen], label[seen], self.masks(scene, index, seen)
            order = score.argsort(descending=True, stable=True)
            order = order[score[order] >= self.score_threshold]
            box = boxes[index, seen[order]]
            box = clip_boxes(box * box.new_tensor([width, height, width, height]), height, width)
            # a chunk at a time: nothing here is as large as masks in the size of the image
            whole = [F.interpolate((_upsample(chunk, images, sample) > 0)[:, None].float(), (height, width))[:, 0].bool()
                     for chunk in masks[order].split(self.query_chunk)]
            sample.pred_instances = InstanceData(bboxes=box, scores=score[order], labels=label[order], masks=torch.cat(whole))
            sure = (score > self.panoptic_threshold) & (score > probabilities[index, seen, -1])
            sample.pred_panoptic = merge(_upsample(masks[sure], images, sample), label[sure], self.num_things, (height, width),
                                         self.min_area, self.empty_label)
        return samples


class MaskAttention(nn.Module):
    """Where each query looks, head by head: attention weights without values.

    Args:
        channels: D.
        num_heads: M.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        for linear in (self.query, self.key):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: Tensor, memory: Tensor, valid: Tensor) -> Tensor:
        """Maps of one image.

        Args:
            hidden: [K, D], queries.
            memory: [h * w, D].
            valid: [h, w] bool, false on padding.

        Returns:
            [K, M, h, w], of each query a distribution over heads *and* positions.
        """
        query, key = (linear(x).unflatten(-1, (self.num_heads, -1)) for linear, x in ((self.query, hidden), (self.key, memory)))
        logits = torch.einsum("kmd,smd->kms", query * query.shape[-1] ** -0.5, key)             # [K, M, h * w]
        logits = logits.masked_fill(~valid.flatten(), -math.inf)
        return logits.flatten(1).softmax(-1).view(*logits.shape[:2], *valid.shape)


class MaskHead(nn.Module):
    """Convolutions that turn attention maps into masks, with finer stages of the backbone added on the way up (fig. 8).

    Args:
        channels: D.
        num_heads: M.
        finer_channels: of three stages, each twice as fine as the one before.
        maps_gain: the first weights for the maps are this many times as large as the others.
    """

    def __init__(self, channels: int, num_heads: int, finer_channels: Sequence[int], maps_gain: float = 1.0) -> None:
        super().__init__()
        if channels < 16:
            raise ValueError(f"the mask head ends with a sixteenth of the transformer's channels, which are {channels}; give it 16 or more")
        wide = channels + num_heads
        widths = (wide, wide, *(channels // 2 ** halved for halved in (1, 2, 3, 4)))            # 264 264 128 64 32 16
        self.convs = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1) for pair in zip(widths, widths[1:], strict=False))
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(8, width), width) for width in widths[1:])
        self.adapters = nn.ModuleList(nn.Conv2d(*pair, 1) for pair in zip(finer_channels, widths[2:], strict=False))
        self.output = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for conv in (*self.convs, *self.adapters, self.output):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)
        with torch.no_grad():
            self.convs[0].weight[:, channels:].mul_(maps_gain)

    def forward(self, maps: Tensor, features: Tensor, *finer: Tensor) -> Tensor:
        """Mask logits of the queries of one image.

        Args:
            maps: [K, M, h, w].
            features: [D, h, w], what the transformer was given.
            finer: three stages [C_l, h_l, w_l], coarsest first.

        Returns:
            [K, h_2, w_2], of the finest stage's size.
        """
        # The first convolution reads the features, the same for every query, and the maps: it is a sum, of which the first part
        # is computed once. So is what the adapters give.
        first, channels = self.convs[0], len(features)
        x = F.conv2d(features[None], first.weight[:, :channels], first.bias, padding=1) \
            + F.conv2d(maps, first.weight[:, channels:], padding=1)
        x = F.relu(self.norms[0](x))
        x = F.relu(self.norms[1](self.convs[1](x)))
        for stage, adapter, conv, norm in zip(finer, self.adapters, self.convs[2:], self.norms[2:], strict=True):
            x = adapter(stage[None]) + F.interpolate(x, stage.shape[1:], mode="nearest")
            x = F.relu(norm(conv(x)))
        return self.output(x)[:, 0]


def dice_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """[K], 1 - the Dice coefficient of each mask (Milletari et al. 2016, arXiv:1606.04797), 1 added above and below.

    Args:
        logits: [K, H, W].
        truth: [K, H, W] of 0 and 1.
    """
    p, t = logits.sigmoid().flatten(1), truth.flatten(1)
    return 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)


def merge(masks: Tensor, labels: Tensor, num_things: int, size: tuple[int, int], min_area: int = 4,
          empty_label: int | None = None) -> PanopticMap:
    """A segment for every pixel: the mask that is surest of it.

    Args:
        masks: [K, h, w], logits.
        labels: [K].
        num_things: labels below are things; of a stuff class there is one segment.
        size: (H, W) of the map, to which the segments are scaled.
        min_area: segments of as few pixels or fewer are dissolved, and their pixels go to who is next.
        empty_label: the class of all pixels where no segment is left; None: they are void.
    """
    leaders = torch.arange(len(labels), device=labels.device)
    for index, label in enumerate(labels.tolist()):
        if label >= num_things:
            leaders[index] = (labels == label).nonzero()[0, 0]
    owner = _owners(masks, size, leaders)
    while len(labels):
        left = torch.bincount(owner.flatten(), minlength=len(labels)) > min_area
        if left.all():
            break
        # Here stuff that went to its leader is dissolved too, and its pixels are dealt out again, as in the authors' code.
        masks, labels = masks[left], labels[left]
        owner = _owners(masks, size)
    if not len(labels) and empty_label is not None:
        owner, labels = torch.zeros_like(owner), [empty_label]
    ids = (owner + 1).to("cpu", torch.int32).numpy()
    areas = areas_of(ids)
    return PanopticMap(ids, tuple(Segment(index + 1, int(label), int(label) < num_things, areas[index + 1])
                                  for index, label in enumerate(labels)))


def _owners(masks: Tensor, size: tuple[int, int], leaders: Tensor | None = None) -> Tensor:
    """int64 [H, W], the mask each pixel belongs to, or its leader; -1 everywhere where there is no mask."""
    if not len(masks):
        return torch.full(size, -1, device=masks.device)
    owner = masks.argmax(0)
    owner = owner if leaders is None else leaders[owner]
    return F.interpolate(owner[None, None].float(), size, mode="nearest-exact")[0, 0].long()


def _upsample(masks: Tensor, images: ImageBatch, sample: Sample) -> Tensor:
    """Logits [K, h_2, w_2] to the pixels [K, h, w] of the network's input, of which the padding is cut off."""
    height, width = sample.img_shape
    return F.interpolate(masks[:, None], images.tensor.shape[2:], mode="bilinear")[:, 0, :height, :width]
