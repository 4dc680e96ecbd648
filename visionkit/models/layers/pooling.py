"""What an image's features are on average, whatever form they have."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from visionkit.structures import PackedSequence

# B images, C channels


def global_mean(features: Tensor | PackedSequence, valid: Tensor | None = None) -> Tensor:
    """The mean over an image's locations or tokens, [B, C].

    Args:
        features: [B, C, h, w], or [B, C] that is averaged already, or tokens [T, C] or [T, m, C] of images in a packed sequence.
        valid: [B, H, W] bool, true on the image and false on its padding, for a map; by default all is image. Tokens have none.
    """
    if isinstance(features, PackedSequence):
        means = features.mean()
        return means if means.ndim == 2 else means.mean(1)
    if features.dim() == 4 and valid is not None:
        share = F.interpolate(valid[:, None].to(features), size=features.shape[2:], mode="area")              # [B, 1, h, w]
        return (features * share).sum((2, 3)) / share.sum((2, 3))
    return features.mean((2, 3)) if features.dim() == 4 else features
