"""Where the filters of a deformable network look (Dai et al. 2017, arXiv:1703.06211, fig. 5 and 6, table 2)."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from torch import Tensor, nn

from visionkit.models.base import Model
from visionkit.ops import DeformConv2dPack, ModulatedDeformConv2dPack
from visionkit.registry import ConfigError
from visionkit.structures import Sample
from visionkit.visualization.draw import enlarge

AREAS = ("small", "medium", "large", "background")

# G offset groups, T taps of a kernel, h x w the map that a layer makes


class Taps(NamedTuple):
    """Where the taps of one deformable layer read, for one image."""
    name: str
    locations: Tensor           # [h, w, G, kernel rows, kernel columns, 2] x and y in pixels of the layer's input map, (0, 0) its first
    stride: float               # pixels of the network's input from one pixel of the layer's input map to the next
    out_stride: float           # likewise of the map that it makes


@torch.no_grad()
def taps_of(model: Model, packed: Mapping[str, Any]) -> list[Taps]:
    """The taps of every deformable layer of `model` on one image, in the order in which they run.

    Args:
        model: in evaluation mode.
        packed: one image, as PackSample gives it.

    Raises:
        ConfigError: the model has no deformable convolution with offsets of its own.
    """
    layers = {module: name for name, module in model.named_modules() if isinstance(module, (DeformConv2dPack, ModulatedDeformConv2dPack))}
    if not layers:
        raise ConfigError("the model has no deformable convolution; set dcn and stage_with_dcn of its backbone", ("model", "backbone"))
    seen: list[tuple[nn.Module, tuple[int, int], Tensor]] = []
    hooks = [layer.conv_offset.register_forward_hook(
        lambda _, inputs, output, layer=layer: seen.append((layer, inputs[0].shape[2:], output[0]))) for layer in layers]
    try:
        data = model.data_preprocessor(pseudo_collate([dict(packed)]), training=False)
        model(**data, mode="tensor")
    finally:
        for hook in hooks:
            hook.remove()
    height = data["images"].tensor.shape[2]
    return [Taps(layers[layer], tap_locations(layer, output), 2.0 ** round(np.log2(height / size[0])),
                 2.0 ** round(np.log2(height / output.shape[1]))) for layer, size, output in seen]


def tap_locations(layer: nn.Module, branch: Tensor) -> Tensor:
    """[h, w, G, kernel rows, kernel columns, 2] x and y of each tap, in pixels of the layer's input map.

    Args:
        layer: a deformable convolution with a branch for its offsets.
        branch: [C, h, w] what that branch gives for one image.
    """
    rows, columns = layer.weight.shape[2:]
    per_group = (3 if isinstance(layer, ModulatedDeformConv2dPack) else 2) * rows * columns
    groups, (height, width) = len(branch) // per_group, branch.shape[1:]
    offsets = branch[:2 * groups * rows * columns].float().cpu().view(groups, rows, columns, 2, height, width)                 # dy, dx
    (stride_y, stride_x), (pad_y, pad_x), (step_y, step_x) = (
        (value, value) if isinstance(value, int) else value for value in (layer.stride, layer.padding, layer.dilation))
    y = torch.arange(height)[:, None] * stride_y - pad_y + torch.arange(rows) * step_y                                       # [h, rows]
    x = torch.arange(width)[:, None] * stride_x - pad_x + torch.arange(columns) * step_x                                     # [w, columns]
    moved = offsets.permute(4, 5, 0, 1, 2, 3).clone()
    moved[..., 0] += y[:, None, None, :, None]
    moved[..., 1] += x[None, :, None, None, :]
    return moved.flip(-1)


def stacked_locations(layers: Sequence[Taps], at: tuple[float, float]) -> Tensor:
    """What one output pixel of the last of `layers` reads through all of them: three layers of 9 taps read at 9^3 locations.

    A tap lies between pixels; the taps below it are those of the nearest one. A tap outside the map reads nothing, and nothing below it.

    Args:
        layers: in the order in which they run.
        at: x and y in pixels of the network's input; the nearest output pixel is taken.

    Returns:
        [N, 2] x and y in pixels of the network's input, where pixel (0, 0) covers 0 to 1.
    """
    points = torch.tensor([at]) - 0.5                        # pixel i of a map with stride s looks at pixel i * s of the input
    last = layers[-1]
    height, width = last.locations.shape[:2]
    limit = torch.tensor([width, height]) - 1
    points = (points / last.out_stride).round().clamp(min=torch.zeros(2), max=limit) * last.out_stride
    for layer in reversed(layers):
        nearest = (points / layer.out_stride).round().long()
        x, y = nearest.unbind(1)
        inside = (x >= 0) & (y >= 0) & (x < layer.locations.shape[1]) & (y < layer.locations.shape[0])
        points = layer.locations[y[inside], x[inside]].reshape(-1, 2) * layer.stride
    return points + 0.5


def draw_sampling(model: Model, packed: Mapping[str, Any], image: np.ndarray, at: tuple[float, float],
                  depth: int = 3) -> tuple[np.ndarray, int]:
    """A picture of what an output pixel of a deformable network reads, and at how many locations.

    Args:
        model: in evaluation mode.
        packed: the image, as PackSample gives it.
        image: uint8 [h, w, 3], RGB, as it is.
        at: x and y in pixels of `image`.
        depth: how many deformable layers, counted from the last, are followed down; fewer where there are not so many.

    Raises:
        ConfigError: the point is not on the image, no layer is asked for, or the model has no deformable convolution.
    """
    height, width = image.shape[:2]
    if not (0 <= at[0] < width and 0 <= at[1] < height):
        raise ConfigError(f"--at names a pixel of the image, 0 to {width - 1} and 0 to {height - 1}; got {at[0]:g} {at[1]:g}")
    if depth < 1:
        raise ConfigError(f"--layers is at least 1, got {depth}")
    scale = torch.tensor(packed["data_samples"].scale_factor)
    locations = stacked_locations(taps_of(model, packed)[-depth:], tuple(((torch.tensor(at) + 0.5) * scale).tolist()))
    return draw_locations(image, locations / scale, (at[0] + 0.5, at[1] + 0.5)), len(locations)


def draw_locations(image: np.ndarray, locations: Tensor, at: tuple[float, float]) -> np.ndarray:
    """A copy of `image`, enlarged where it is small, with a dot at each location and a cross at the output pixel.

    Args:
        image: uint8 [h, w, 3], RGB.
        locations: [N, 2] x and y, pixels of `image`.
        at: of the output pixel, likewise.
    """
    canvas, scale = enlarge(image, 480)
    canvas = np.ascontiguousarray(canvas)
    radius = max(2, round(max(canvas.shape[:2]) / 250))
    for x, y in (locations * scale).round().long().tolist():
        cv2.circle(canvas, (x, y), radius, (230, 40, 40), cv2.FILLED, cv2.LINE_AA)
    centre = tuple(round(side * scale) for side in at)
    for thickness, color in ((4, (255, 255, 255)), (2, (30, 120, 30))):
        cv2.drawMarker(canvas, centre, color, cv2.MARKER_CROSS, 6 * radius, thickness, cv2.LINE_AA)
    return canvas


def effective_dilation(locations: Tensor) -> Tensor:
    """[h, w] the mean distance of neighbouring taps, horizontally and vertically, over all groups, in pixels of the layer's input map.

    Args:
        locations: [h, w, G, kernel rows, kernel columns, 2].
    """
    across = (locations[..., :, 1:, :] - locations[..., :, :-1, :]).norm(dim=-1).flatten(2)
    down = (locations[..., 1:, :, :] - locations[..., :-1, :, :]).norm(dim=-1).flatten(2)
    return torch.cat([across, down], 2).mean(2)


def areas_of_filters(layer: Taps, sample: Sample, bounds: tuple[float, float]) -> Tensor:
    """[h, w] what lies under the centre of each filter: an index into `AREAS`, by the smallest object around it; -1 on padding.

    Args:
        layer: whose filters.
        sample: with `annotations` in pixels of the original image.
        bounds: sides of the square from which on an object is medium, and large, pixels of the original image.
    """
    height, width = layer.locations.shape[:2]
    y, x = torch.meshgrid(torch.arange(height) * layer.out_stride + 0.5, torch.arange(width) * layer.out_stride + 0.5, indexing="ij")
    scale_x, scale_y = sample.scale_factor
    areas = torch.full((height, width), AREAS.index("background"))
    by_size = sorted(sample.annotations, key=lambda one: -(one["bbox"][2] - one["bbox"][0]) * (one["bbox"][3] - one["bbox"][1]))
    for one in by_size:                                      # the smallest last, on top
        x1, y1, x2, y2 = one["bbox"]
        inside = (x >= x1 * scale_x) & (x < x2 * scale_x) & (y >= y1 * scale_y) & (y < y2 * scale_y)
        areas[inside] = sum((x2 - x1) * (y2 - y1) >= bound**2 for bound in bounds)
    areas[(y >= sample.img_shape[0]) | (x >= sample.img_shape[1])] = -1
    return areas


def dilation_table(model: Model, samples: Iterable[Mapping[str, Any]],
                   bounds: tuple[float, float] = (32, 96)) -> dict[str, dict[str, tuple[float, float, int]]]:
    """The effective dilation of each deformable layer by what its filters look at, as in table 2 of the paper.

    Args:
        model: in evaluation mode.
        samples: images as PackSample gives them, with annotations.
        bounds: see `areas_of_filters`; by default COCO's.

    Returns:
        for each layer, for each of `AREAS` that occurs: mean, standard deviation and number of filters.
    """
    sums: dict[str, Tensor] = {}
    for packed in samples:
        for layer in taps_of(model, packed):
            dilation, areas = effective_dilation(layer.locations).double(), areas_of_filters(layer, packed["data_samples"], bounds)
            powers = torch.stack([dilation, dilation.square(), torch.ones_like(dilation)])
            moments = torch.stack([powers[:, areas == index].sum(1) for index in range(len(AREAS))])                        # [4, 3]
            sums[layer.name] = sums.get(layer.name, 0) + moments
    table = {}
    for name, moments in sums.items():
        table[name] = {}
        for area, (total, squares, count) in zip(AREAS, moments.tolist(), strict=True):
            if count:
                mean = total / count
                table[name][area] = (mean, max(squares / count - mean**2, 0.0) ** 0.5, int(count))
    return table


def table_lines(table: Mapping[str, Mapping[str, tuple[float, float, int]]]) -> str:
    """`dilation_table` for people: a line a layer, mean and standard deviation an area."""
    width = max(len("layer"), *map(len, table))
    lines = [f" {'layer':<{width}}" + "".join(f"  {area:>13}" for area in AREAS)]
    for name, areas in table.items():
        cells = [f"{areas[area][0]:.2f} ± {areas[area][1]:.2f}" if area in areas else "-" for area in AREAS]
        lines.append(f" {name:<{width}}" + "".join(f"  {cell:>13}" for cell in cells))
    return "\n".join(lines)
