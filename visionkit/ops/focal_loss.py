"""Focal loss (Lin et al. 2017, arXiv:1708.02002, eq. 5): cross entropy in which what is classified well counts little.

The loss is computed in pieces that fit in the cache. If a gradient will be wanted, the slope of the loss comes with it, since both are made
of the same logarithms and exponentials; it is all that is kept for backward.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.registry import OPS

_PIECE = 1 << 17            # logits at a time, on a CPU


def sigmoid_focal_loss(inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "none") -> Tensor:
    """-alpha_t (1 - p_t)^gamma log(p_t) of each logit, each a binary classification of its own.

    Args:
        inputs: logits of any shape and floating type; bfloat16 and float16 are computed in float32.
        targets: 1 where the class is present, 0 where not, in the shape of `inputs` and any type; or a share between.
        alpha: weight of the targets that are 1, in [0, 1]; 1 - alpha that of the others. -1 weighs neither.
        gamma: the larger, the less an easy example counts; 0 is cross entropy.
        reduction: none, mean or sum.

    Returns:
        The loss in the shape and type of `inputs`, or reduced to one number. Differentiable once, in `inputs`.

    Raises:
        ValueError: different shapes or devices, inputs that are not floating-point numbers, targets that require a gradient, or an alpha,
            gamma or reduction outside their range.
    """
    if not inputs.is_floating_point():
        raise ValueError(f"inputs must be floating-point numbers, got {inputs.dtype}")
    if inputs.shape != targets.shape:
        raise ValueError(f"each logit needs one target, got inputs {list(inputs.shape)} and targets {list(targets.shape)}; "
                         f"class numbers become targets through F.one_hot")
    if inputs.device != targets.device:
        raise ValueError(f"inputs are on {inputs.device}, targets on {targets.device}; move one")
    if targets.requires_grad:
        raise ValueError("targets require a gradient, which the focal loss does not have; detach them")
    if not 0 <= alpha <= 1 and alpha != -1:
        raise ValueError(f"alpha must lie in [0, 1], or be -1 for no weighting; got {alpha}")
    if gamma < 0:
        raise ValueError(f"gamma must not be negative, got {gamma}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    with_slope = inputs.requires_grad and torch.is_grad_enabled()
    loss, _ = torch.ops.visionkit.sigmoid_focal_loss(inputs, targets, alpha, gamma, with_slope)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


@OPS.register_module()
class SigmoidFocalLoss(nn.Module):
    """`sigmoid_focal_loss` with its settings kept."""

    def __init__(self, alpha: float = 0.25, gamma: float = 2, reduction: str = "none") -> None:
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma
        self.reduction = reduction

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return sigmoid_focal_loss(inputs, targets, self.alpha, self.gamma, self.reduction)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}"


@torch.library.custom_op("visionkit::sigmoid_focal_loss", mutates_args=())
def _sigmoid_focal_loss(inputs: Tensor, targets: Tensor, alpha: float, gamma: float, with_slope: bool) -> tuple[Tensor, Tensor]:
    """The loss and its slope in each logit, both in the shape of `inputs`; the slope is empty without `with_slope`.

    The slope is in float32 at least: in float16 those of easy examples would be 0 before a scaled gradient reaches them.
    """
    loss, slope = _empty_results(inputs, with_slope)
    size = _PIECE if inputs.is_cpu else max(inputs.numel(), 1)
    pieces = [tensor.reshape(-1).split(size) for tensor in (inputs, targets, loss, slope if with_slope else loss)]
    for x, t, loss_piece, slope_piece in zip(*pieces, strict=True):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        t = t.to(x.dtype)
        p, not_p = x.sigmoid(), x.neg().sigmoid_()                          # 1 - p would not be exact where it is small
        cross_entropy = torch.addcmul(x.clamp(min=0), x, t, value=-1).add_(F.softplus(x.abs().neg_()))
        wrong = torch.lerp(p, not_p, t)                                     # 1 - p_t
        weight = wrong.pow(gamma)
        if alpha >= 0:
            weight.mul_((t * (2 * alpha - 1)).add_(1 - alpha))              # alpha_t
        torch.mul(cross_entropy, weight, out=loss_piece)
        if with_slope:
            error = torch.lerp(p, not_p.neg(), t)                           # p - t, the slope of the cross entropy
            # of the weight: gamma (1 - p_t)^(gamma - 1) times the slope (1 - 2t) p (1 - p) of 1 - p_t
            focus = p.mul_(not_p).div_(wrong.clamp_(min=torch.finfo(p.dtype).tiny)).mul_(cross_entropy).mul_(gamma)
            torch.mul(error.add_(focus).addcmul_(focus, t, value=-2), weight, out=slope_piece)
    return loss, slope


@_sigmoid_focal_loss.register_fake
def _(inputs: Tensor, targets: Tensor, alpha: float, gamma: float, with_slope: bool) -> tuple[Tensor, Tensor]:
    return _empty_results(inputs, with_slope)


def _empty_results(inputs: Tensor, with_slope: bool) -> tuple[Tensor, Tensor]:
    loss = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    slope = loss.new_empty(inputs.shape if with_slope else 0, dtype=torch.promote_types(inputs.dtype, torch.float32))
    return loss, slope


@torch.library.custom_op("visionkit::sigmoid_focal_loss_backward", mutates_args=())
def _sigmoid_focal_loss_backward(grad: Tensor, slope: Tensor) -> Tensor:
    """An op of its own so that a second derivative is an error."""
    return (grad * slope).to(grad.dtype)


@_sigmoid_focal_loss_backward.register_fake
def _(grad: Tensor, slope: Tensor) -> Tensor:
    return torch.empty_like(slope, dtype=grad.dtype)


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)                                        # no zeros for the slope, which nobody differentiates


def _backward(ctx, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None, None]:
    if grad is None:
        return None, None, None, None, None
    return torch.ops.visionkit.sigmoid_focal_loss_backward(grad, *ctx.saved_tensors), None, None, None, None


_sigmoid_focal_loss.register_autograd(_backward, setup_context=_save_for_backward)
