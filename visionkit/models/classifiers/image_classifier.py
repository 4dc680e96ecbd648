"""A backbone and a head that says what the whole image shows."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from visionkit.models.base import Model, last_features
from visionkit.registry import BACKBONES, HEADS, MODELS
from visionkit.structures import ImageBatch, ImageList, Sample


@MODELS.register_module()
class ImageClassifier(Model):
    """Classification of whole images by the last map or the tokens of a backbone (as He et al. 2015, arXiv:1512.03385, sec. 3.3).

    Args:
        backbone: gives the maps, or the tokens.
        num_classes: of a head of the usual kind; None where `head` has its own number.
        head: takes the last map, or the tokens; by default `ClassificationHead`.
        frozen: keep the backbone as it is, batch statistics included: the head alone learns.
        data_preprocessor: see Model.

    Raises:
        ValueError: neither `num_classes` nor `head` is there; in `loss`, an image has no label or one that the head does not know.
    """
    reads_tokens = True
    learns_from = ("gt_label",)

    def __init__(self, backbone: Mapping | nn.Module, num_classes: int | None = None, head: Mapping | nn.Module | None = None,
                 frozen: bool = False, data_preprocessor: Mapping | nn.Module | None = None) -> None:
        super().__init__(data_preprocessor)
        if num_classes is None and head is None:
            raise ValueError("a classifier needs num_classes, or a head that has them; got neither")
        self.backbone = BACKBONES.make(backbone, at="backbone")
        offered = {"in_channels": self.backbone.out_channels[-1]} | ({} if num_classes is None else {"num_classes": num_classes})
        self.head = HEADS.make(head or {"type": "ClassificationHead"}, at="head", **offered)
        self.frozen = frozen
        self.backbone.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> ImageClassifier:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: ImageBatch | ImageList) -> Tensor:
        """[B, num_classes] logits."""
        features = last_features(self.backbone, images)
        padded = isinstance(images, ImageBatch) and images.padded
        return self.head(features, images.valid() if padded else None)

    def loss(self, images: ImageBatch | ImageList, samples: list[Sample]) -> dict[str, Tensor]:
        logits = self(images)
        absent = [sample.get("img_id") for sample in samples if "gt_label" not in sample]
        if absent:
            raise ValueError(f"a classifier learns from labels, but image {absent[0]!r} has none; take a data set with labels, such as "
                             f"ImageFolder")
        labels = torch.stack([sample.gt_label for sample in samples]).to(logits.device)
        if ((labels < 0) | (labels >= logits.shape[1])).any():
            raise ValueError(f"the head knows the labels 0 to {logits.shape[1] - 1}, and the images have {labels.tolist()[:8]}; make "
                             f"num_classes that of the data set")
        return {"loss_class": self.head.loss(logits, labels)}

    def predict(self, images: ImageBatch | ImageList, samples: list[Sample]) -> list[Sample]:
        for sample, scores in zip(samples, self(images).float().softmax(1), strict=True):
            sample.pred_scores = scores
        return samples
