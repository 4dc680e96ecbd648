"""`python -m visionkit`: what is registered here, and what this installation consists of."""
from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from visionkit import __version__

if TYPE_CHECKING:
    from visionkit.registry import Registry

# Nothing heavy is imported before the arguments are parsed.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m visionkit", description="Look at a visionkit installation.",
                                     epilog="To train, test or infer: tools/train.py, tools/test.py, tools/infer.py.")
    parser.add_argument("--version", action="version", version=f"visionkit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    plugins = commands.add_parser(
        "plugins", help="list every registered component and where it comes from",
        description="List every registered component with the distribution it comes from, and what is wrong with plugins. "
                    "Exit status 1 when a plugin failed to import or two distributions claim one name.")
    plugins.add_argument("--kind", help="only components of this kind, such as backbone")
    plugins.add_argument("--from", dest="distribution", metavar="DISTRIBUTION", help="only components of this distribution")
    plugins.add_argument("--json", action="store_true", help="print JSON")
    plugins.set_defaults(run=lambda options: list_plugins(options.kind, options.distribution, as_json=options.json))

    environment = commands.add_parser("env", help="versions and devices, to paste into an issue",
                                      description="Print the versions and devices that an issue report needs.")
    environment.add_argument("--json", action="store_true", help="print JSON")
    environment.set_defaults(run=lambda options: show_environment(as_json=options.json))

    ops = commands.add_parser("ops", help="which implementation serves each op here, and why",
                              description="Say for each op which tier serves it on each device of this machine, and why: portable (stock "
                                          "PyTorch), triton or flash_attn (kernels for GPUs). VISIONKIT_OPS=portable forces the first.")
    ops.add_argument("--dtype", default="float32", choices=["float64", "float32", "bfloat16", "float16"],
                     help="of the tensors (default: float32); under --amp it is bfloat16")
    ops.add_argument("--json", action="store_true", help="print JSON")
    ops.set_defaults(run=lambda options: list_ops(options.dtype, as_json=options.json))

    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except ValueError as error:
        parser.error(str(error))


def list_plugins(kind: str | None, distribution: str | None, *, as_json: bool) -> int:
    """Print components, contested names and failed plugins; 1 if there is any of the latter two."""
    import importlib.metadata

    from visionkit.registry import did_you_mean, load_plugins, registries

    kinds = {registry.name.replace(" ", "_"): registry for registry in registries()}
    if kind is not None and kind not in kinds:
        raise ValueError(f"no kind of component is called {kind!r}.{did_you_mean(kind, kinds)} Kinds: {', '.join(kinds)}")
    plugins = load_plugins()
    packages = importlib.metadata.packages_distributions()
    rows = [{"kind": name, "name": key, "module": module, "distribution": registry.distributions.get(key) or _owner(module, packages)}
            for name, registry in kinds.items() if kind in (None, name) for key, module in _modules(registry)]
    known = sorted({row["distribution"] for row in rows} | {plugin.distribution for plugin in plugins})
    if distribution is not None:
        if distribution not in known:
            raise ValueError(f"no component comes from {distribution!r}.{did_you_mean(distribution, known)} "
                             f"Distributions: {', '.join(known)}")
        rows = [row for row in rows if row["distribution"] == distribution]
    contested = [{"kind": name, "name": key, "distributions": list(claims)}
                 for name, registry in kinds.items() for key, claims in sorted(registry.contested.items())]
    failed = [plugin for plugin in plugins if plugin.error]

    if as_json:
        print(json.dumps({"components": rows, "plugins": [vars(plugin) for plugin in plugins], "contested": contested}, indent=2))
        return 1 if failed or contested else 0
    print_table(rows, ["kind", "name", "module", "distribution"])
    for plugin in plugins:
        if plugin.left_out:
            print(f"\nplugin {plugin.name!r} of {plugin.distribution} is not loaded: VISIONKIT_PLUGINS leaves it out")
    for claim in contested:
        print(f"\n{claim['kind']} {claim['name']!r} is claimed by {' and '.join(claim['distributions'])}: "
              f"uninstall one, or name in VISIONKIT_PLUGINS only the plugins you want")
    for plugin in failed:
        print(f"\nplugin {plugin.name!r} of {plugin.distribution} failed to import:\n{plugin.error}")
    return 1 if failed or contested else 0


