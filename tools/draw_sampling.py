"""Draw where a deformable network looks: python tools/draw_sampling.py CONFIG CHECKPOINT IMAGE --at X Y"""
from __future__ import annotations

import argparse
import sys
from itertools import islice


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw the sampling locations of an output pixel of a deformable network, or measure "
                                                 "how far apart its taps are on objects of each size.")
    parser.add_argument("config", help="a .py or .json config")
    parser.add_argument("checkpoint", help=".pth or .safetensors")
    parser.add_argument("image", nargs="?", help="what to draw on")
    parser.add_argument("--at", nargs=2, type=float, metavar=("X", "Y"), help="pixel of the image whose nearest output pixel is drawn")
    parser.add_argument("--layers", type=int, default=3, help="deformable layers, counted from the last, that are followed down; default: "
                                                              "%(default)s")
    parser.add_argument("--out", default="sampling.png", metavar="FILE", help="the picture; default: %(default)s")
    parser.add_argument("--dilation", type=int, nargs="?", const=0, metavar="IMAGES",
                        help="print the mean distance of neighbouring taps by object size, over the test set or its first images")
    parser.add_argument("--sizes", nargs=2, type=float, default=(32, 96), metavar=("MEDIUM", "LARGE"),
                        help="sides of the square from which on an object is medium, and large; default: COCO's 32 96")
    parser.add_argument("--device", help="such as cuda:1 or cpu; default: a GPU if there is one")
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="change the config; +KEY=VALUE adds a key")
    parser.add_argument("--traceback", action="store_true", help="show where in the code a wrong setting was noticed")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()                            # before the imports: --help must answer at once
    from visionkit.engine import load_config
    from visionkit.engine.command_line import run_command
    from visionkit.engine.inference import Detector, read_image, test_images
    from visionkit.engine.sampling import dilation_table, draw_sampling, table_lines
    from visionkit.registry import ConfigError
    from visionkit.visualization import save_image

    def command() -> int:
        if arguments.dilation is None and (arguments.image is None or arguments.at is None):
            raise ConfigError("give an image and --at X Y to draw its sampling locations, or --dilation to measure the test set")
        cfg = load_config(arguments.config, arguments.cfg_options)
        detector = Detector(cfg, arguments.checkpoint, arguments.device)
        if arguments.dilation is not None:
            images = islice(test_images(cfg), arguments.dilation or None)
            print(table_lines(dilation_table(detector.model, images, tuple(arguments.sizes))))
        if arguments.image is not None and arguments.at is not None:
            picture, count = draw_sampling(detector.model, detector.prepare(arguments.image), read_image(arguments.image),
                                           tuple(arguments.at), arguments.layers)
            save_image(picture, arguments.out)
            print(f"{count} sampling locations: {arguments.out}")
        return 0

    return run_command(command, arguments.traceback)


if __name__ == "__main__":
    sys.exit(main())
