"""Convert another project's checkpoint: python tools/convert_checkpoint.py SOURCE OUT.safetensors --config CONFIG"""
from __future__ import annotations

import argparse
import sys


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write the weights of another project's checkpoint as those of a config's model. "
                                                 "Every key is mapped or left out for a stated reason; anything else is an error.")
    parser.add_argument("source", help=".pth, .pt, .bin, .safetensors, or the .index.json of a checkpoint in several files")
    parser.add_argument("out", metavar="OUT.safetensors", nargs="?", help="the file to write; not needed with --dry-run")
    parser.add_argument("--config", required=True, help="the .py or .json config whose model the weights are for")
    parser.add_argument("--from", dest="source_format", metavar="FORMAT", help="the format of the source; by default its keys tell")
    parser.add_argument("--classes", metavar="SET", help="keep the rows of these classes, where the source has one for every category "
                                                         "number: coco80, or coco133 with stuff; by default all rows")
    parser.add_argument("--dry-run", action="store_true", help="check and tell, and write nothing")
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="change the config, such as model.num_classes=91; +KEY=VALUE adds a key")
    parser.add_argument("--traceback", action="store_true", help="show where in the code a wrong setting was noticed")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()                            # before the imports: --help must answer at once
    from visionkit.engine.command_line import run_command

    def command() -> int:
        convert_file(arguments)
        return 0

    return run_command(command, arguments.traceback)


def convert_file(arguments: argparse.Namespace) -> None:
    from mmengine.registry import DefaultScope
    from rich.console import Console

    from visionkit.engine import load_config
    from visionkit.engine.convert import as_table, plan, read_foreign, write_converted
    from visionkit.registry import MODELS, SCOPE, ConfigError

    if not arguments.dry_run and not (arguments.out or "").endswith(".safetensors"):
        raise ConfigError(f"the weights are written as .safetensors: name such a file, or give --dry-run; got {arguments.out!r}")
    cfg = load_config(arguments.config, arguments.cfg_options)
    if not cfg.get("model"):
        raise ConfigError("the config has no model", ("model",))
    with DefaultScope.overwrite_default_scope(SCOPE):
        model = MODELS.make(cfg.model, at="model")
    foreign = read_foreign(arguments.source)
    done = plan(foreign.state_dict, model, arguments.source_format, arguments.classes)
    Console(width=None if sys.stdout.isatty() else 160).print(as_table(done))
    for note in done.format.notes:
        print(f"Note: {note}")
    if foreign.beside:
        print(f"Also in the file, and left there: {', '.join(foreign.beside)}")
    if foreign.unread:
        print(f"Objects in the file that were not read: {', '.join(foreign.unread)}")
    values = sum(tensor.numel() for tensor in done.state_dict.values())
    if arguments.dry_run:
        print(f"{len(done.state_dict)} tensors, {values:,} values; nothing written (--dry-run)")
    else:
        write_converted(arguments.out, done, arguments.source, arguments.config, arguments.classes)
        print(f"{len(done.state_dict)} tensors, {values:,} values, in {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())
