"""Check a config and its data before training: python tools/check.py CONFIG"""
from __future__ import annotations

import argparse
import sys
import time


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the checks that training runs first, look into the data, and draw some of it.")
    parser.add_argument("config", help="a .py or .json config")
    parser.add_argument("--out", metavar="DIR", help="where the contact sheet goes; default: work_dirs/<name of the config>/check")
    parser.add_argument("--samples", type=int, default=16, help="pictures on the contact sheet; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to measure the speed of loading; 0: not; default: %(default)s")
    parser.add_argument("--no-decode", action="store_true", help="look for the image files, but do not read them all")
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="change the config, such as train_dataloader.num_workers=4; +KEY=VALUE adds a key")
    parser.add_argument("--traceback", action="store_true", help="show where in the code a wrong setting was noticed")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()                            # before the imports: --help must answer at once
    from visionkit.engine import load_config
    from visionkit.engine.command_line import run_command
    return run_command(lambda: check(load_config(arguments.config, arguments.cfg_options), arguments), arguments.traceback)


def check(cfg, arguments: argparse.Namespace) -> int:
    """Print what is found; 1 if there are files that training or testing would stumble over."""
    from pathlib import Path

    from visionkit.datasets.detection import DetectionDataset
    from visionkit.datasets.report import report
    from visionkit.datasets.throughput import images_per_second
    from visionkit.engine.pictures import training_sheet
    from visionkit.engine.preflight import build_data, leaves, preflight
    from visionkit.registry import dotted
    from visionkit.visualization import save_image

    start = time.perf_counter()
    for training, key in ((True, "train_dataloader"), (False, "test_dataloader")):
        if cfg.get(key):
            preflight(cfg, training)
    print(f"pre-flight passed in {time.perf_counter() - start:.1f} s: every component, file and class of the config fits")

    reported: list[dict] = []
    broken = 0
    for key in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if not cfg.get(key) or cfg[key]["dataset"] in reported:
            continue
        reported.append(cfg[key]["dataset"])
        dataset, sampler, _ = build_data(cfg[key], key)
        for path, leaf in leaves(dataset, (key, "dataset")):
            print(f"\n{dotted(path)}: {type(leaf).__name__} {getattr(leaf, 'ann_file', '')}")
            if not isinstance(leaf, DetectionDataset):
                print(f"{len(leaf)} samples")
                continue
            found = report(leaf, decode=not arguments.no_decode)
            broken += len(found.unreadable_files) + len(found.missing_files)
            print(found)
        if key == "train_dataloader":
            folder = Path(arguments.out or Path("work_dirs") / Path(cfg.filename).stem / "check")
            draws = [draw for draw, _ in zip(sampler, range(arguments.samples), strict=False)]
            sheet = save_image(training_sheet(dataset, draws), folder / "training_samples.png")
            print(f"{len(draws)} augmented samples with their boxes: {sheet}")
            if arguments.seconds > 0 and not broken:
                workers, batch = cfg[key].get("num_workers", 0), cfg[key].get("batch_size", 1)
                speed = images_per_second(dataset, batch, workers, arguments.seconds)
                print(f"loading and augmenting: {speed:.0f} images/s with {workers} workers")
    if broken:
        print(f"\n{broken} files cannot be read; mend them, take them out of the annotation file, or set on_error=\"skip\"")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
