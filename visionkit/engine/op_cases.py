"""What the ops are measured on, and the peers they are measured against."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionkit.ops import box_iou


@dataclass(frozen=True)
class Case:
    """One op on one set of arguments; all of its peers take the same ones.

    Args:
        op: name in `visionkit.ops`.
        shape: the arguments, for people; no two cases of an op share it.
        make: the arguments by position; floating tensors in float32, those that require a gradient are differentiated.
        bars: times faster than `against`, forward and forward + backward, that ours is to be; on a CPU, in float32.
        megabytes: peak memory over the inputs, forward and forward + backward, that ours is to stay below; likewise. Such a case is
            large, and its memory is all that is measured.
        against: the peer that `bars` speaks of.
        layout: what ours gets in place of the first argument, for a memory layout that a model can emit for free.
        options: further arguments of ours.
    """
    op: str
    shape: str
    make: Callable[[], tuple]
    bars: tuple[float, ...] = ()
    megabytes: tuple[float, ...] = ()
    against: str = "torchvision"
    layout: Callable[[Tensor], Tensor] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self, device: str, dtype: torch.dtype) -> tuple:
        """The same values each time, on `device`, floating tensors as `dtype`."""
        torch.manual_seed(0)
        return tuple(
            value.detach().to(device, dtype if value.is_floating_point() else None).requires_grad_(value.requires_grad)
            if isinstance(value, Tensor) else value for value in self.make())

    def for_ours(self, arguments: tuple) -> tuple:
        """The arguments of ours, from those of the peers; differentiable."""
        return arguments if self.layout is None else (self.layout(arguments[0]), *arguments[1:])


def _maps(channels: int, height: int, width: int) -> Tensor:
    return torch.randn(1, channels, height, width).requires_grad_()


def _bin_major(maps: Tensor) -> Tensor:
    """Score maps whose 7x7 channels of a class lay side by side, as channels (row, column, class) in channels-last memory."""
    return maps.unflatten(1, (-1, 49)).transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)


def _boxes(count: int, height: int, width: int) -> Tensor:
    """[count, 4], spread over an image, 10 pixels to a third of the image wide."""
    corner = torch.rand(count, 2) * torch.tensor([width, height]) * 0.8
    size = 10 + torch.rand(count, 2) * torch.tensor([width, height]) * 0.3
    return torch.cat([corner, corner + size], 1)


def _two_sets_of_boxes(count: int) -> tuple[Tensor, Tensor]:
    return _boxes(count, 800, 1333).requires_grad_(), _boxes(count, 800, 1333)


def _rois(count: int, height: int, width: int) -> Tensor:
    """[count, 5], at a distance from the lower and right border, where torchvision's ps_roi_pool has a wrong gradient."""
    boxes = _boxes(count, height, width)
    boxes[:, 2::2] = boxes[:, 2::2].minimum(torch.tensor([width - 32.0]))
    boxes[:, 3::2] = boxes[:, 3::2].minimum(torch.tensor([height - 32.0]))
    return F.pad(boxes, (1, 0))


def _moved_bins(count: int, height: int, width: int, classes: int = 1) -> tuple[Tensor, Tensor]:
    """RoIs at whole pixels and offsets of their 7x7 bins, all an eighth of a bin: that moves 4x4 samples to where roi_align has them."""
    offset = torch.full((count, 2 * classes, 7, 7), 1 / 8 / 7 / 0.1)
    return _rois(count, height, width).round(), offset.requires_grad_()


def _crowd(count: int, objects: int) -> tuple[Tensor, Tensor]:
    """Boxes [count, 4] and scores as a dense detector gives them: around each of some objects in an image of 800 x 1333."""
    center = torch.rand(objects, 2) * torch.tensor([1333, 800])
    size = 30 + torch.rand(objects, 2) * 200
    which = torch.randint(objects, (count,))
    center, size = center[which] + torch.randn(count, 2) * size[which] * 0.1, size[which] * (torch.randn(count, 2) * 0.15).exp()
    return torch.cat([center - size / 2, center + size / 2], 1), torch.rand(count)


