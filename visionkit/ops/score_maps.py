"""Position-sensitive score maps (Dai et al. 2016, R-FCN, arXiv:1605.06409, sec. 2): K maps for each class, one for each bin of a grid.

As a table, each row holds all classes at one pixel for one bin, so that a bin reads whole rows.
"""
from __future__ import annotations

import torch
from torch import Tensor

# B images, C classes, K = P * Q bins of P rows and Q columns, H x W pixels


class ScoreMapTable:
    """Where the scores of each bin and pixel stand in a table [B * K * H * W, C], and the way there and back.

    Maps that lie pixel by pixel in bin-major order are such a table already; all others are copied, bin by bin.
    """

    def __init__(self, shape: torch.Size, bins: int, *, channels_last: bool, bin_major: bool) -> None:
        self.batch, channels, self.height, self.width = shape
        self.bins, self.classes, self.pixels = bins, channels // bins, self.height * self.width
        self.bin_major, self.channels_last = bin_major, channels_last
        # rows in the order [B, H * W, K] of channels-last maps, else [B, K, H * W]
        self.bin_step, self.pixel_step = (1, bins) if channels_last else (self.pixels, 1)
        self.rows = self.batch * bins * self.pixels

    @classmethod
    def of(cls, input: Tensor, bins: int, *, bin_major: bool) -> ScoreMapTable:
        channels_last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
        return cls(input.shape, bins, channels_last=channels_last, bin_major=bin_major)

    def fill(self, input: Tensor, working: torch.dtype | None = None) -> Tensor:
        """Maps [B, K * C, H, W] as the table, in the type `working`; by default in their own, but float32 at least."""
        working = working or torch.promote_types(input.dtype, torch.float32)
        if self.channels_last and not self.bin_major:
            input = torch.channel_shuffle(input, self.classes)              # made for this: twice as fast as a general copy
        if self.channels_last:
            return input.permute(0, 2, 3, 1).to(working).contiguous().view(self.rows, self.classes)
        order = (0, 1, 3, 2) if self.bin_major else (0, 2, 3, 1)
        split = (self.bins, self.classes) if self.bin_major else (self.classes, self.bins)
        return input.to(working).reshape(self.batch, *split, self.pixels).permute(order).contiguous().view(self.rows, self.classes)

    def unfill(self, table: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `fill`."""
        channels, size = self.bins * self.classes, (self.height, self.width)
        if self.channels_last:
            maps = table.to(dtype).view(self.batch, *size, channels).permute(0, 3, 1, 2)
            return maps if self.bin_major else torch.channel_shuffle(maps, self.bins).contiguous(memory_format=torch.channels_last)
        maps = table.to(dtype).view(self.batch, self.bins, self.pixels, self.classes)
        maps = maps.permute(0, 1, 3, 2) if self.bin_major else maps.permute(0, 3, 1, 2)
        return maps.reshape(self.batch, channels, *size)

    def first_rows(self, images: Tensor) -> Tensor:
        """[K, R] table row of the first pixel of each bin, for RoIs of the images [R]."""
        bins = torch.arange(self.bins, dtype=images.dtype, device=images.device) * self.bin_step
        return images * (self.bins * self.pixels) + bins[:, None]


def check_score_maps(op: str, input: Tensor, rows: int, columns: int) -> None:
    """Raise a ValueError unless `input` [B, channels, H, W] has a map for each class and bin."""
    bins = rows * columns
    if input.shape[1] % bins:
        raise ValueError(f"{op} with {rows}x{columns} bins needs a multiple of {bins} channels, got {input.shape[1]}; set the channels of "
                         f"the layer before it to num_classes * {bins}")


def cells_by_bin(grad: Tensor) -> Tensor:
    """Gradients [R, C, P, Q] of pooled scores as [K * R, C], float32 at least."""
    rois, classes = grad.shape[:2]
    working = torch.promote_types(grad.dtype, torch.float32)
    return grad.to(working).reshape(rois, classes, -1).permute(2, 0, 1).contiguous().view(-1, classes)


def pooled(bags: Tensor, rois: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[R, C, P, Q] of bags [K * R, C], bin by bin."""
    return bags.view(rows, columns, rois, -1).permute(2, 3, 0, 1).to(dtype, memory_format=torch.contiguous_format).contiguous()
