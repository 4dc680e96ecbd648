"""Downsampling that does not alias (Zhang 2019, arXiv:1904.11486)."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.registry import OPS


@torch.library.custom_op("starter::blur_pool", mutates_args=())
def blur_pool(features: Tensor) -> Tensor:
    """Blur with the binomial filter (1, 2, 1) x (1, 2, 1) / 16 and keep every second pixel.

    Args:
        features: [B, C, H, W]; outside of it is 0.

    Returns:
        [B, C, ceil(H / 2), ceil(W / 2)], of the same type.
    """
    return F.conv2d(features, _binomial(features), stride=2, padding=1, groups=features.shape[1])


@blur_pool.register_fake
def _shape(features: Tensor) -> Tensor:
    batch, channels, height, width = features.shape
    return features.new_empty(batch, channels, (height + 1) // 2, (width + 1) // 2)


def _remember(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx, gradient: Tensor) -> Tensor:
    features, = ctx.saved_tensors
    return torch.nn.grad.conv2d_input(features.shape, _binomial(features), gradient, stride=2, padding=1, groups=features.shape[1])


blur_pool.register_autograd(_backward, setup_context=_remember)


def _binomial(features: Tensor) -> Tensor:
    line = features.new_tensor([0.25, 0.5, 0.25])
    return (line[:, None] * line).repeat(features.shape[1], 1, 1, 1)            # [C, 1, 3, 3]


@OPS.register_module()
class BlurPool(nn.Module):
    """`blur_pool` as a module."""

    def forward(self, features: Tensor) -> Tensor:
        return blur_pool(features)