def _between_centers(positions: Tensor) -> Tensor:
    """Positions in pixels, moved a little off the centres: there the gradient jumps, and rounding would decide which side is taken."""
    return positions.floor() + (positions - positions.floor()).clamp(0.01, 0.99)


def _convolution(batch: int, channels: int, height: int, width: int, modulated: bool = False) -> tuple:
    """A 3x3 convolution that keeps channels and size; v2 with `modulated`."""
    maps = torch.randn(batch, channels, height, width).requires_grad_()
    offset = _between_centers(torch.randn(batch, 18, height, width) * 2).requires_grad_()
    weight = (torch.randn(channels, channels, 3, 3) / (3 * channels**0.5)).requires_grad_()
    mask = torch.rand(batch, 9, height, width).requires_grad_() if modulated else None
    return maps, offset, weight, None, 1, 1, 1, mask


def _attention(queries: int | None, sizes: tuple[tuple[int, int], ...], heads: int = 8, points: int = 4, depth: int = 32) -> tuple:
    """Multi-scale deformable attention of the pixels of all levels (an encoder), or of some queries, on those pixels."""
    spatial_shapes = torch.tensor(sizes)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), spatial_shapes.prod(1).cumsum(0)])
    if queries is None:
        centers = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(1) for h, w in sizes]
        reference = torch.cat(centers)
    else:
        reference = torch.rand(queries, 2)
    widths = spatial_shapes.flip(1)[:, None]                                                   # (W, H) of each level
    pixels = reference[None, :, None, None, None] * widths - 0.5 + torch.randn(1, len(reference), heads, len(sizes), points, 2) * 3
    locations = (_between_centers(pixels) + 0.5) / widths
    weights = torch.randn(1, len(reference), heads, len(sizes) * points).softmax(-1).view(1, len(reference), heads, len(sizes), points)
    value = torch.randn(1, int(starts[-1]), heads, depth)
    return value.requires_grad_(), spatial_shapes, starts[:-1], locations.requires_grad_(), weights.requires_grad_()


def _logits_and_targets(count: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, classes).requires_grad_(), (torch.rand(count, classes) < 0.01).float()


