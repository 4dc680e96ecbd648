"""Images to feature maps.

A backbone's `forward(images [B, 3, H, W])` returns a tuple of [B, C_i, H / s_i, W / s_i]; its attributes `out_channels` and `strides`
tell the C_i and s_i.
"""
from visionkit.models.backbones.alexnet import AlexNet
from visionkit.models.backbones.conv_blocks import ConvBlocks
from visionkit.models.backbones.nin import NIN
from visionkit.models.backbones.pretrained import Trunk
from visionkit.models.backbones.resnet import ResNet
from visionkit.models.backbones.strided_convs import StridedConvs

__all__ = ["NIN", "AlexNet", "ConvBlocks", "ResNet", "StridedConvs", "Trunk"]
