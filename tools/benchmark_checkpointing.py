"""Memory and time of each policy of gradient checkpointing: python tools/benchmark_checkpointing.py CONFIG"""
from __future__ import annotations

import argparse
import sys


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="What the policies of gradient checkpointing save and cost on a config: bytes that are held between forward and "
                    "backward, the peak of a step, and its time, each in a process of its own.")
    parser.add_argument("config", help="a .py or .json config")
    parser.add_argument("--iterations", type=int, default=5, help="steps whose median is taken (default: %(default)s)")
    parser.add_argument("--policies", nargs="+", metavar="POLICY", help="none and those to compare with it (default: all)")
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as for tools/train.py")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()                            # before the imports: --help must answer at once
    import torch
    from rich.console import Console

    from visionkit.engine import load_config
    from visionkit.engine.checkpointing_benchmark import as_table, measure_checkpointing, switched
    from visionkit.engine.command_line import run_command
    from visionkit.ops.checkpointing import POLICIES, Checkpointing
    from visionkit.registry import ConfigError

    def command() -> int:
        if arguments.iterations < 1:
            raise ConfigError(f"--iterations is 1 or more, got {arguments.iterations}")
        for policy in arguments.policies or ():
            Checkpointing.of(policy)                         # before anything is measured
        cfg = load_config(arguments.config, arguments.cfg_options)
        _, places = switched(cfg.get("model", {}), "none")
        if "train_dataloader" not in cfg:
            raise ConfigError(f"{arguments.config} has no train_dataloader whose images could be trained on")
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {arguments.iterations} steps; "
              f"set in {', '.join(places)}")
        policies = dict.fromkeys(("none", *(arguments.policies or POLICIES)))
        table = as_table(measure_checkpointing(cfg, arguments.iterations, list(policies)))
        Console(width=None if sys.stdout.isatty() else 140).print(table)
        return 0

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
