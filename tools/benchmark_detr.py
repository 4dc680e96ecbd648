"""Time a training step of DETR R50 beside the one of Hugging Face transformers: python tools/benchmark_detr.py"""
from __future__ import annotations

import argparse
import sys


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Forward, loss and backward of DETR R50 on two images of 640x480, in turns with those of transformers (pip install "
                    "transformers timm), and the peak memory of each in a process of its own.")
    parser.add_argument("--repeats", type=int, default=9, help="steps of each; the median counts (default: %(default)s)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory, which takes a process for each")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()                            # before the imports: --help must answer at once
    import torch

    from visionkit.engine.command_line import run_command
    from visionkit.engine.detr_benchmark import measure_steps

    def command() -> int:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {arguments.repeats} steps\n")
        print("| beside | s | theirs, s | ratio | MB | theirs, MB | ratio |\n|---|---|---|---|---|---|---|")
        for row in measure_steps(arguments.repeats, memory=not arguments.no_memory):
            memory = "| | | |"
            if row.ours_bytes and row.peer_bytes:
                memory = f"| {row.ours_bytes / 1e6:.0f} | {row.peer_bytes / 1e6:.0f} | {row.ours_bytes / row.peer_bytes:.2f} |"
            print(f"| {row.peer} | {row.ours_seconds:.2f} | {row.peer_seconds:.2f} | {row.time_ratio:.2f} {memory}", flush=True)
        return 0

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
