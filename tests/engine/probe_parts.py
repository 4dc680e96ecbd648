"""A small network whose features can be made to misbehave; configs import this module by its name."""
import torch
from torch import nn

from visionkit.models.base import Model
from visionkit.registry import BACKBONES, MODELS


@BACKBONES.register_module(force=True)
class ProbeNet(nn.Module):
    """Two convolutions with batch normalisation, of stride 4 and 8."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, width, 5, 4, 2), nn.BatchNorm2d(width), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.out_channels, self.strides = (width, width), (4, 8)

    def forward(self, images):
        first = self.conv1(images)
        return first, self.conv2(first)


@MODELS.register_module(force=True)
class ProbePretext(Model):
    """Learns nothing; `fault` makes its features train batch statistics, or its constructor load weights."""

    def __init__(self, backbone, fault: str = "") -> None:
        super().__init__()
        self.backbone = BACKBONES.make(backbone, at="backbone")
        self.fault = fault
        if fault == "loads":
            for parameter in self.parameters():
                nn.init.constant_(parameter, 0.1)

    def forward(self, images):
        return self.backbone(images.tensor)[-1]

    def loss(self, images, samples):
        return {"loss": self(images).mean()}

    def predict(self, images, samples):
        return samples

    def extract_features(self, images):
        assert not torch.is_grad_enabled()
        assert not self.training
        if self.fault == "trains":
            self.backbone.train()
        return {**super().extract_features(images), "vector": self.backbone(images.tensor)[-1].mean((2, 3))}
