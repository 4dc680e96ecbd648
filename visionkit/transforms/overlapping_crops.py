"""Images to grids of overlapping crops, on the model's device (contrastive predictive coding, van den Oord et al. 2018,
arXiv:1807.03748, sec. 3.3)."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.registry import TRANSFORMS

# B images of H x W, R x C crops of P x P


@TRANSFORMS.register_module()
class OverlappingCrops(nn.Module):
    """Crops on a regular grid, in the order of reading; what is left of the image beyond the last whole one is not used.

    In training each crop may be made harder: cut smaller at a place of its own, so that edges do not run on from crop to crop, and robbed
    of two of its colours, whose shift against each other tells the place in the picture (chromatic aberration; Doersch et al. 2015,
    arXiv:1505.05192, sec. 3.1). Draws are from torch's global generator. In evaluation mode nothing is drawn: the smaller crop is the
    middle one, and colours stay.

    Args:
        size: P, pixels; 64 in the paper.
        stride: pixels from one crop to the next; half of `size` in the paper.
        subcrop: side of the part of each crop that is kept, put in the middle of zeros; 60 in the paper. None keeps all.
        gray_prob: that an image loses its colours; all three channels become their mean. With 1 it does in evaluation mode too.
        color_drop_prob: that a crop keeps only one channel; the others become Gaussian noise with a hundredth of its standard deviation.

    Raises:
        ValueError: a size, stride or probability makes no sense.
    """

    def __init__(self, size: int = 64, stride: int = 32, subcrop: int | None = None, gray_prob: float = 0.0,
                 color_drop_prob: float = 0.0) -> None:
        super().__init__()
        if size < 1 or stride < 1 or not 0 < (subcrop or size) <= size:
            raise ValueError(f"size and stride are at least 1, and subcrop within 1 and size; got {size}, {stride} and {subcrop}")
        if not 0 <= gray_prob <= 1 or not 0 <= color_drop_prob <= 1:
            raise ValueError(f"gray_prob and color_drop_prob lie within 0 and 1; got {gray_prob} and {color_drop_prob}")
        self.size = size
        self.stride = stride
        self.subcrop = subcrop or size
        self.gray_prob = gray_prob
        self.color_drop_prob = color_drop_prob

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, R, C, 3, P, P].

        Raises:
            ValueError: not one crop fits into the images.
        """
        height, width = images.shape[2:]
        if min(height, width) < self.size:
            raise ValueError(f"crops of {self.size} pixels do not fit into images of {(height, width)}; take larger images or a smaller "
                             f"size")
        if self.gray_prob == 1:
            images = images.mean(1, keepdim=True).expand_as(images)
        elif self.training and self.gray_prob:
            images = torch.where(_chance(images, (len(images), 1, 1, 1), self.gray_prob), images.mean(1, keepdim=True), images)
        crops = images.unfold(2, self.size, self.stride).unfold(3, self.size, self.stride).permute(0, 2, 3, 1, 4, 5)      # a view
        if self.subcrop < self.size:
            crops = self.middle_of_zeros(crops)
        return self.drop_colors(crops) if self.training and self.color_drop_prob else crops

    def middle_of_zeros(self, crops: Tensor) -> Tensor:
        """A part of each of `crops` [B, R, C, 3, P, P], in the middle of a crop of zeros."""
        spare = self.size - self.subcrop
        if self.training:
            corners = torch.randint(spare + 1, (*crops.shape[:3], 2), device=crops.device)                                # top, left
        else:
            corners = torch.full((*crops.shape[:3], 2), spare // 2, device=crops.device)
        rows, columns = (corners[..., None] + torch.arange(self.subcrop, device=crops.device)).unbind(-2)                  # [B, R, C, S]
        kept = crops.take_along_dim(rows[..., None, :, None], -2).take_along_dim(columns[..., None, None, :], -1)
        return F.pad(kept, (spare // 2, spare - spare // 2) * 2)

    def drop_colors(self, crops: Tensor) -> Tensor:
        """Noise in two channels of some of `crops` [B, R, C, 3, P, P]."""
        shape = crops.shape[:3]
        kept = torch.randint(3, (*shape, 1, 1, 1), device=crops.device)
        others = torch.arange(3, device=crops.device)[:, None, None] != kept                                            # [B, R, C, 3, 1, 1]
        spread = crops.take_along_dim(kept, 3).std((3, 4, 5), correction=0, keepdim=True) / 100
        dropped = others & _chance(crops, (*shape, 1, 1, 1), self.color_drop_prob)
        return torch.where(dropped, torch.randn_like(crops) * spread, crops)

    def extra_repr(self) -> str:
        return (f"size={self.size}, stride={self.stride}, subcrop={self.subcrop}, gray_prob={self.gray_prob}, "
                f"color_drop_prob={self.color_drop_prob}")


def _chance(like: Tensor, shape: tuple[int, ...], prob: float) -> Tensor:
    return torch.rand(shape, device=like.device) < prob