def _modules(registry: Registry) -> list[tuple[str, str]]:
    """(name, module) of each component that `registry` or its parent in mmengine holds."""
    names = registry.names()                                 # fills both
    inherited = registry.parent.module_dict if registry.parent is not None else {}
    components = [(name, registry.module_dict.get(name) or inherited[name]) for name in names]
    return [(name, getattr(component, "__module__", None) or type(component).__module__) for name, component in components]


def _owner(module: str, packages: Mapping[str, list[str]]) -> str:
    """The distribution that installed `module`, or its top package where none did."""
    top = module.partition(".")[0]
    return " or ".join(sorted(set(packages.get(top, [top]))))


def show_environment(*, as_json: bool) -> int:
    """Print versions, devices and plugins."""
    import importlib.metadata
    import platform

    import torch

    from visionkit.registry import load_plugins

    facts = {"visionkit": __version__, "python": platform.python_version(), "platform": platform.platform()}
    # Several distributions install the same cv2 or mmcv and the last one wins: list whatever is there.
    for name in ("torch", "torchvision", "mmengine", "mmengine-lite", "mmcv", "mmcv-lite", "opencv-python",
                 "opencv-python-headless", "opencv-contrib-python", "numpy", "scipy", "pycocotools", "faster-coco-eval",
                 "albumentations", "safetensors", "triton", "setuptools"):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for module in ("mmengine", "mmcv", "cv2"):
        try:
            __import__(module)
        except Exception as error:                           # a broken installation is what the report is about
            facts[f"import {module}"] = f"{type(error).__name__}: {error}"
    facts["torch build"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    facts["CPU"] = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        facts[f"GPU {index}"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.device_count():
        facts["GPU"] = "none"
    for plugin in load_plugins():
        state = "failed to import" if plugin.error else "left out by VISIONKIT_PLUGINS" if plugin.left_out else "loaded"
        facts[f"plugin {plugin.name}"] = f"{plugin.distribution}, {state}"

    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        width = max(map(len, facts))
        print("\n".join(f"{name:{width}}  {value}" for name, value in facts.items()))
    return 0


def list_ops(dtype: str = "float32", *, as_json: bool) -> int:
    """Print the tier that serves each op for tensors of `dtype` on each device, and what that depends on."""
    import importlib.metadata

    import torch

    import visionkit.ops
    from visionkit.ops.tiers import tier

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    functions = [name for name in visionkit.ops.__all__ if name.islower()]                # the modules call them
    rows = []
    for device in devices:
        for name in functions:
            chosen = tier(name, torch.device(device), getattr(torch, dtype))
            rows.append({"op": name, "device": device, "tier": chosen.name, "reason": chosen.reason})
    distributions = importlib.metadata.packages_distributions().get("triton", [])         # triton, or a build of it under another name
    triton = ", ".join(importlib.metadata.version(name) for name in sorted(set(distributions))) or None
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]

    if as_json:
        print(json.dumps({"VISIONKIT_OPS": os.environ.get("VISIONKIT_OPS"), "triton": triton, "gpus": gpus, "dtype": dtype, "ops": rows},
                         indent=2))
        return 0
    print(f"VISIONKIT_OPS  {os.environ.get('VISIONKIT_OPS') or 'not set'}")
    print(f"triton         {triton or 'not installed'}")
    print(f"GPU            {', '.join(gpus) or 'none'}")
    print(f"dtype          {dtype}\n")
    print_table(rows, ["op", "device", "tier", "reason"])
    return 0


def print_table(rows: list[dict[str, str]], columns: list[str]) -> None:
    """A table on a terminal; aligned plain columns, for grep, into a pipe or file."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        table = Table(*columns, row_styles=["", "dim"])
        for row in rows:
            table.add_row(*(row[column] for column in columns))
        Console().print(table)
        return
    lines = [columns, *([row[column] for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:                                  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())         # Python flushes once more at exit
        status = 141
    sys.exit(status)
