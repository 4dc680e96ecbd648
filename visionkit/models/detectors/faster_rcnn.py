"""Faster R-CNN (Ren et al. 2015, arXiv:1506.01497), with or without a feature pyramid (Lin et al. 2017, arXiv:1612.03144)."""
from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from visionkit.models.base import Model
from visionkit.models.heads.rpn import Objectness
from visionkit.registry import BACKBONES, HEADS, MODELS, NECKS
from visionkit.structures import ImageBatch, Sample


class FirstStage(NamedTuple):
    """What the second stage works on."""
    features: tuple[Tensor, ...]    # [B, C, h_l, w_l] a pyramid level
    objectness: Objectness
    proposals: list[Tensor]         # [P, 4] an image, best first, image pixels


@MODELS.register_module()
class FasterRCNN(Model):
    """Two stages that share their features: a network proposes boxes, a second one classifies and refines them.

    Args:
        backbone: images to feature maps; tells the neck its channels and strides.
        neck: feature maps to a pyramid; tells both stages its channels and strides.
        rpn: pyramid to proposals.
        roi: pyramid and proposals to detections.
        data_preprocessor: raw images to a batch.
    """

    def __init__(self, backbone: dict | nn.Module, neck: dict | nn.Module, rpn: dict | nn.Module, roi: dict | nn.Module,
                 data_preprocessor: dict | nn.Module | None = None) -> None:
        super().__init__(data_preprocessor)
        self.backbone = BACKBONES.make(backbone, at="backbone")
        self.neck = NECKS.make(neck, at="neck", in_channels=self.backbone.out_channels, strides=self.backbone.strides)
        pyramid = {"in_channels": self.neck.out_channels, "strides": self.neck.strides}
        self.rpn = HEADS.make(rpn, at="rpn", **pyramid)
        self.roi = HEADS.make(roi, at="roi", **pyramid)

    def forward(self, images: ImageBatch) -> FirstStage:
        features = self.neck(self.backbone(images.tensor))
        objectness = self.rpn(features)
        return FirstStage(features, objectness, self.rpn.propose(objectness, images.sizes))

    def loss(self, images: ImageBatch, samples: list[Sample]) -> dict[str, Tensor]:
        features, objectness, proposals = self(images)
        return {**self.rpn.loss(features, objectness, samples), **self.roi.loss(features, proposals, samples)}

    def predict(self, images: ImageBatch, samples: list[Sample]) -> list[Sample]:
        features, _, proposals = self(images)
        return self.roi.predict(features, proposals, samples)
