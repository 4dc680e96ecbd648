"""What the kernels of the RoI ops share: reading a RoI, and rounding it."""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_rois(rois_ptr, roi, wanted, batch):
    """Image and corners x1, y1, x2, y2 of each RoI, and whether it is sound: wanted, finite, and of an image of the batch. Others get
    image 0."""
    image = tl.load(rois_ptr + roi * 5, mask=wanted, other=-1)
    x1 = tl.load(rois_ptr + roi * 5 + 1, mask=wanted, other=0)
    y1 = tl.load(rois_ptr + roi * 5 + 2, mask=wanted, other=0)
    x2 = tl.load(rois_ptr + roi * 5 + 3, mask=wanted, other=0)
    y2 = tl.load(rois_ptr + roi * 5 + 4, mask=wanted, other=0)
    reach = tl.abs(x1) + tl.abs(y1) + tl.abs(x2) + tl.abs(y2)
    sound = wanted & (image >= 0) & (image < batch) & (reach < float("inf"))
    return tl.where(sound, image, 0).to(tl.int64), x1, y1, x2, y2, sound


@triton.jit
def round_half_away(values):
    """The nearest whole numbers, halves away from 0."""
    whole = _trunc(values)
    return whole + _trunc((values - whole) * 2)


@triton.jit
def _trunc(values):
    return tl.where(values < 0, tl.ceil(values), tl.floor(values))
