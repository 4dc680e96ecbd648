"""Where a token stands, as a vector that is added to it: attention alone does not know."""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# B images, h x w positions of a feature map, C channels


def sinusoid(position: Tensor, channels: int, temperature: float = 10000.0) -> Tensor:
    """Sines and cosines of falling frequency (Vaswani et al. 2017, arXiv:1706.03762, sec. 3.5).

    Channel 2i holds sin(position / temperature^(2i / channels)), channel 2i + 1 the cosine of the same.

    Args:
        position: [...], any numbers.
        channels: even.
        temperature: wavelengths reach from 2 pi to 2 pi times this.

    Returns:
        [..., channels], float32, or float64 where the positions are.
    """
    if channels % 2:
        raise ValueError(f"sines and cosines come in pairs and need an even number of channels, got {channels}")
    position = position.to(torch.promote_types(position.dtype, torch.float32))
    exponent = torch.arange(0, channels, 2, device=position.device, dtype=position.dtype) / channels
    angle = position[..., None] / temperature ** exponent
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


class SinePositionEncoding(nn.Module):
    """The sinusoid of y and that of x, for each position of a feature map (DETR, arXiv:2005.12872, appendix A.4).

    Both count from the image's own corner and are divided by its own height and width, so what a batch is padded to makes no difference.

    Args:
        channels: C, divisible by 4: half of them for y, half for x.
        temperature: see `sinusoid`.
        offset: added to the count, which starts at 1, before the division; Deformable DETR takes the middle of a pixel, -0.5.
    """

    def __init__(self, channels: int, temperature: float = 10000.0, offset: float = 0.0) -> None:
        super().__init__()
        if channels % 4:
            raise ValueError(f"y and x have sines and cosines each and need a multiple of 4 channels, got {channels}")
        self.channels = channels
        self.temperature = temperature
        self.offset = offset

    def forward(self, valid: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """[B, h, w] bool, true on the image, false on its padding, to [B, h, w, C] of `dtype`, float32 at least."""
        dtype = torch.promote_types(dtype, torch.float32)
        y, x = (2 * math.pi * (count + self.offset) / (count.amax(axis, keepdim=True) + 1e-6)                   # once around the circle
                for axis, count in ((axis, valid.cumsum(axis, dtype=dtype)) for axis in (1, 2)))
        return torch.cat([sinusoid(y, self.channels // 2, self.temperature), sinusoid(x, self.channels // 2, self.temperature)], -1)


class LearnedPositionEncoding(nn.Module):
    """A learned vector for each column and one for each row, which has the second half of the channels.

    Args:
        channels: C, even.
        size: the most rows and columns that a feature map may have.
    """

    def __init__(self, channels: int, size: int = 50) -> None:
        super().__init__()
        if channels % 2:
            raise ValueError(f"columns and rows share the channels equally and need an even number, got {channels}")
        self.columns = nn.Embedding(size, channels // 2)
        self.rows = nn.Embedding(size, channels // 2)
        nn.init.uniform_(self.columns.weight)
        nn.init.uniform_(self.rows.weight)

    def forward(self, valid: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """As `SinePositionEncoding`; of `valid` only the shape counts.

        Raises:
            ValueError: a feature map with more rows or columns than there are vectors.
        """
        batch, height, width = valid.shape
        if max(height, width) > len(self.rows.weight):
            raise ValueError(f"positions are learned for {len(self.rows.weight)} rows and columns at most, got a feature map of "
                             f"{height}x{width}; train with a larger size, or take sines")
        columns = self.columns.weight[None, :width].expand(height, -1, -1)
        rows = self.rows.weight[:height, None].expand(-1, width, -1)
        return torch.cat([columns, rows], -1).expand(batch, -1, -1, -1).to(torch.promote_types(dtype, torch.float32))
