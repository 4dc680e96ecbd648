"""Draw what estimators of mutual information say where the truth is known: python tools/draw_mutual_information.py"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INK, GREY, GRID = "#24292f", "#8c959f", "#d8dee4"
COLORS = ("#2f74b5", "#e8590c", "#2b8a3e", "#9c36b5", "#c79100", "#0b8a94")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a scorer for each estimator of mutual information on correlated Gaussians, print a "
                                                 "markdown table of estimates beside the truth, and draw it (docs/mutual_information.md).")
    parser.add_argument("--dimension", type=int, default=20, help="of each of the two vectors; default: %(default)s")
    parser.add_argument("--truths", nargs="+", type=float, default=(1, 2, 4, 6, 8), metavar="NATS", help="default: 1 2 4 6 8")
    parser.add_argument("--iterations", type=int, default=1000, help="of training each scorer; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures" / "mutual_information.png", metavar="FILE",
                        help="the picture; default: docs/pictures/mutual_information.png")
    parser.add_argument("--traceback", action="store_true", help="show where in the code a wrong setting was noticed")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()                            # before the imports: --help must answer at once
    from visionkit.engine.command_line import run_command
    from visionkit.engine.mutual_information import ESTIMATORS, estimates, estimates_table
    from visionkit.registry import ConfigError

    def command() -> int:
        if arguments.dimension < 1 or arguments.iterations < 1 or min(arguments.truths) <= 0:
            raise ConfigError(f"--dimension and --iterations are at least 1 and --truths above 0; got {arguments.dimension}, "
                              f"{arguments.iterations} and {min(arguments.truths):g}")
        total, found = len(set(arguments.truths)) * len(ESTIMATORS), []
        for one in estimates(arguments.dimension, sorted(set(arguments.truths)), arguments.iterations, seed=arguments.seed):
            found.append(one)
            if sys.stderr.isatty():
                print(f"\r\033[K{len(found)} of {total}: {one.name}, I = {one.truth:g}", end="", file=sys.stderr, flush=True)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        print(estimates_table(found))
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        draw(found, arguments.out)
        print(f"\n{arguments.out}")
        return 0

    return run_command(command, arguments.traceback)


def draw(found: list, path: Path) -> None:
    """Left the estimates over the truth, with what InfoNCE cannot exceed; right how much they vary from batch to batch."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from visionkit.engine.mutual_information import ESTIMATORS
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(3, 2), layout="constrained")
    truths = sorted({one.truth for one in found})
    left.plot([0, truths[-1]], [0, truths[-1]], color=INK, linewidth=1, label="truth")
    for color, (name, (_, _, cap)) in zip(COLORS, ESTIMATORS.items(), strict=False):
        mine = sorted((one for one in found if one.name == name), key=lambda one: one.truth)
        means, deviations = [one.mean for one in mine], [one.deviation for one in mine]
        left.plot(truths, means, color=color, marker="o", markersize=4, linewidth=1.5, label=name)
        left.fill_between(truths, [mean - spread for mean, spread in zip(means, deviations, strict=True)],
                          [mean + spread for mean, spread in zip(means, deviations, strict=True)], color=color, alpha=0.12, linewidth=0)
        right.plot(truths, deviations, color=color, marker="o", markersize=4, linewidth=1.5, label=name)
        if cap is not None and cap < truths[-1]:
            left.axhline(cap, color=color, linewidth=0.9, linestyle=(0, (4, 3)))
            left.text(0.05, cap + 0.06, f"log {round(2.718281828459045**cap)}", color=color, fontsize=8, va="bottom")
    left.set_ylim(-0.3, truths[-1] * 1.25)
    left.set_ylabel("estimate, nats: mean and standard deviation", fontsize=9, color=INK)
    right.set_ylabel("standard deviation from batch to batch, nats", fontsize=9, color=INK)
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("mutual information, nats", fontsize=9, color=INK)
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, colors=INK)
        axes.spines[:].set_color(GREY)
    left.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0.1, 1.0))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
