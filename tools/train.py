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
    from visionkit.engine import Diverged, Stopped, load_config, resume_command, train
    from visionkit.engine.distributed import end_processes, is_first_process
    from visionkit.registry import ConfigError
    from visionkit.transforms import BrokenImageError
    seed = [] if arguments.seed is None else [f"+randomness.seed={arguments.seed}"]
    try:
        train(load_config(arguments.config, [*arguments.cfg_options, *seed]), resume=arguments.resume or False, amp=arguments.amp,
              launcher=arguments.launcher, work_dir=arguments.work_dir)
    except ConfigError as error:
        if arguments.traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenImageError as error:
        if arguments.traceback:
            raise
        message = str(error).strip().splitlines()[-1].rpartition("BrokenImageError: ")[2]      # from a worker it comes with its traceback
        print(f"error: {message}\ntools/check.py lists all such files; on_error=\"skip\" in a training data set passes over them",
              file=sys.stderr)
        return 1
    except Diverged as error:
        if is_first_process():
            print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        if is_first_process():
            print(f"{stopped}\nTo go on: {resume_command()}", flush=True)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("\nstopped at once, without saving", file=sys.stderr)
        return 130
    finally:
        end_processes()
    return 0


if __name__ == "__main__":
    sys.exit(main())
