"""Time Hungarian matching beside the form of the DETR repository: python tools/benchmark_matcher.py"""
from __future__ import annotations

import argparse
import sys


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time HungarianMatcher beside the costs of a whole batch with itself, in turns. pip install -e '.[bench]' first: the "
                    "other form takes torchvision's generalized IoU. Exit status 1 when the indices differ.")
    parser.add_argument("--repeats", type=int, default=9, help="timings of each; the median counts (default: %(default)s)")
    parser.add_argument("--smallest", action="store_true", help="one image with one object only")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()                            # before the imports: --help must answer at once
    import torch

    from visionkit.engine.command_line import run_command
    from visionkit.engine.matcher_benchmark import CASES, measure_matching

    def command() -> int:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {arguments.repeats}\n")
        print("| images | queries | objects an image | ms | cross product, ms | times faster |\n|---|---|---|---|---|---|")
        same = True
        for row in measure_matching(CASES[-1:] if arguments.smallest else CASES, arguments.repeats):
            print(f"| {row.images} | {row.queries} | {row.objects} | {row.ours_seconds * 1e3:.3g} | {row.peer_seconds * 1e3:.3g} "
                  f"| {row.times_faster:.3g}{'' if row.same else ', DIFFERS'} |", flush=True)
            same = same and row.same
        return 0 if same else 1

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
