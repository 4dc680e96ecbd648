"""Position-sensitive RoIAlign on CUDA: the kernel of RoIAlign, each of whose cells reads rows of its own bin."""
from __future__ import annotations

import torch
from torch import Tensor

from visionkit.ops.score_maps import ScoreMapTable
from visionkit.ops.triton.roi_align import launch


def forward(input: Tensor, rois: Tensor, rows: int, columns: int, spatial_scale: float, sampling_ratio: int, bin_major: bool) -> Tensor:
    """As `visionkit::ps_roi_align`."""
    layout = ScoreMapTable.of(input, rows * columns, bin_major=bin_major)
    cells = input.new_empty(len(rois), rows, columns, layout.classes)
    _launch(cells, layout.fill(input, input.dtype), layout, rois, spatial_scale, sampling_ratio, backward=False)
    return cells.permute(0, 3, 1, 2).contiguous()


def backward(grad: Tensor, rois: Tensor, batch: int, height: int, width: int, spatial_scale: float, sampling_ratio: int, bin_major: bool,
             channels_last: bool) -> Tensor:
    """As `visionkit::ps_roi_align_backward`."""
    _, classes, rows, columns = grad.shape
    shape = torch.Size((batch, classes * rows * columns, height, width))
    layout = ScoreMapTable(shape, rows * columns, channels_last=channels_last, bin_major=bin_major)
    table = grad.new_zeros(layout.rows, classes, dtype=torch.float32)
    _launch(grad.permute(0, 2, 3, 1).contiguous(), table, layout, rois, spatial_scale, sampling_ratio, backward=True)
    return layout.unfill(table, grad.dtype)


def _launch(cells: Tensor, table: Tensor, layout: ScoreMapTable, rois: Tensor, spatial_scale: float, sampling_ratio: int, *,
            backward: bool) -> None:
    levels = torch.zeros(len(rois), dtype=torch.int64, device=rois.device)
    launch(cells, [table], layout.batch, [(layout.height, layout.width)], rois, levels, [spatial_scale], sampling_ratio, aligned=True,
           backward=backward, bins=layout.bins, bin_step=layout.bin_step, pixel_step=layout.pixel_step)