LEVELS = ((100, 134), (50, 67), (25, 34), (13, 17))
CASES = (
    Case("deform_conv2d", "v1, 2x64x56x56, 3x3", lambda: _convolution(2, 64, 56, 56), bars=(6, 14)),
    Case("deform_conv2d", "v1, 2x256x28x28, 3x3", lambda: _convolution(2, 256, 28, 28), bars=(3.8, 9.5)),
    Case("deform_conv2d", "v1, 1x512x25x38, 3x3", lambda: _convolution(1, 512, 25, 38), bars=(2.4, 5.8)),
    Case("deform_conv2d", "v2, 2x256x28x28, 3x3", lambda: _convolution(2, 256, 28, 28, modulated=True), bars=(3.2, 9)),
    Case("deform_conv2d", "v1, 2x64x224x224, 3x3", lambda: _convolution(2, 64, 224, 224), megabytes=(120, 220)),
    Case("roi_align", "256 channels of 50x76, 512 RoIs, 7x7, 2x2 samples",
         lambda: (_maps(256, 50, 76), _rois(512, 800, 1216), 7, 1 / 16, 2, True), bars=(12, 20)),
    Case("roi_align", "the same, samples follow the RoI",
         lambda: (_maps(256, 50, 76), _rois(512, 800, 1216), 7, 1 / 16, -1, True)),
    Case("roi_pool", "256 channels of 50x76, 512 RoIs, 7x7", lambda: (_maps(256, 50, 76), _rois(512, 800, 1216), 7, 1 / 16)),
    Case("ps_roi_align", "81*49 channels of 38x50, 300 RoIs, 2x2 samples",
         lambda: (_maps(81 * 49, 38, 50), _rois(300, 608, 800), 7, 1 / 16, 2), bars=(9, 7)),
    Case("ps_roi_align", "the same, bin-major",
         lambda: (_maps(81 * 49, 38, 50), _rois(300, 608, 800), 7, 1 / 16, 2), layout=_bin_major, options={"bin_major": True}),
    Case("ps_roi_pool", "81*49 channels of 38x50, 300 RoIs",
         lambda: (_maps(81 * 49, 38, 50), _rois(300, 608, 800), 7, 1 / 16), bars=(4, 3.5)),
    Case("ps_roi_pool", "the same, bin-major",
         lambda: (_maps(81 * 49, 38, 50), _rois(300, 608, 800), 7, 1 / 16), layout=_bin_major, options={"bin_major": True}),
    Case("ps_roi_pool", "21*49 channels of 38x50, 300 RoIs",
         lambda: (_maps(21 * 49, 38, 50), _rois(300, 608, 800), 7, 1 / 16), bars=(2, 1.3)),
    Case("deform_roi_pool", "256 channels of 50x76, 512 RoIs, 7x7, 4x4 samples",
         lambda: (_maps(256, 50, 76), *_moved_bins(512, 800, 1216), 7, 1 / 16, 4)),
    Case("deform_ps_roi_pool", "21*49 channels of 38x50, 300 RoIs, 4x4 samples",
         lambda: (_maps(21 * 49, 38, 50), *_moved_bins(300, 608, 800, classes=21), 7, 1 / 16, 4)),
    Case("nms", "2,000 boxes around 100 objects, IoU 0.7", lambda: (*_crowd(2000, 100), 0.7), bars=(1,)),
    Case("nms", "20,000 boxes around 500 objects, IoU 0.7", lambda: (*_crowd(20000, 500), 0.7), bars=(3,)),
    Case("nms", "20,000 boxes spread over the image, IoU 0.5", lambda: (_boxes(20000, 800, 1333), torch.rand(20000), 0.5), bars=(3,)),
    Case("batched_nms", "5,000 boxes of 80 classes around 100 objects, IoU 0.5",
         lambda: (*_crowd(5000, 100), torch.randint(80, (5000,)), 0.5)),
    Case("soft_nms", "2,000 boxes around 100 objects", lambda: (*_crowd(2000, 100), 0.5, 0.001)),
    Case("ms_deform_attn", "encoder: 17,821 queries, 4 levels, 4 points, 8 heads x 32", lambda: _attention(None, LEVELS), bars=(6, 2.4),
         against="plain PyTorch"),
    Case("ms_deform_attn", "decoder: 300 queries, otherwise the same", lambda: _attention(300, LEVELS), against="plain PyTorch"),
    Case("box_iou", "1,000 x 1,000 boxes", lambda: _two_sets_of_boxes(1000)),
    Case("generalized_box_iou", "1,000 x 1,000 boxes", lambda: _two_sets_of_boxes(1000)),
    Case("elementwise_generalized_box_iou", "100,000 pairs of boxes", lambda: _two_sets_of_boxes(100_000)),
    Case("sigmoid_focal_loss", "20,000 anchors, 80 classes", lambda: _logits_and_targets(20000, 80)),
)


def peers(op: str) -> dict[str, Callable]:
    """Implementations of `op` that can be imported here, by name; each takes the arguments of ours by position."""
    found = {}
    for name, functions in {"torchvision": _torchvision, "torchvision (plain)": _torchvision_plain, "mmcv": _mmcv,
                            "plain PyTorch": _plain}.items():
        try:
            function = functions().get(op)
        except ImportError:
            continue
        if function is not None:
            found[name] = function
    return found


def _torchvision() -> dict[str, Callable]:
    from torchvision import ops
    names = ("batched_nms", "box_iou", "deform_conv2d", "generalized_box_iou", "nms", "ps_roi_align", "ps_roi_pool", "roi_align",
             "roi_pool", "sigmoid_focal_loss")
    functions = {name: getattr(ops, name) for name in names}
    return {**functions, "elementwise_generalized_box_iou": lambda boxes, others: 1 - ops.generalized_box_iou_loss(boxes, others)}


