"""Time a block of MoonViT on packed images beside padded ones: python tools/benchmark_packing.py"""
from __future__ import annotations

import argparse
import sys


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time an encoder block of MoonViT on eight images of 64 to 1024 patches, packed, beside the same block on the same "
                    "images padded to the longest, with a mask; in turns. And measure the peak memory of each, in a process of its own. "
                    "Exit status 1 when packing is less than 2.4 times as fast or takes more than half of the memory.")
    parser.add_argument("--repeats", type=int, default=9, help="timings of each; the median counts (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="on the CPU; default: as many as PyTorch takes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory, which takes four processes")
    parser.add_argument("--smallest", action="store_true", help="a block of 64 channels on two small images, to see that it runs")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()                            # before the imports: --help must answer at once

    import torch

    from visionkit.engine.command_line import run_command
    from visionkit.engine.packing_benchmark import MEMORY_BAR, TIME_BAR, Shape, measure_packing

    def command() -> int:
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        shape = Shape(64, 4, 128, ((2, 4), (4, 8))) if arguments.smallest else Shape()
        lengths = [h * w for h, w in shape.grids]
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}, median of {arguments.repeats}; "
              f"{len(lengths)} images of {min(lengths)} to {max(lengths)} patches, {sum(lengths)} in all, {len(lengths) * max(lengths)} "
              f"padded; {shape.channels} channels, {shape.num_heads} heads\n")
        print("| pass | packed, ms | padded, ms | times faster | packed, MB | padded, MB | share | difference |")
        print("|---|---|---|---|---|---|---|---|")
        within = True
        for row in measure_packing(arguments.repeats, shape, not arguments.no_memory, arguments.device):
            fast = row.times_faster >= TIME_BAR
            small = row.memory is None or row.memory <= MEMORY_BAR
            memory = "| | | " if row.memory is None else (f"| {row.packed_bytes / 1e6:.4g} | {row.padded_bytes / 1e6:.4g} "
                                                         f"| {row.memory:.2f}{'' if small else f', ABOVE {MEMORY_BAR}'} ")
            print(f"| {row.passes} | {row.packed_seconds * 1e3:.4g} | {row.padded_seconds * 1e3:.4g} "
                  f"| {row.times_faster:.2f}{'' if fast else f', BELOW {TIME_BAR}'} {memory}| {row.difference:.1e} |", flush=True)
            within = within and fast and small
        return 0 if within else 1

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
