"""Draw what each sampling op reads: python tools/draw_ops.py

Nothing here computes where an op reads. The weight of each pixel in an output cell comes from the op itself, applied to maps that are 1 in
one pixel each; the sample points come from the op applied to maps that hold the coordinates of their pixels.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INK, GREY, GRID = "#24292f", "#8c959f", "#d8dee4"
BLUES, POINT = ("#ffffff", "#cfe3f7", "#7fb3e3", "#2f74b5", "#0b3f78"), "#e8590c"
BINS = ("#2f74b5", "#e8590c", "#2b8a3e", "#9c36b5", "#c79100", "#0b8a94", "#c2255c", "#6b7a1f", "#5f3dc4")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw what each sampling op reads, as docs/ops.md shows it; the ops themselves tell.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", help="folder for the pictures (default: docs/pictures)")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()                            # before the imports: --help must answer at once
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    arguments.out.mkdir(parents=True, exist_ok=True)
    for draw in (deform_conv2d, roi_align, roi_pool, ps_roi_pool, ps_roi_align, deform_roi_pool, ms_deform_attn):
        figure = draw(plt)
        figure.get_layout_engine().set(h_pad=0.08)
        path = arguments.out / f"{draw.__name__}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)
        print(path)
    return 0


# What the ops tell of themselves. H x W pixels; positions are (x, y) in pixels, 0 being the centre of the first one.

def one_pixel_maps(height: int, width: int):
    """[H * W, H, W]: map p is 1 in pixel p, so what an op makes of it is the weight of pixel p."""
    import torch
    return torch.eye(height * width).view(-1, height, width)


def coordinate_maps(height: int, width: int):
    """[2, H, W]: x and y of each pixel, so what an op makes of them is where it reads, on average; exact inside of the map."""
    import torch
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    return torch.stack([x, y])


def taps_of_convolution(offset, height: int, width: int, row: int, column: int):
    """Weights [H, W] of the pixels and positions [9, 2] of the taps that one output pixel of a 3x3 deformable convolution reads."""
    import torch

    from visionkit.ops import deform_conv2d
    def output(maps, weight):
        return deform_conv2d(maps[:, None], offset.expand(len(maps), -1, -1, -1), weight, padding=1)[:, :, row, column]
    shares = output(one_pixel_maps(height, width), torch.ones(1, 1, 3, 3)).view(height, width)
    return shares, output(coordinate_maps(height, width), torch.eye(9).view(9, 1, 3, 3)).T


def pixels_of_bins(pool, height: int, width: int):
    """Weights [P, Q, H, W] of the pixels that each bin of the one RoI of `pool` reads."""
    shares, = pool(one_pixel_maps(height, width)[None])
    return shares.permute(1, 2, 0).unflatten(-1, (height, width))


def pixels_of_score_maps(pool, bins: int, height: int, width: int):
    """Weights [K, K, H, W] of the pixels that each bin reads of its own group of score maps, and the number [K, K] of that group."""
    import torch
    shares = pixels_of_bins(lambda maps: pool(maps.repeat_interleave(bins * bins, 1)), height, width)
    groups, = pool(torch.arange(float(bins * bins)).view(1, -1, 1, 1).expand(1, -1, height, width))
    return shares, groups[0].round().long()


# Drawing. Pixel (row, column) is the square [column, column + 1] x [row, row + 1], so that boxes can be drawn as they are.

def show(axes, shares, title: str, color: str | None = None) -> None:
    """The grid of pixels, each darker the larger its weight."""
    height, width = shares.shape
    axes.imshow(shares, extent=(0, width, height, 0), cmap=_colors(color), vmin=0, vmax=max(float(shares.max()), 1e-9) * 1.15)
    axes.set_xticks(range(width + 1), [])
    axes.set_yticks(range(height + 1), [])
    axes.grid(color=GRID, linewidth=0.6)
    axes.tick_params(length=0)
    axes.spines[:].set_color(GREY)
    axes.set_title(title, fontsize=9, color=INK, pad=6)


def smooth(axes, values, extent: tuple[float, float, float, float]) -> None:
    """Values in [0, 1] on a grid finer than the pixels, over (left, right, bottom, top)."""
    axes.imshow(values, extent=extent, cmap=_colors(None), vmin=0, vmax=1.15)


def _colors(color: str | None):
    from matplotlib.colors import LinearSegmentedColormap
    return LinearSegmentedColormap.from_list("", BLUES if color is None else ("#ffffff", color))


def dots(axes, positions, color: str = POINT, size: float = 14, **style) -> None:
    axes.scatter(*(positions.reshape(-1, 2) + 0.5).T, s=size, color=color, zorder=4, clip_on=False, **{"linewidths": 0, **style})


def rectangle(axes, corners: Sequence[float], color: str = INK, **style) -> None:
    """A frame from (x1, y1) to (x2, y2)."""
    from matplotlib.patches import Rectangle
    left, top, right, bottom = (float(value) for value in corners)
    style = {"fill": False, "edgecolor": color, "linewidth": 1.2, "zorder": 3, **style}
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, **style))


def tint(axes, shares, color: str) -> None:
    """The pixels in `color`, the more so the larger their weight, over what is there already."""
    for row, column in shares.nonzero().tolist():
        rectangle(axes, (column, row, column + 1, row + 1), linewidth=0, fill=True, facecolor=color,
                  alpha=0.75 * float(shares[row, column] / shares.max()), zorder=2)


def region(axes, rois) -> None:
    """The RoI as it was given."""
    rectangle(axes, rois[0, 1:], linestyle=(0, (4, 3)), zorder=4)


def arrows(axes, start, end, color: str = INK) -> None:
    for (x, y), (u, v) in zip((start.reshape(-1, 2) + 0.5).tolist(), (end.reshape(-1, 2) + 0.5).tolist(), strict=True):
        axes.annotate("", (u, v), (x, y), arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 0.9, "shrinkA": 2, "shrinkB": 2,
                                                      "mutation_scale": 7}, zorder=3)


def deform_conv2d(plt):
    import torch

    from visionkit.ops import deform_conv2d
    size, center = 9, 4
    figure, panels = plt.subplots(1, 4, figsize=(11, 3), layout="constrained")
    zero, moved = torch.zeros(1, 18, size, size), torch.zeros(1, 18, size, size)
    moved[0, :, center, center] = torch.tensor([                                          # (dy, dx) of each tap
        -1.7, -1.3, -2.2, 0.4, -1.1, 1.6, -0.4, -2.1, 0.3, -0.4, -0.2, 1.8, 1.6, -1.7, 0.8, 0.3, 2.2, 0.9])
    regular = taps_of_convolution(zero, size, size, center, center)[1]
    for axes, offset, title in ((panels[0], zero, "zero offsets: a convolution"), (panels[1], moved, "each tap moved by its own offset")):
        shares, taps = taps_of_convolution(offset, size, size, center, center)
        show(axes, shares, title)
        if offset is moved:
            dots(axes, regular, GREY, 8)
            arrows(axes, regular, taps)
        dots(axes, taps)
    side, fine = 4, 20                                       # a map of ones, and how many positions a pixel is sampled at
    count = (side + 3) * fine
    wanted = (torch.arange(count) + 0.5) / fine - 2
    offset = wanted - (torch.arange(count) - count)          # of 1x1 taps: output pixel n stands at n - padding
    offset = torch.nn.functional.pad(torch.stack(torch.meshgrid(offset, offset, indexing="ij"))[None], (0, side + count, 0, side + count))
    for axes, border in zip(panels[2:], ("fade", "clamp"), strict=True):
        read = deform_conv2d(torch.ones(1, 1, side, side), offset, torch.ones(1, 1, 1, 1), padding=count, border=border)
        show(axes, torch.zeros(side, side), f"border={border!r}: a tap on ones reads")
        smooth(axes, read[0, 0, :count, :count], (-1.5, side + 1.5, side + 1.5, -1.5))
        rectangle(axes, (0, 0, side, side))
        dots(axes, coordinate_maps(side, side).flatten(1).T, INK, 6)
    return figure


def roi_align(plt):
    import torch

    from visionkit.ops import roi_align
    height, width, rows, columns = 8, 11, 2, 3
    rois = torch.tensor([[0.0, 1.3, 1.4, 9.7, 6.8]])
    figure, panels = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    for axes, samples, aligned, title in ((panels[0], 2, True, "aligned=True, 2 x 2 samples a bin"),
                                          (panels[1], 2, False, "aligned=False: half a pixel further"),
                                          (panels[2], -1, True, "sampling_ratio=-1: as many as the bin has pixels")):
        pool = partial(roi_align, boxes=rois, aligned=aligned)
        shares = pixels_of_bins(partial(pool, output_size=(rows, columns), sampling_ratio=samples), height, width)
        across = samples if samples > 0 else 3               # 8.4 / 3 and 5.4 / 2 pixels, rounded up
        points, = pool(coordinate_maps(height, width)[None], output_size=(rows * across, columns * across), sampling_ratio=1)
        show(axes, shares[1, 1], title)
        region(axes, rois)
        for corners in bins(points, rows, columns).view(-1, 4):
            rectangle(axes, corners)
        dots(axes, points.permute(1, 2, 0))
    return figure


def bins(points, rows: int, columns: int, before: float = 0.5):
    """Frames [rows, columns, 4] of the bins that sample points [2, rows * S, columns * S] lie in: each starts `before` of a step early."""
    import torch
    points = points.unflatten(1, (rows, -1)).unflatten(3, (columns, -1)) + 0.5            # [2, rows, S, columns, S]
    first, last = points[:, :, 0, :, 0], points[:, :, -1, :, -1]
    step = (last - first) / (points.shape[2] - 1)
    return torch.cat([first - before * step, last + (1 - before) * step]).permute(1, 2, 0)


def roi_pool(plt):
    import torch

    from visionkit.ops import roi_pool
    height, width = 8, 11
    rois = torch.tensor([[0.0, 1.4, 1.3, 8.3, 5.2]])
    shares = pixels_of_bins(lambda maps: roi_pool(maps, rois, (2, 3)), height, width)
    figure, panels = plt.subplots(1, 2, figsize=(7.6, 3), layout="constrained")
    show(panels[0], torch.zeros(height, width), "bins of whole pixels, which may overlap")
    for index, share in enumerate(shares.flatten(0, 1)):
        ys, xs = share.nonzero().T
        pixels = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        rectangle(panels[0], pixels, linewidth=0, fill=True, facecolor=BINS[index], alpha=0.18, zorder=1)
        inset = 0.06 + 0.05 * (index % 3)                    # so that frames that share an edge can be told apart
        rectangle(panels[0], pixels + torch.tensor([inset, inset, -inset, -inset]), BINS[index], linewidth=1.6)
    input = torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(3)).requires_grad_()
    roi_pool(input, rois, (2, 3)).sum().backward()
    show(panels[1], input.detach()[0, 0] * 0.6, "the largest value of each bin")
    dots(panels[1], input.grad[0, 0].nonzero().flip(1), size=40)             # the pixels that a gradient reaches
    for axes in panels:
        region(axes, rois)
    return figure


def ps_roi_pool(plt):
    from visionkit.ops import ps_roi_pool
    return _score_maps(plt, {f"rule={rule!r}": partial(ps_roi_pool, rule=rule) for rule in ("torchvision", "r_fcn")})


def ps_roi_align(plt):
    from visionkit.ops import ps_roi_align
    return _score_maps(plt, {"2 x 2 samples a bin": partial(ps_roi_align, sampling_ratio=2)})


def _score_maps(plt, pools: dict):
    """A RoI, its 3x3 bins in the colour of the group of score maps that each reads; and the groups with what is read of each."""
    import torch
    height, width, k = 8, 10, 3
    rois = torch.tensor([[0.0, 1.4, 0.8, 8.3, 6.2]])
    figure = plt.figure(figsize=(3.6 * len(pools) + 4.4, 3.2), layout="constrained")
    *left, right = figure.subfigures(1, len(pools) + 1, width_ratios=[3.6] * len(pools) + [4.4])
    for part, (title, pool) in zip(left, pools.items(), strict=True):
        shares, groups = pixels_of_score_maps(partial(pool, boxes=rois, output_size=k), k, height, width)
        axes = part.subplots()
        show(axes, torch.zeros(height, width), f"{title}: bin (i, j) of a RoI reads ...")
        for group, share in zip(groups.flatten().tolist(), shares.flatten(0, 1), strict=True):
            tint(axes, share, BINS[group])
            x, y = (share * coordinate_maps(height, width)).sum((1, 2)).tolist()
            axes.text(x + 0.5, y + 0.5, group, fontsize=9, color=INK, ha="center", va="center", zorder=5)
        region(axes, rois)
    right.suptitle("... group i * 3 + j of the score maps, where the bin lies", fontsize=9, color=INK)
    small = right.subplots(k, k)
    for group, share in zip(groups.flatten().tolist(), shares.flatten(0, 1), strict=True):
        show(small[divmod(group, k)], share, "", BINS[group])
        small[divmod(group, k)].text(0.3, 1.3, group, fontsize=8, color=INK)
    return figure


def deform_roi_pool(plt):
    import torch

    from visionkit.ops import deform_ps_roi_pool, deform_roi_pool
    height, width, rows, columns, samples = 9, 12, 2, 3, 4
    rois = torch.tensor([[0.0, 2, 2, 9, 6]])
    zero = torch.zeros(1, 2, rows, columns)
    moved = torch.tensor([[[-1.7, 0.3, 1.6], [-0.9, 0.8, 2.3]], [[-2.4, -3.0, -1.0], [2.0, 1.1, 2.6]]])[None]         # dx, then dy

    def points_of(offset):
        """[2, rows * S, columns * S], from as many bins of one sample each."""
        offset = offset.repeat_interleave(samples, 2).repeat_interleave(samples, 3)
        return deform_roi_pool(coordinate_maps(height, width)[None], rois, offset, (rows * samples, columns * samples), 1.0, 1)[0]

    figure, panels = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    plain = bins(points_of(zero), rows, columns, before=0)   # its first samples lie on the border of a bin
    for axes, offset, title in ((panels[0], zero, "zero offsets: 4 x 4 samples a bin"),
                                (panels[1], moved, "each bin moved by its own offset")):
        points = points_of(offset)
        shares = pixels_of_bins(partial(deform_roi_pool, boxes=rois, offset=offset, output_size=(rows, columns)), height, width)
        show(axes, shares[1, 1], title)
        region(axes, rois)
        frames = bins(points, rows, columns, before=0)
        if offset is moved:
            _moved(axes, plain, frames)
        else:
            for frame in frames.view(-1, 4):
                rectangle(axes, frame)
        dots(axes, points.permute(1, 2, 0), size=6)

    axes, bin = panels[2], (1, 1)
    show(axes, torch.zeros(height, width), "deform_ps_roi_pool: a bin, moved for two classes")
    region(axes, rois)
    both = torch.cat([moved, torch.tensor([-2.9, 1.9]).view(1, 2, 1, 1) + zero], 1)
    maps = one_pixel_maps(height, width).repeat_interleave(rows * columns, 0).repeat(2, 1, 1)[None]      # the same for both classes
    shares = deform_ps_roi_pool(maps, rois, both, (rows, columns))[0].unflatten(0, (2, height, width))[..., bin[0], bin[1]]
    for offset, share, color in zip(both.split(2, 1), shares, (BINS[0], BINS[2]), strict=True):
        tint(axes, share, color)
        frame = bins(points_of(offset), rows, columns, before=0)[bin]
        _moved(axes, plain[bin], frame, color)
    return figure


def _moved(axes, before, after, color: str = INK) -> None:
    """Frames in grey, where they are moved to, and how."""
    for start, end in zip(before.reshape(-1, 4), after.reshape(-1, 4), strict=True):
        rectangle(axes, start, GREY, linewidth=0.8)
        rectangle(axes, end, color)
        arrows(axes, (start[:2] + start[2:]) / 2 - 0.5, (end[:2] + end[2:]) / 2 - 0.5, color)


def ms_deform_attn(plt):
    import torch

    from visionkit.ops import ms_deform_attn
    sizes = ((12, 16), (6, 8), (3, 4))
    points, reference = 4, torch.tensor([0.56, 0.44])
    generator = torch.Generator().manual_seed(5)
    locations = (reference + torch.randn(len(sizes), points, 2, generator=generator) * 0.11)[None, None, None]          # [1, 1, 1, L, P, 2]
    weights = torch.rand(len(sizes) * points, generator=generator).mul(2).softmax(0)
    shapes = torch.tensor(sizes)
    starts = torch.tensor([0, 192, 240])
    shares = ms_deform_attn(torch.eye(252).view(1, 252, 1, 252), shapes, starts, locations, weights.view(1, 1, 1, len(sizes), points))[0, 0]
    coordinates = torch.cat([coordinate_maps(*size).flatten(1).T for size in sizes]).view(1, 252, 1, 2)
    each = len(sizes) * points                               # one query for each point, which attends to that point only
    where = ms_deform_attn(coordinates, shapes, starts, locations.expand(1, each, -1, -1, -1, -1),
                           torch.eye(each).view(1, each, 1, len(sizes), points))[0]
    figure, panels = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    for level, (height, width) in enumerate(sizes):
        of_level = shares[starts[level]:starts[level] + height * width]
        show(panels[level], of_level.view(height, width), f"level {level}: {height} x {width} pixels")
        chosen = slice(level * points, (level + 1) * points)
        center = reference * torch.tensor([width, height]) - 0.5
        arrows(panels[level], center.expand(points, 2), where[chosen], GREY)
        dots(panels[level], where[chosen], size=weights[chosen] * 500)
        dots(panels[level], center, INK, 50, marker="+", linewidths=1.6)
    return figure


if __name__ == "__main__":
    sys.exit(main())
