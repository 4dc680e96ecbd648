"""Evaluate a model: python tools/test.py CONFIG CHECKPOINT"""
from __future__ import annotations

import argparse
import sys


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate the weights of a checkpoint on the test set of a config.")
    parser.add_argument("config", help="a .py or .json config")
    parser.add_argument("checkpoint", help=".pth or .safetensors")
    parser.add_argument("--out", metavar="FILE.json", help="write the detections here, in COCO's result format")
    parser.add_argument("--show-dir", metavar="DIR", help="write pictures of predictions beside the ground truth here, one an image")
    parser.add_argument("--tta", action="store_true", help="merge the predictions of several views of each image, by default as it is and "
                                                           "flipped; the section tta of the config says otherwise")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16, on GPU or CPU")
    parser.add_argument("--work-dir", help="where the log goes; default: work_dirs/<name of the config>")
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="change the config, such as test_evaluator.backend=pycocotools; +KEY=VALUE adds a key")
    parser.add_argument("--launcher", choices=["none", "pytorch"], help="pytorch: this process was started by torchrun")
    parser.add_argument("--traceback", action="store_true", help="show where in the code a wrong setting was noticed")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()                            # before the imports: --help must answer at once
    from visionkit.engine import load_config, test
    from visionkit.engine.command_line import run_command

    def command() -> int:
        cfg = load_config(arguments.config, arguments.cfg_options)
        if arguments.out:
            write_detections(cfg, arguments.out)
        if arguments.show_dir:
            cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), {"type": "PictureHook", "first": -1, "folder": arguments.show_dir}]
        test(cfg, arguments.checkpoint, launcher=arguments.launcher, work_dir=arguments.work_dir, tta=arguments.tta,
             amp=arguments.amp)
        return 0

    return run_command(command, arguments.traceback)


def write_detections(cfg, path: str) -> None:
    """Let the config's CocoMetric write its detections to `path`."""
    from visionkit.registry import ConfigError
    evaluators = cfg.get("test_evaluator")
    metrics = evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]
    coco = [metric for metric in metrics if isinstance(metric, dict) and metric.get("type") == "CocoMetric"]
    if not coco:
        raise ConfigError("--out writes what CocoMetric collects, and the config has none here", ("test_evaluator",))
    if not path.endswith(".json"):
        raise ConfigError(f"--out names a .json file, got {path!r}")
    coco[0]["outfile"] = path


if __name__ == "__main__":
    sys.exit(main())
