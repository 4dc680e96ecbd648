"""Train a model: python tools/train.py CONFIG"""
from __future__ import annotations

import argparse
import sys


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the model of a config.")
    parser.add_argument("config", help="a .py or .json config, such as configs/quickstart.py")
    parser.add_argument("--work-dir", help="where logs and checkpoints go; default: work_dirs/<name of the config>")
    parser.add_argument("--resume", nargs="?", const="auto", metavar="CHECKPOINT",
                        help="go on with the run in the work folder, from its newest readable checkpoint, or from the one named")
    parser.add_argument("--amp", action="store_true", help="compute the forward pass in bfloat16, on GPU or CPU")
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="change the config, such as train_cfg.max_epochs=3 param_scheduler.0.end=5; +KEY=VALUE adds a key")
    parser.add_argument("--launcher", choices=["none", "pytorch"], help="pytorch: this process was started by torchrun")
    parser.add_argument("--seed", type=int, help="of weights, data order, augmentation and dropout")
    parser.add_argument("--traceback", action="store_true", help="show where in the code a wrong setting was noticed")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()                            # before the imports: --help must answer at once
    from visionkit.engine import load_config, train
    from visionkit.engine.command_line import run_command
    seed = [] if arguments.seed is None else [f"+randomness.seed={arguments.seed}"]

    def command() -> int:
        train(load_config(arguments.config, [*arguments.cfg_options, *seed]), resume=arguments.resume or False, amp=arguments.amp,
              launcher=arguments.launcher, work_dir=arguments.work_dir)
        return 0

    return run_command(command, arguments.traceback)


if __name__ == "__main__":
    sys.exit(main())
