"""Time the ops against their peers: python tools/benchmark_ops.py"""
from __future__ import annotations

import argparse
import sys


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time each op beside each peer that is installed (torchvision, mmcv with its compiled ops, plain PyTorch), in turns, "
                    "after checking that they agree. pip install -e '.[bench]' brings torchvision. Exit status 1 when results disagree.")
    parser.add_argument("--ops", nargs="+", metavar="NAME", help="only these; --list names them")
    parser.add_argument("--list", action="store_true", help="list what would be measured, and against what")
    parser.add_argument("--repeats", type=int, default=9, help="timings of each; the median counts (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32", help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="on the CPU; default: as many as PyTorch takes")
    parser.add_argument("--no-backward", action="store_true", help="measure the forward pass only")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory, which takes a process for each implementation")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured, each ratio included")
    parser.add_argument("--markdown", action="store_true", help="print the table as docs/ops.md shows it")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()                            # before the imports: --help must answer at once
    from visionkit.engine.command_line import run_command
    return run_command(lambda: benchmark(arguments))


def benchmark(arguments: argparse.Namespace) -> int:
    """Measure and print; 1 if ours disagrees with a peer, 130 if Ctrl-C or SIGTERM ended it early."""
    import importlib.util
    import signal

    import torch

    from visionkit.engine.op_benchmark import environment, measure
    from visionkit.engine.op_cases import CASES, peers
    from visionkit.registry import ConfigError, did_you_mean

    names = list(dict.fromkeys(case.op for case in CASES))
    for name in arguments.ops or ():
        if name not in names:
            raise ConfigError(f"nothing is measured of {name!r}.{did_you_mean(name, names)} Ops: {', '.join(names)}")
    cases = [case for case in CASES if case.op in (arguments.ops or names)]
    if arguments.list:
        _print([{"op": case.op, "case": case.shape, "peers": ", ".join(peers(case.op)) or "none"} for case in cases], arguments.markdown)
        return 0
    if arguments.repeats < 1:
        raise ConfigError(f"--repeats must be positive, got {arguments.repeats}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch sees no GPU here")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if importlib.util.find_spec("torchvision") is None:
        print("torchvision is not installed, so most ops have no peer: pip install -e '.[bench]'", file=sys.stderr)

    facts, rows, status = environment(arguments.device), [], 0
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)                    # what was measured is not lost
    try:
        for index, case in enumerate(cases):
            _progress(f"{index + 1} of {len(cases)}: {case.op}, {case.shape}")
            for row in measure(case, repeats=arguments.repeats, device=arguments.device, dtype=getattr(torch, arguments.dtype),
                               backward=not arguments.no_backward, memory=not arguments.no_memory):
                rows.append(row)
    except KeyboardInterrupt:
        status = 130
    finally:
        signal.signal(signal.SIGTERM, before)
    _progress("")
    print(f"{', '.join(f'{name} {value}' for name, value in facts.items())}; {arguments.device}, {arguments.dtype}, "
          f"median of {arguments.repeats}\n")
    _print([_cells(row) for row in rows], arguments.markdown)
    for row in rows:
        if row.problem and row.peer:
            print(f"\n{row.op}, {row.shape}, {row.passes}: {row.problem}")
    bars = [row.times_faster >= row.bar for row in rows if row.bar and row.times_faster]
    bars += [row.ours_bytes <= row.bytes_bar for row in rows if row.bytes_bar and row.ours_bytes]
    if bars:
        print(f"\n{sum(bars)} of {len(bars)} bars met")
    if arguments.json:
        _write_json(arguments.json, facts, rows)
    if status:
        print("\nstopped; that is what was measured until then", file=sys.stderr)
        return status
    return 1 if any(row.agrees is False for row in rows) else 0


def _cells(row) -> dict[str, str]:
    """A measurement as the table shows it."""
    met = "" if row.bar is None or row.times_faster is None else ", met" if row.times_faster >= row.bar else ", MISSED"
    held = "" if row.bytes_bar is None or row.ours_bytes is None else ", met" if row.ours_bytes <= row.bytes_bar else ", MISSED"
    apart = "" if row.agrees is None else f"{row.difference:.0e}" if row.difference else "0" if row.agrees else ""
    return {"op": row.op, "case": row.shape, "passes": row.passes, "ms": _milliseconds(row.ours_seconds), "peer": row.peer or "none",
            "peer ms": _milliseconds(row.peer_seconds), "times faster": "" if row.times_faster is None else f"{row.times_faster:.3g}",
            "bar": "" if row.bar is None else f"{row.bar:g}{met}",
            "MB": "" if row.ours_bytes is None else f"{row.ours_bytes / 1e6:.0f}",
            "peer MB": "" if row.peer_bytes is None else f"{row.peer_bytes / 1e6:.0f}",
            "MB bar": "" if row.bytes_bar is None else f"{row.bytes_bar / 1e6:.0f}{held}",
            "difference": f"{apart} DISAGREES".strip() if row.agrees is False else apart}


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _print(rows: list[dict[str, str]], markdown: bool) -> None:
    from visionkit.__main__ import print_table
    if not rows:
        return
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    if not markdown:
        return print_table(rows, columns)
    for cells in (columns, ["---"] * len(columns), *([row[name] for name in columns] for row in rows)):
        print(f"| {' | '.join(cells)} |")


def _progress(text: str) -> None:
    """What is measured now, on a terminal, in a line that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _write_json(path: str, facts: dict[str, str], rows: list) -> None:
    import dataclasses
    import json
    from pathlib import Path
    Path(path).write_text(json.dumps({"environment": facts, "rows": [dataclasses.asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
