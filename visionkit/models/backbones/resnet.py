"""Residual networks (He et al. 2015, arXiv:1512.03385), with the parameter names of torchvision's checkpoints."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from visionkit.models.backbones.pretrained import Trunk
from visionkit.ops import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack
from visionkit.ops.checkpointing import Checkpointing, run_blocks
from visionkit.registry import BACKBONES, OPS

_OFFSET_BRANCH = ".conv2.conv_offset"                        # of a deformable block
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that keeps its statistics and is never trained."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.requires_grad_(False)
        self.training = False

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        return super().train(False)

    def after(self, conv: nn.Conv2d | DeformConv2dPack | ModulatedDeformConv2dPack, x: Tensor) -> Tensor:
        """The norm of `conv(x)`, as one convolution with weights scaled by the norm: no feature map between the two is computed or kept."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        if not isinstance(conv, nn.Conv2d):                             # the same weights, so that zero offsets give the same to the bit
            return functional_call(conv, {"weight": conv.weight * scale[:, None, None, None], "bias": shift}, (x,))
        return _ScaledConv.apply(x, conv.weight, scale, shift, conv.stride, conv.padding, conv.dilation)


class _ScaledConv(torch.autograd.Function):
    """A convolution whose output channels are scaled through its weights, which are scaled again for the backward pass rather than kept."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, stride: Sequence[int], padding: Sequence[int],
                dilation: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        ctx.geometry = (stride, padding, dilation)
        return F.conv2d(x, weight * scale[:, None, None, None], shift, stride, padding, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        wanted, scale = (*ctx.needs_input_grad[:2], False), scale[:, None, None, None]
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(        # in the type of the output, which autocast may have chosen
            grad, x.to(grad.dtype), (weight * scale).to(grad.dtype), None, *ctx.geometry, False, [0, 0], 1, wanted)
        return (of_x.to(x.dtype) if wanted[0] else None, of_weight.to(weight.dtype).mul_(scale) if wanted[1] else None, *[None] * 5)


_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": lambda channels: nn.GroupNorm(32, channels),
}


class BlockStyle(NamedTuple):
    """What the blocks of a stage have in common."""
    dilation: int                               # of the 3x3 convolutions, the stage's first one aside
    norm: Callable[[int], nn.Module]
    dcn: Mapping | None = None                  # what the deformable convolution is, where the stage has one
    stride_in_1x1: bool = False
    in_place: bool = True                       # what a convolution gave may be overwritten

    def conv3x3(self, channels: int, stride: int, dilation: int) -> nn.Module:
        """The 3x3 convolution that may be deformable."""
        if self.dcn is None:
            return nn.Conv2d(channels, channels, 3, stride, dilation, dilation, bias=False)
        conv = OPS.make(self.dcn, at="dcn", in_channels=channels, out_channels=channels, kernel_size=3, stride=stride,
                        padding=dilation, dilation=dilation, bias=False)
        if isinstance(conv, DeformConv2d):
            raise ValueError("a block gives its deformable convolution no offsets, which DeformConv2d wants; take DeformConv2dPack, which "
                             "computes its own")
        return conv


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (fig. 5, left); the second may be deformable."""
    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, first_dilation: int, style: BlockStyle) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, first_dilation, first_dilation, bias=False)
        self.bn1 = style.norm(channels)
        self.conv2 = style.conv3x3(channels, 1, style.dilation)
        self.bn2 = style.norm(channels)
        self.in_place = style.in_place
        self.relu = nn.ReLU(inplace=style.in_place)
        self.downsample = _shortcut(in_channels, channels, stride, style.norm)

    @property
    def last_norm(self) -> nn.Module:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        residual = self.relu(_convolve(self.conv1, self.bn1, x))
        residual = _convolve(self.conv2, self.bn2, residual)
        return self.relu(_add(residual, self.downsample(x), self.in_place))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut (fig. 5, right); the stride is in the 3x3, as in torchvision, or in the first 1x1, as in the paper."""
    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, first_dilation: int, style: BlockStyle) -> None:
        super().__init__()
        in_1x1, in_3x3 = (stride, 1) if style.stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, in_1x1, bias=False)
        self.bn1 = style.norm(channels)
        self.conv2 = style.conv3x3(channels, in_3x3, first_dilation)
        self.bn2 = style.norm(channels)
        self.conv3 = nn.Conv2d(channels, channels * self.expansion, 1, bias=False)
        self.bn3 = style.norm(channels * self.expansion)
        self.in_place = style.in_place
        self.relu = nn.ReLU(inplace=style.in_place)
        self.downsample = _shortcut(in_channels, channels * self.expansion, stride, style.norm)

    @property
    def last_norm(self) -> nn.Module:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        residual = self.relu(_convolve(self.conv1, self.bn1, x))
        residual = self.relu(_convolve(self.conv2, self.bn2, residual))
        residual = _convolve(self.conv3, self.bn3, residual)
        return self.relu(_add(residual, self.downsample(x), self.in_place))


def _add(x: Tensor, y: Tensor, in_place: bool) -> Tensor:
    return x.add_(y) if in_place else x + y


def _shortcut(in_channels: int, out_channels: int, stride: int, norm: Callable[[int], nn.Module]) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return Shortcut(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))


class Shortcut(nn.Sequential):
    """A 1x1 convolution and its norm."""

    def forward(self, x: Tensor) -> Tensor:
        return _convolve(*self, x)


def _convolve(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, FrozenBatchNorm2d) and type(conv) in (nn.Conv2d, DeformConv2dPack, ModulatedDeformConv2dPack):
        return norm.after(conv, x)
    return norm(conv(x))


@BACKBONES.register_module()
class ResNet(Trunk):
    """ResNet without its classifier.

    Stages are counted as in the detection papers: stage 1 is the stem, stages 2 to 5 the residual stages C2 to C5.

    Args:
        depth: 18, 34, 50 or 101.
        out_stages: the stages whose output is returned, of 2 to 5, ascending; those beyond the last are not built.
        frozen_stages: stages 1 to this one are not trained and keep their normalisation statistics; 0: all are trained.
        norm: `BN`, `FrozenBN` (statistics and affine parameters as loaded, never trained) or `GN` (32 groups).
        strides: of stages 2 to 5.
        dilations: of the 3x3 convolutions of stages 2 to 5.
        dilate_first: whether that holds for the first 3x3 convolution of a stage too. Where torchvision puts a dilation in the place of a
            stride, as for DETR's DC5, that one keeps the dilation of the stage before: its input is as fine as ever.
        pretrained: a checkpoint that `init_weights` loads before training, a file or `torchvision://resnet50`, of this network alone or of
            any model with one; it must hold every weight, see `load_part`.
        init_cfg: the same as `dict(type="Pretrained", checkpoint=..., prefix=...)`, for a checkpoint that holds several such networks.
        zero_init_residual: the last normalisation of each block starts at 0, so that each block starts as the identity
            (Goyal et al. 2017, arXiv:1706.02677, sec. 5.1); for training from scratch.
        dcn: a deformable convolution for the 3x3 of each block (the second one of depths 18 and 34), such as
            `dict(type="DeformConv2dPack", offset_groups=4)` (DCNv1, arXiv:1703.06211) or `ModulatedDeformConv2dPack` (DCNv2,
            arXiv:1811.11168). Offsets start at zero, so DCNv1 starts as the plain network, to the bit; a checkpoint of the plain network
            fits either.
        stage_with_dcn: which of stages 2 to 5 have it.
        stride_in_1x1: stages begin with the stride in the first 1x1 convolution, as in the Caffe models, instead of the 3x3.
        checkpointing: which activations are computed again in the backward pass, less memory for more time: True, `dict(policy="sqrt")`,
            `dict(policy="selective")`, see `visionkit.ops.checkpointing.Checkpointing`. The chain is the blocks of all stages.

    Attributes:
        out_channels: of each returned stage.
        strides: image pixels a feature pixel, of each returned stage.
    """
    optional_weights = (_OFFSET_BRANCH,)                                                     # a plain network's checkpoint has none

    def __init__(self, depth: int, out_stages: Sequence[int] = (2, 3, 4, 5), frozen_stages: int = 0, norm: str = "BN",
                 strides: Sequence[int] = (1, 2, 2, 2), dilations: Sequence[int] = (1, 1, 1, 1), dilate_first: bool = True,
                 pretrained: str | None = None, zero_init_residual: bool = True, dcn: Mapping | None = None,
                 stage_with_dcn: Sequence[bool] = (False, False, False, False), stride_in_1x1: bool = False,
                 checkpointing: bool | str | Mapping = False, init_cfg: Mapping | None = None) -> None:
        super().__init__(pretrained, init_cfg)
        if depth not in _BLOCKS:
            raise ValueError(f"ResNet comes in depths {', '.join(map(str, _BLOCKS))}; got {depth}")
        if norm not in _NORMS:
            raise ValueError(f"norm must be one of {', '.join(_NORMS)}; got {norm!r}")
        if not out_stages or list(out_stages) != sorted(set(out_stages)) or not set(out_stages) <= {2, 3, 4, 5}:
            raise ValueError(f"out_stages must be ascending numbers of 2 to 5 (C2 to C5), got {tuple(out_stages)}")
        if not 0 <= frozen_stages <= 5:
            raise ValueError(f"frozen_stages must be 0 (none) to 5 (all), got {frozen_stages}")
        if {len(strides), len(dilations), len(stage_with_dcn)} != {4}:
            raise ValueError(f"strides, dilations and stage_with_dcn need one value for each of stages 2 to 5, got {strides}, {dilations} "
                             f"and {stage_with_dcn}")
        if (dcn is not None) != any(stage_with_dcn):
            raise ValueError(f"dcn says what the deformable convolution is and stage_with_dcn where it stands: give both or neither; got "
                             f"dcn={dcn} and stage_with_dcn={tuple(stage_with_dcn)}")
        if any(stage_with_dcn[out_stages[-1] - 1:]):
            raise ValueError(f"stage_with_dcn={tuple(stage_with_dcn)} names a stage beyond the last of out_stages={tuple(out_stages)}, "
                             f"which is not built; clear it, or return that stage")
        if stride_in_1x1 and depth < 50:
            raise ValueError(f"stride_in_1x1 is for depths 50 and 101: the blocks of depth {depth} have no 1x1 convolution")
        block = BasicBlock if depth < 50 else Bottleneck
        self.out_stages = tuple(out_stages)
        self.frozen_stages = frozen_stages
        self.checkpointing = Checkpointing.of(checkpointing)
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = _NORMS[norm](64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        in_place = self.checkpointing.policy != "selective"                                 # it keeps what convolutions gave
        channels, stride, out_channels, out_strides, before = 64, 4, [], [], 1
        stages = zip(range(2, self.out_stages[-1] + 1), _BLOCKS[depth], strides, dilations, stage_with_dcn, strict=False)
        for stage, blocks, stage_stride, dilation, deformable in stages:                   # no further than needed
            style = BlockStyle(dilation, _NORMS[norm], dcn if deformable else None, stride_in_1x1, in_place)
            width = 64 * 2 ** (stage - 2)
            layers = []
            for index in range(blocks):
                first_stride, first_dilation = (1, dilation) if index else (stage_stride, dilation if dilate_first else before)
                layers.append(block(channels, width, first_stride, first_dilation, style))
                channels = width * block.expansion
            before = dilation
            setattr(self, f"layer{stage - 1}", nn.Sequential(*layers))
            stride *= stage_stride
            if stage in self.out_stages:
                out_channels.append(channels)
                out_strides.append(stride)
        self.out_channels = tuple(out_channels)
        self.strides = tuple(out_strides)
        self._initialise(zero_init_residual)
        for module in self._frozen():
            module.requires_grad_(False)
        self.register_load_state_dict_pre_hook(_fit_plain_checkpoint)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, H, W] to one [B, C_i, H / s_i, W / s_i] for each of `out_stages`; sizes are rounded up."""
        x = self.maxpool(self.relu(_convolve(self.conv1, self.bn1, images)))
        blocks, last = [], []                                                                # of all stages; the last ones of those wanted
        for stage in range(2, self.out_stages[-1] + 1):
            blocks += getattr(self, f"layer{stage - 1}")
            if stage in self.out_stages:
                last.append(len(blocks) - 1)
        return run_blocks(blocks, x, checkpointing=self.checkpointing, outputs_of=last)

    def train(self, mode: bool = True) -> ResNet:
        super().train(mode)
        for module in self._frozen():
            module.train(False)
        return self

    def _frozen(self) -> list[nn.Module]:
        stem = [self.conv1, self.bn1] if self.frozen_stages >= 1 else []
        return stem + [getattr(self, f"layer{stage - 1}") for stage in range(2, min(self.frozen_stages, self.out_stages[-1]) + 1)]

    def _initialise(self, zero_init_residual: bool) -> None:
        frozen = {block for stage in self._frozen() for block in stage.modules()}
        for name, module in self.named_modules():
            if name.endswith(_OFFSET_BRANCH):
                continue                                                                     # zero, as the deformable convolution made it
            if isinstance(module, nn.Conv2d | DeformConv2dPack | ModulatedDeformConv2dPack):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock | Bottleneck) and zero_init_residual and module not in frozen \
                    and not isinstance(module.last_norm, FrozenBatchNorm2d):                 # a zero that is not trained would stay
                nn.init.zeros_(module.last_norm.weight)


def _fit_plain_checkpoint(module: ResNet, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """A classification checkpoint loads strictly: its last layer, and stages beyond the last one returned, are not part of a backbone, and
    a network without any offset branch is one whose offsets are zero."""
    beyond = tuple(f"{prefix}layer{stage - 1}." for stage in range(module.out_stages[-1] + 1, 6))
    for key in [key for key in state_dict if key.startswith((f"{prefix}fc.", *beyond))]:
        del state_dict[key]
    if not any(f"{_OFFSET_BRANCH}." in key for key in state_dict if key.startswith(prefix)):
        branches = {prefix + key: torch.zeros_like(value) for key, value in module.state_dict().items() if f"{_OFFSET_BRANCH}." in key}
        state_dict.update(branches)
