"""Images to feature maps or tokens.

A backbone's `forward(images [B, 3, H, W])` returns a tuple of [B, C_i, H / s_i, W / s_i]; its attributes `out_channels` and `strides`
tell the C_i and s_i.

A token backbone says `returns_tokens = True`; its `forward` takes an `ImageList`, an `ImageBatch` or [B, 3, H, W], each image as it is, and
returns a `PackedSequence`, with grids where tokens are places. `out_channels` and `strides` have one entry then.
"""
from visionkit.models.backbones.alexnet import AlexNet
from visionkit.models.backbones.conv_blocks import ConvBlocks
from visionkit.models.backbones.moonvit import MoonViT
from visionkit.models.backbones.nin import NIN
from visionkit.models.backbones.pretrained import Trunk
from visionkit.models.backbones.resnet import ResNet
from visionkit.models.backbones.strided_convs import StridedConvs
from visionkit.models.backbones.vit import ViT

__all__ = ["AlexNet", "ConvBlocks", "MoonViT", "NIN", "ResNet", "StridedConvs", "Trunk", "ViT"]
