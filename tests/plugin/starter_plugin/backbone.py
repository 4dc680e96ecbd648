"""A small convolutional backbone with feature maps at strides 4, 8, 16 and 32."""
from torch import Tensor, nn

from visionkit.registry import BACKBONES, OPS


@BACKBONES.register_module()
class StarterNet(nn.Module):
    """Five stages of convolution, norm and ReLU, each at half the resolution of the one before.

    Args:
        width: channels of the first stage; each stage doubles them, up to eight times as many.
        downsample: config of the op that halves the resolution.
    """

    def __init__(self, width: int = 16, downsample: dict | None = None) -> None:
        super().__init__()
        channels = [width * min(2**stage, 8) for stage in range(5)]
        self.out_channels = tuple(channels[1:])
        self.strides = (4, 8, 16, 32)
        self.stages = nn.ModuleList()
        for before, after in zip([3, *channels], channels, strict=False):
            self.stages.append(nn.Sequential(
                nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
                OPS.make(downsample or {"type": "BlurPool"}, at="downsample")))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features, levels = images, []
        for stage in self.stages:
            features = stage(features)
            levels.append(features)
        return tuple(levels[1:])                                                # the first is at stride 2
