"""How full packs of a config's training images would be: python tools/report_packing.py CONFIG --max-tokens 4096"""
from __future__ import annotations

import argparse
import ast
import sys


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pack the training set by each packer, and print how full the packs are, how "
                                                 "evenly processes get work, and what packing does to the order. Loads no image.")
    parser.add_argument("config", help="a .py or .json config; --max-tokens, --length and --filter-overlong are by default as its "
                                       "batch_sampler says, if it has one")
    parser.add_argument("--max-tokens", type=int, help="of a pack")
    parser.add_argument("--length", type=literal, metavar="DICT",
                        help="how long a sample is, such as \"{'type': 'ImageTokens', 'merged': True}\"; default without a batch_sampler: "
                             "ImageTokens")
    parser.add_argument("--packers", nargs="+", default=["next_fit", "best_fit", "balanced"], metavar="NAME",
                        help="default: all three of ours")
    parser.add_argument("--processes", type=int, default=1, help="that packs are dealt to; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=1, help="that are packed; default: %(default)s")
    parser.add_argument("--filter-overlong", action="store_true", help="leave out samples that are longer than a pack")
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="change the config; +KEY=VALUE adds a key")
    parser.add_argument("--traceback", action="store_true", help="show where in the code a wrong setting was noticed")
    return parser.parse_args()


def literal(text: str) -> object:
    """What stands in `text` as Python writes it, or else the text, a name."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        if text.isidentifier():
            return text
        raise argparse.ArgumentTypeError(f"must be a name or a dict as Python writes it, got {text}") from None


def main() -> int:
    arguments = parse_arguments()                            # before the imports: --help must answer at once
    from visionkit.engine import load_config
    from visionkit.engine.command_line import run_command
    from visionkit.engine.packing import compare_packers
    from visionkit.engine.preflight import build_data
    from visionkit.registry import ConfigError

    def command() -> int:
        section = load_config(arguments.config, arguments.cfg_options).get("train_dataloader")
        if section is None:
            raise ConfigError(f"{arguments.config} has no train_dataloader whose images could be packed")
        said = section.pop("batch_sampler", None)
        default = {"type": "ImageTokens"} if said is None else {"type": "OwnLength"}                     # as in training
        said = said or {}
        max_tokens = said.get("max_tokens") if arguments.max_tokens is None else arguments.max_tokens
        if max_tokens is None or arguments.processes < 1 or arguments.epochs < 1:
            raise ConfigError("say how many tokens a pack holds, --max-tokens, and 1 or more for --processes and --epochs")
        _, sampler, _ = build_data(section, "train_dataloader")
        length = arguments.length or said.get("length", default)
        for report in compare_packers(sampler, max_tokens, length, arguments.packers, arguments.processes,
                                      arguments.filter_overlong or said.get("filter_overlong", False), arguments.epochs):
            print(report)
        return 0

    return run_command(command, arguments.traceback)


if __name__ == "__main__":
    sys.exit(main())
