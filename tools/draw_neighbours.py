"""Draw images beside their nearest neighbours: python tools/draw_neighbours.py CONFIG CHECKPOINT --out neighbours.png"""
from __future__ import annotations

import argparse
import sys


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw test images beside the test images that are nearest to them in the space of a "
                                                 "network's features, by the cosine of standardised features.")
    parser.add_argument("config", help="a .py or .json config")
    parser.add_argument("checkpoint", nargs="?", help=".pth or .safetensors")
    parser.add_argument("--out", default="neighbours.png", metavar="FILE", help="the picture; default: %(default)s")
    parser.add_argument("--point", help="one of test_cfg.points; default: the last one, or the mean of the network's last feature")
    parser.add_argument("--queries", type=int, default=8, help="rows; default: %(default)s")
    parser.add_argument("--neighbours", type=int, default=8, help="images a row, the query not counted; default: %(default)s")
    parser.add_argument("--images", type=int, default=2000, help="of the test set, at equal distances in its order, among which neighbours "
                                                                 "are looked for; 0: all; default: %(default)s")
    parser.add_argument("--random", action="store_true", help="the same network at random initialisation; takes no checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of queries and of --random; default: %(default)s")
    parser.add_argument("--device", help="such as cuda:1 or cpu; default: a GPU if there is one")
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="change the config; +KEY=VALUE adds a key")
    parser.add_argument("--traceback", action="store_true", help="show where in the code a wrong setting was noticed")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()                            # before the imports: --help must answer at once
    from visionkit.engine import load_config
    from visionkit.engine.command_line import run_command
    from visionkit.engine.neighbours import neighbour_sheet
    from visionkit.registry import ConfigError
    from visionkit.visualization import save_image

    def command() -> int:
        if arguments.checkpoint is None and not arguments.random:
            raise ConfigError("give a checkpoint, or --random for the network at random initialisation")
        sheet = neighbour_sheet(load_config(arguments.config, arguments.cfg_options), None if arguments.random else arguments.checkpoint,
                                point=arguments.point, queries=arguments.queries, neighbours=arguments.neighbours,
                                images=arguments.images, seed=arguments.seed, device=arguments.device)
        print(f"a row an image, its nearest neighbours beside it: {save_image(sheet, arguments.out)}")
        return 0

    return run_command(command, arguments.traceback)


if __name__ == "__main__":
    sys.exit(main())
