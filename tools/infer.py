"""Run a detector on images, folders and videos: python tools/infer.py CONFIG CHECKPOINT INPUT..."""
from __future__ import annotations

import argparse
import sys


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Detect objects in images and videos; write pictures and one JSON file.")
    parser.add_argument("config", help="a .py or .json config")
    parser.add_argument("checkpoint", help=".pth or .safetensors")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="images, folders, videos")
    parser.add_argument("--out-dir", default="detections", help="where pictures, videos and detections.json go; default: %(default)s")
    parser.add_argument("--score-threshold", type=float, default=0.3, help="leave out what is less sure; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=1, help="images that go through the network together; default: %(default)s")
    parser.add_argument("--tta", action="store_true", help="merge the predictions of several views of each image, by default as it is and "
                                                           "flipped; the section tta of the config says otherwise")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16, on GPU or CPU")
    parser.add_argument("--device", help="such as cuda:1 or cpu; default: a GPU if there is one")
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="change the config, such as model.roi.max_per_image=20; +KEY=VALUE adds a key")
    parser.add_argument("--traceback", action="store_true", help="show where in the code a wrong setting was noticed")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()                            # before the imports: --help must answer at once
    from visionkit.engine import load_config
    from visionkit.engine.command_line import run_command
    from visionkit.engine.inference import Detector, detect_files, find_inputs

    def command() -> int:
        find_inputs(arguments.inputs)                        # before the model is built
        detector = Detector(load_config(arguments.config, arguments.cfg_options), arguments.checkpoint, arguments.device,
                            arguments.score_threshold, arguments.batch_size, arguments.tta, arguments.amp)
        done = detect_files(detector, arguments.inputs, arguments.out_dir)
        print(f"{done.objects} objects in {done.images} images: {done.json_file}, and pictures beside it")
        for line in done.unreadable:
            print(f"left out: {line}", file=sys.stderr)
        return 1 if done.unreadable else 0

    return run_command(command, arguments.traceback)


if __name__ == "__main__":
    sys.exit(main())
