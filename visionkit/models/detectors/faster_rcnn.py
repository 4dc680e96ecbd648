"""Faster R-CNN (Ren et al. 2015, arXiv:1506.01497), with or without a feature pyramid (Lin et al. 2017, arXiv:1612.03144)."""
from __future__ import annotations

from torch import Tensor, nn

from visionkit.models.base import Model
from visionkit.models.heads.rpn import FirstStage
from visionkit.registry import BACKBONES, HEADS, MODELS, NECKS
from visionkit.structures import ImageBatch, Sample


@MODELS.register_module()
class FasterRCNN(Model):
    """Two stages that share their features: a network proposes boxes, a second one classifies and refines them.

    Args:
        backbone: images to feature maps; tells the neck its channels and strides.
        neck: feature maps to a pyramid; tells both stages its channels and strides. None: without a pyramid, the first stage works on
            the first feature map and the second stage on the last, such as C4 and a dilated C5.
        rpn: pyramid to proposals.
        roi: pyramid and proposals to detections.
        data_preprocessor: raw images to a batch.
    """
    learns_from = ("gt_instances",)

    def __init__(self, backbone: dict | nn.Module, neck: dict | nn.Module | None, rpn: dict | nn.Module, roi: dict | nn.Module,
                 data_preprocessor: dict | nn.Module | None = None) -> None:
        super().__init__(data_preprocessor)
        self.backbone = BACKBONES.make(backbone, at="backbone")
        channels, strides = self.backbone.out_channels, self.backbone.strides
        self.neck = None if neck is None else NECKS.make(neck, at="neck", in_channels=channels, strides=strides)
        if self.neck is None:
            if len(channels) > 2:
                raise ValueError(f"without a neck the stages work on one map each, but the backbone gives {len(channels)}; set its "
                                 f"out_stages, or give a neck")
            self.first, self.second = slice(0, 1), slice(-1, None)                          # which maps each stage works on
        else:
            self.first = self.second = slice(None)
            channels, strides = self.neck.out_channels, self.neck.strides
        self.rpn = HEADS.make(rpn, at="rpn", in_channels=channels[self.first], strides=strides[self.first])
        self.roi = HEADS.make(roi, at="roi", in_channels=channels[self.second], strides=strides[self.second])

    def forward(self, images: ImageBatch) -> FirstStage:
        features = self.backbone(images.tensor)
        if self.neck is not None:
            features = self.neck(features)
        objectness = self.rpn(features[self.first])
        return FirstStage(features, objectness, self.rpn.propose(objectness, images.sizes))

    def loss(self, images: ImageBatch, samples: list[Sample]) -> dict[str, Tensor]:
        features, objectness, proposals = self(images)
        return {**self.rpn.loss(features[self.first], objectness, samples), **self.roi.loss(features[self.second], proposals, samples)}

    def predict(self, images: ImageBatch, samples: list[Sample]) -> list[Sample]:
        features, _, proposals = self(images)
        return self.roi.predict(features[self.second], proposals, samples)
