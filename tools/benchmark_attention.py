"""Time the kinds of attention beside PyTorch's own: python tools/benchmark_attention.py linear --plot crossing.png"""
from __future__ import annotations

import argparse
import sys


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time flash_attention (tiled), varlen_attention (packed), linear_attention, or a step of the last to one more token, "
                    "beside PyTorch's scaled_dot_product_attention, in turns; the median counts. Exit status 1 when results that should "
                    "be the same are not.")
    parser.add_argument("study", choices=("flash", "varlen", "linear", "generation"))
    parser.add_argument("--lengths", nargs="+", type=int, metavar="N", help="numbers of tokens; of varlen: of one image each")
    parser.add_argument("--heads", type=int, help="default: 8 of flash and generation, 16 of varlen, 1 of linear")
    parser.add_argument("--channels", type=int, help="of a head; default: 64, 72 of varlen")
    parser.add_argument("--causal", action="store_true", help="of flash and linear")
    parser.add_argument("--repeats", type=int, default=9, help="timings of each; the median counts (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32", help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="on the CPU; default: as many as PyTorch takes")
    parser.add_argument("--plot", metavar="PNG", help="draw times over numbers of tokens (pip install matplotlib)")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()                            # before the imports: --help must answer at once
    from visionkit.engine.command_line import run_command
    return run_command(lambda: benchmark(arguments))


def benchmark(arguments: argparse.Namespace) -> int:
    """Measure and print; 1 if results disagree."""
    import torch

    from visionkit.engine.attention_benchmark import (
        IMAGES,
        crossing,
        draw,
        exponent,
        measure_flash,
        measure_generation,
        measure_linear,
        measure_varlen,
    )
    from visionkit.engine.op_benchmark import PASSES, environment
    from visionkit.registry import ConfigError

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch sees no GPU here")
    if min(arguments.repeats, *(arguments.lengths or [1])) < 1:
        raise ConfigError("--repeats and --lengths must be positive")
    if arguments.causal and arguments.study in ("varlen", "generation"):
        raise ConfigError("--causal is for flash and linear")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    measure, lengths = {"flash": (measure_flash, (256, 1024, 4096)), "varlen": (measure_varlen, IMAGES),
                        "linear": (measure_linear, (64, 128, 196, 256, 512, 1024, 2048, 4096, 16384)),
                        "generation": (measure_generation, (256, 1024, 4096, 16384))}[arguments.study]
    options = {"repeats": arguments.repeats, "device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    options |= {name: value for name in ("heads", "channels") if (value := getattr(arguments, name))}
    if arguments.causal:
        options["causal"] = True
    facts = environment(arguments.device)
    print(f"{', '.join(f'{name} {value}' for name, value in facts.items())}; {arguments.device}, {arguments.dtype}, "
          f"median of {arguments.repeats}\n")
    print("| study | tokens | passes | way | ms | times faster | difference |\n|---|---|---|---|---|---|---|")
    rows = []
    for row in measure(arguments.lengths or lengths, **options):
        apart = "" if row.difference is None else f"{row.difference:.0e}{'' if row.agrees else ' DISAGREES'}"
        cells = row.study, str(row.tokens), row.passes, row.way, f"{row.seconds * 1e3:.3g}", f"{row.ratio:.3g}", apart
        print(f"| {' | '.join(cells)} |", flush=True)
        rows.append(row)
    if arguments.study in ("linear", "generation"):
        print()
        for way in dict.fromkeys(row.way for row in rows):
            for passes in [passes for passes in PASSES if any((row.way, row.passes) == (way, passes) for row in rows)]:
                slope, found = exponent(rows, way, passes), crossing(rows, way, passes)
                faster = "" if way == rows[0].way else f", faster from {found} tokens on" if found else ", never always faster"
                print(f"{way}, {passes}: time grows with N^{slope:.2f}{faster}" if slope is not None else f"{way}, {passes}{faster}")
    if arguments.plot:
        draw(rows, arguments.plot, f"{rows[0].study}, {arguments.device}, {arguments.dtype}")
        print(f"\n{arguments.plot}")
    return 1 if any(row.agrees is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
