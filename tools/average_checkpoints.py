"""Average the weights of several checkpoints: python tools/average_checkpoints.py OUT.safetensors CHECKPOINT CHECKPOINT ..."""
from __future__ import annotations

import argparse
import sys


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write the mean of the weights of several checkpoints of one model, such as the last "
                                                 "five of a run (Attention Is All You Need, arXiv:1706.03762, sec. 6.1).")
    parser.add_argument("out", metavar="OUT.safetensors", help="the file to write")
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", help=".pth or .safetensors, two or more")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()                            # before the imports: --help must answer at once
    from visionkit.engine.checkpoint import write_average
    from visionkit.engine.command_line import run_command

    def command() -> int:
        count = write_average(arguments.out, arguments.checkpoints)
        print(f"{count} tensors, each the mean of {len(arguments.checkpoints)}, in {arguments.out}")
        return 0

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
