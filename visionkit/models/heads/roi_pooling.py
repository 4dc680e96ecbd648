"""Feature maps and boxes to a grid of features for each box: what a second stage begins with."""
from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.ops import boxes_to_rois, deform_roi_pool, pyramid_roi_align
from visionkit.registry import HEADS

# B images, R RoIs of all images, C channels, P x P bins a RoI


@HEADS.register_module()
class PyramidRoIAlign(nn.Module):
    """RoIAlign on the pyramid level of each box's size (FPN, arXiv:1612.03144, sec. 4.2).

    Args:
        in_channels: of each pyramid level, all the same.
        strides: of each pyramid level; only levels up to stride 32 are pooled from.
        pool_size: P.
        sampling_ratio: samples a bin along each axis, -1 for as many as the bin has feature pixels.
        finest_size: boxes with sides below twice this many pixels (geometric mean) are pooled from the finest level.

    Attributes:
        out_channels: C.
    """

    def __init__(self, in_channels: Sequence[int], strides: Sequence[int], pool_size: int = 7, sampling_ratio: int = 2,
                 finest_size: float = 56.0) -> None:
        super().__init__()
        if len(set(in_channels)) != 1:
            raise ValueError(f"the box head is shared by all levels and needs the same channels on each, got {tuple(in_channels)}; "
                             f"put a neck before it")
        self.out_channels = in_channels[0]
        self.scales = [1 / stride for stride in strides if stride <= 32]
        self.pool_size = pool_size
        self.sampling_ratio = sampling_ratio
        self.finest_size = finest_size

    def forward(self, features: Sequence[Tensor], boxes: list[Tensor]) -> Tensor:
        """[B, C, h_l, w_l] a level and [R_i, 4] boxes an image, image pixels, to [R, C, P, P] in channels-last memory."""
        rois = boxes_to_rois(boxes)
        return pyramid_roi_align(features[:len(self.scales)], rois, self.level_of(rois[:, 1:]), self.pool_size, self.scales,
                                 self.sampling_ratio)

    def level_of(self, boxes: Tensor) -> Tensor:
        """[R] the pyramid level of each box [R, 4]: finer for smaller boxes (FPN, eq. 1)."""
        side = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1).sqrt()
        return (side / self.finest_size + 1e-6).log2().floor().clamp(0, len(self.scales) - 1).long()


@HEADS.register_module()
class DeformableRoIPooling(nn.Module):
    """RoI pooling whose bins move (Dai et al. 2017, Deformable ConvNets, arXiv:1703.06211, sec. 2.2).

    A 1x1 convolution leaves few channels. Those are pooled with bins in place; of that a fully connected layer computes how far each bin
    moves, and they are pooled again. The layer starts at zero, and learns at a hundredth of the rate: give `offset` an `lr_mult` of 0.01.

    Args:
        in_channels: of each feature map.
        strides: of each feature map; only the last is pooled from.
        pool_size: P.
        reduced_channels: C.
        sampling_ratio: samples a bin along each axis.
        gamma: displacement of an offset of 1, as a part of the box's size.

    Attributes:
        out_channels: C.
    """

    def __init__(self, in_channels: Sequence[int], strides: Sequence[int], pool_size: int = 7, reduced_channels: int = 256,
                 sampling_ratio: int = 4, gamma: float = 0.1) -> None:
        super().__init__()
        self.out_channels = reduced_channels
        self.pool_size = pool_size
        self.scale = 1 / strides[-1]
        self.sampling_ratio = sampling_ratio
        self.gamma = gamma
        self.conv_new = nn.Conv2d(in_channels[-1], reduced_channels, 1)
        self.offset = nn.Linear(reduced_channels * pool_size**2, 2 * pool_size**2)
        nn.init.normal_(self.conv_new.weight, std=0.01)
        for value in (self.conv_new.bias, *self.offset.parameters()):
            nn.init.zeros_(value)

    def forward(self, features: Sequence[Tensor], boxes: list[Tensor]) -> Tensor:
        """[B, C_l, h_l, w_l] a map and [R_i, 4] boxes an image, image pixels, to [R, C, P, P] in channels-last memory."""
        reduced = F.relu(self.conv_new(features[-1]), inplace=True)
        rois = boxes_to_rois(boxes)
        rois[:, 3:] -= 1                                        # the authors' boxes end with their last pixel, ours after it
        in_place = self._pool(reduced, rois, None)
        offset = self.offset(in_place.permute(0, 2, 3, 1).flatten(1)).view(-1, 2, self.pool_size, self.pool_size)
        return self._pool(reduced, rois, offset)

    def _pool(self, reduced: Tensor, rois: Tensor, offset: Tensor | None) -> Tensor:
        return deform_roi_pool(reduced, rois, offset, self.pool_size, self.scale, self.sampling_ratio, self.gamma)