def _torchvision_plain() -> dict[str, Callable]:
    """For ops that torchvision does not have: the one that does the same without offsets, in boxes that hold the lower right pixel."""
    from torchvision import ops
    inside = torch.tensor([0, 0, 0, 1, 1])

    def deform_roi_pool(input, boxes, offset, output_size, spatial_scale, sampling_ratio):
        return ops.roi_align(input, boxes + inside.to(boxes), output_size, spatial_scale, sampling_ratio, True)

    def deform_ps_roi_pool(input, boxes, offset, output_size, spatial_scale, sampling_ratio):
        return ops.ps_roi_align(input, boxes + inside.to(boxes), output_size, spatial_scale, sampling_ratio)

    return {"deform_roi_pool": deform_roi_pool, "deform_ps_roi_pool": deform_ps_roi_pool}


def _mmcv() -> dict[str, Callable]:
    """Of the full mmcv, with its compiled ops. Its roi_pool and deform_roi_pool read elsewhere, its focal loss takes class numbers."""
    from mmcv import ops
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    def deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask):
        groups = input.shape[1] // weight.shape[1], offset.shape[1] // (2 * weight[0, 0].numel())
        if mask is None and bias is None:
            return ops.deform_conv2d(input, offset, weight, stride, padding, dilation, *groups)
        return ops.modulated_deform_conv2d(input, offset, mask, weight, bias, stride, padding, dilation, *groups)

    def roi_align(input, boxes, output_size, spatial_scale, sampling_ratio, aligned):
        return ops.roi_align(input, boxes, output_size, spatial_scale, max(sampling_ratio, 0), "avg", aligned)

    def nms(boxes, scores, iou_threshold):
        return ops.nms(boxes, scores, iou_threshold)[1]

    def batched_nms(boxes, scores, idxs, iou_threshold):
        return ops.batched_nms(boxes, scores, idxs, {"type": "nms", "iou_threshold": iou_threshold})[1]

    def soft_nms(boxes, scores, sigma, score_threshold):
        rescored, indices = ops.soft_nms(boxes, scores, sigma=sigma, min_score=score_threshold, method="gaussian")
        return indices, rescored[:, 4]

    def ms_deform_attn(*arguments):
        return MultiScaleDeformableAttnFunction.apply(*arguments, 64)

    return {"deform_conv2d": deform_conv2d, "roi_align": roi_align, "nms": nms, "batched_nms": batched_nms, "soft_nms": soft_nms,
            "ms_deform_attn": ms_deform_attn}


def _plain() -> dict[str, Callable]:
    return {"ms_deform_attn": _ms_deform_attn_by_grid_sample, "soft_nms": _soft_nms_by_loop}


def _soft_nms_by_loop(boxes, scores, sigma, score_threshold):
    """Take the best box and lower the scores of the others, until none is left."""
    indices, kept, rescored = torch.arange(len(boxes), device=boxes.device), [], []
    while True:
        high = scores >= score_threshold
        indices, boxes, scores = indices[high], boxes[high], scores[high]
        if not len(scores):
            return torch.stack(kept), torch.stack(rescored)
        best = scores.argmax()
        kept.append(indices[best])
        rescored.append(scores[best])
        scores = scores * torch.exp(-box_iou(boxes[best, None], boxes)[0] ** 2 / sigma)
        scores[best] = -1


def _ms_deform_attn_by_grid_sample(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    """One F.grid_sample a level, then the weighted sum over levels and points: what frameworks without a kernel for a device run."""
    batch, _, heads, depth = value.shape
    queries, levels, points = sampling_locations.shape[1], *sampling_locations.shape[3:5]
    grids = (2 * sampling_locations - 1).transpose(1, 2).flatten(0, 1)                          # [N * M, Q, L, P, 2]
    samples = []
    for level, (height, width) in enumerate(spatial_shapes.tolist()):
        rows = value.narrow(1, int(level_start_index[level]), height * width)                   # [N, H * W, M, D]
        maps = rows.permute(0, 2, 3, 1).reshape(batch * heads, depth, height, width)
        samples.append(F.grid_sample(maps, grids[:, :, level], mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = attention_weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    output = (torch.cat(samples, -1) * weights).sum(-1)                                         # [N * M, D, Q]
    return output.view(batch, heads * depth, queries).transpose(1, 2)
