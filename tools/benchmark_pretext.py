"""Time learning from rotations beside supervised learning, and the making of puzzles: python tools/benchmark_pretext.py"""
from __future__ import annotations

import argparse
import sys


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time a training step of Rotation beside one of the same trunk on the same views, turned beforehand, in turns; and "
                    "count the puzzles that are made in a second. Exit status 1 when rotation takes more than 1.1 times as long.")
    parser.add_argument("--repeats", type=int, default=9, help="timings of each; the median counts (default: %(default)s)")
    parser.add_argument("--images", type=int, default=32, help="of a training batch (default: %(default)s)")
    parser.add_argument("--puzzle-images", type=int, default=64, help="of a batch of puzzles (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--smallest", action="store_true", help="the smallest trunk and the first puzzle only")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()                            # before the imports: --help must answer at once
    import itertools

    import torch

    from visionkit.engine.command_line import run_command
    from visionkit.engine.pretext_benchmark import BAR, PUZZLES, TRUNKS, measure_puzzles, measure_training

    def command() -> int:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}, median of {arguments.repeats}\n")
        print("| trunk | images x rotations | rotation, ms | supervised, ms | times as long |\n|---|---|---|---|---|")
        within, first = True, 1 if arguments.smallest else None
        trunks, puzzles = (dict(itertools.islice(table.items(), first)) for table in (TRUNKS, PUZZLES))
        for row in measure_training(arguments.images, repeats=arguments.repeats, device=arguments.device, trunks=trunks):
            print(f"| {row.trunk} | {row.images} x 4 | {row.rotation_seconds * 1e3:.3g} | {row.supervised_seconds * 1e3:.3g} "
                  f"| {row.ratio:.3f}{'' if row.ratio <= BAR else f', ABOVE {BAR}'} |", flush=True)
            within = within and row.ratio <= BAR
        print("\n| puzzle | images | ms | puzzles/s |\n|---|---|---|---|")
        for row in measure_puzzles(arguments.puzzle_images, arguments.repeats, arguments.device, puzzles):
            print(f"| {row.puzzle} | {row.images} | {row.seconds * 1e3:.3g} | {row.puzzles_per_second:.3g} |", flush=True)
        return 0 if within else 1

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
