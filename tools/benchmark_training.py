"""Time the training iterations of a config: python tools/benchmark_training.py CONFIG"""
from __future__ import annotations

import argparse
import sys


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the training iterations of a config, and its data path alone.")
    parser.add_argument("config", help="a .py or .json config")
    parser.add_argument("--iterations", type=int, default=20, help="of each variant (default: 20)")
    parser.add_argument("--compare-memory-order", action="store_true", help="channels-last against channels-first, taking turns")
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as for tools/train.py")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()                            # before the imports: --help must answer at once
    import torch

    from visionkit.engine import load_config
    from visionkit.engine.benchmark import measure_training
    from visionkit.engine.command_line import run_command
    orders = ("channels last", "channels first") if arguments.compare_memory_order else ("as configured",)

    def command() -> int:
        speed = measure_training(load_config(arguments.config, arguments.cfg_options), arguments.iterations, orders)
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {arguments.iterations} iterations")
        for order, seconds in speed.seconds_per_iteration.items():
            print(f"{seconds:8.3f} s an iteration, {order}")
        times = speed.loader_images_per_s / speed.images_per_s
        print(f"{speed.images_per_s:8.1f} images/s trained")
        print(f"{speed.loader_images_per_s:8.1f} images/s from the data path alone, {times:.0f} times as many")
        return 0

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
