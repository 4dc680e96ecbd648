"""How long an op takes and how much memory, beside its peers: other implementations of the same thing."""
from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import math
import multiprocessing
import platform
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import visionkit
import visionkit.ops
from visionkit.engine.memory import keep_freed_memory
from visionkit.engine.op_cases import CASES, Case, peers

PASSES = ("forward", "forward + backward")
_SHORTEST_TIMING = 0.01                                      # seconds; what takes less is called several times in a row
# The largest difference, as a share of the largest value, between two results that agree.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_M_MMAP_THRESHOLD = -3                                       # malloc.h


@dataclass
class Measurement:
    """Ours beside one peer; None where something was not measured."""
    op: str
    shape: str
    passes: str                                              # one of PASSES
    device: str
    dtype: str
    peer: str | None = None
    ours_seconds: float | None = None                        # medians
    peer_seconds: float | None = None
    ratios: Sequence[float] = ()                             # times faster, of each two timings that followed each other
    times_faster: float | None = None                        # their median
    bar: float | None = None                                 # what it is to be
    difference: float | None = None                          # the largest one between the results, or between the gradients
    agrees: bool | None = None
    ours_bytes: int | None = None                            # peak memory over the inputs
    peer_bytes: int | None = None
    bytes_bar: float | None = None
    problem: str | None = None                               # why something is missing


def measure(case: Case, *, repeats: int = 9, device: str = "cpu", dtype: torch.dtype = torch.float32, backward: bool = True,
            memory: bool = True) -> Iterator[Measurement]:
    """Compare ours with each peer that is here, and time the two in turns.

    Args:
        repeats: timings of each.
        device: `cpu` or `cuda`.
        dtype: of the floating inputs; a peer that does not take it gets float32.
        backward: forward + backward, too.
        memory: the peak memory, too, of each implementation in a process of its own.
    """
    if case.megabytes and not memory:
        return
    keep_freed_memory()
    implementations = peers(case.op)
    bytes_of = {name: peak_bytes(case, name, device, dtype) if memory else {} for name in (None, *implementations)}
    for index, passes in enumerate(PASSES if backward else PASSES[:1]):
        arguments = case.arguments(device, dtype)
        if index and not _leaves(arguments):
            return
        for name in implementations or [None]:
            row = Measurement(case.op, case.shape, passes, device, str(dtype).removeprefix("torch."), name)
            row.ours_bytes, row.peer_bytes = bytes_of[None].get(passes), bytes_of[name].get(passes) if name else None
            if device == "cpu" and dtype == torch.float32:
                row.bar = case.bars[index] if case.bars and name == case.against else None
                row.bytes_bar = case.megabytes[index] * 1e6 if case.megabytes else None
            if not case.megabytes:
                _compare(row, case, arguments, implementations.get(name), repeats)
            yield row


def _compare(row: Measurement, case: Case, arguments: tuple, function: Callable | None, repeats: int) -> None:
    """Fill in times and difference."""
    ours = functools.partial(getattr(visionkit.ops, case.op), **case.options)
    runs = [Call(ours, _as_leaves(case.for_ours(arguments)), row.passes)]
    if function is None:
        row.problem = "no peer is installed"
    else:
        peer = Call(function, arguments, row.passes)
        try:
            expected = peer()
        except RuntimeError as error:
            row.problem = f"{row.peer} takes float32 instead: {_first_line(error)}"
            peer = Call(function, _as_leaves(value.float() if _is_floating(value) else value for value in arguments), row.passes)
            try:
                expected = peer()
            except RuntimeError as error:
                row.problem = f"{row.peer} fails: {_first_line(error)}"
                peer = None
        if peer is not None:
            runs.append(peer)
            in_the_peers_layout = Call(lambda *arguments: ours(*case.for_ours(arguments)), arguments, row.passes)
            row.difference, row.agrees = difference(in_the_peers_layout(), expected, _TOLERANCE[getattr(torch, row.dtype)])
    turns = in_turns(runs, repeats, row.device)
    row.ours_seconds = statistics.median(turn[0] for turn in turns)
    if len(runs) == 2:
        row.peer_seconds = statistics.median(turn[1] for turn in turns)
        row.ratios = [theirs / mine for mine, theirs in turns]
        row.times_faster = statistics.median(row.ratios)


class Call:
    """`function(*arguments)` with or without the gradients of all arguments that require one."""

    def __init__(self, function: Callable, arguments: tuple, passes: str) -> None:
        self.function = function
        self.arguments = arguments
        self.backward = passes == PASSES[1]
        self.incoming: list[Tensor] | None = None            # gradients of the results: noise, the same for every implementation

    def __call__(self) -> list[Tensor | None]:
        """The results; with `backward`, the gradients in their place."""
        if not self.backward:
            with torch.no_grad():
                return _tensors(self.function(*self.arguments))
        results = [result for result in _tensors(self.function(*self.arguments)) if result.requires_grad]
        if self.incoming is None:
            generator = torch.Generator().manual_seed(0)
            self.incoming = [torch.randn(result.shape, generator=generator).to(result) for result in results]
        return list(torch.autograd.grad(results, _leaves(self.arguments), self.incoming, allow_unused=True))


def in_turns(runs: Sequence[Callable[[], Any]], repeats: int, device: str = "cpu") -> list[list[float]]:
    """Seconds of each of `runs`, one after the other, `repeats` times over: a change in the machine's speed meets them all."""
    calls = [max(1, math.ceil(_SHORTEST_TIMING / _seconds(run, 1, device))) for run in runs]
    return [[_seconds(run, count, device) for run, count in zip(runs, calls, strict=True)] for _ in range(repeats)]


def _seconds(run: Callable[[], Any], calls: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def difference(results: Sequence[Tensor | None], expected: Sequence[Tensor | None], tolerance: float) -> tuple[float | None, bool]:
    """The largest absolute difference, and whether each tensor differs by at most `tolerance` times its largest expected value.

    A gradient that the peer does not have (None) is passed over; results of different shapes have no difference, and do not agree.
    """
    largest, agrees = 0.0, True
    for result, wanted in zip(results, expected, strict=True):
        if result is None or wanted is None:
            continue
        if result.shape != wanted.shape:
            return None, False
        if not result.numel():
            continue
        apart = float((result.double() - wanted.double()).abs().amax())
        largest = max(largest, apart)
        agrees = agrees and apart <= tolerance * max(1.0, float(wanted.abs().amax()))
    return largest, agrees


def peak_bytes(case: Case, peer: str | None, device: str, dtype: torch.dtype) -> dict[str, int]:
    """Peak memory over the inputs by passes, of ours or a peer; measured in a process of its own, empty where that is not possible."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_leave_interrupts_to_the_parent) as process:
        return process.submit(_peaks, case.op, case.shape, peer, device, dtype, torch.get_num_threads()).result()


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _peaks(op: str, shape: str, peer: str | None, device: str, dtype: torch.dtype, threads: int) -> dict[str, int]:
    """What `peak_bytes` runs in the other process, which looks the case up: it cannot be sent."""
    torch.set_num_threads(threads)
    case = next(case for case in CASES if (case.op, case.shape) == (op, shape))
    arguments, found = case.arguments(device, dtype), {}
    if peer is None:
        function, arguments = functools.partial(getattr(visionkit.ops, op), **case.options), _as_leaves(case.for_ours(arguments))
    else:
        function = peers(op)[peer]
    for passes in PASSES if _leaves(arguments) else PASSES[:1]:
        call = Call(function, arguments, passes)
        try:
            call()                                           # libraries set themselves up
            peak = peak_of(call, device)
        except RuntimeError:                                 # the peer has no kernel for this device or type; `measure` says so
            return found
        if peak is None:
            return found
        found[passes] = peak
    return found


def peak_of(call: Callable[[], Any], device: str) -> int | None:
    """Bytes that `call` needs at its peak, its results included; None where the system does not tell."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)             # what is freed goes back to the system, so that the next peak is seen
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")        # sets the peak to the present
    except (OSError, AttributeError):                        # musl; a system without the right to it
        return None
    before = _status("VmRSS")
    call()
    return max(_status("VmHWM") - before, 0)


def _status(key: str) -> int:
    """Bytes that /proc tells of this process."""
    return int(re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024


def environment(device: str) -> dict[str, str]:
    """What the numbers depend on."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE) if Path("/proc/cpuinfo").exists() else None
    facts = {"visionkit": visionkit.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("torchvision", "mmcv", "triton"):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts["CPU"] = f"{cpu[1] if cpu else platform.processor()}, {torch.get_num_threads()} threads"
    if device == "cuda":
        facts["GPU"] = torch.cuda.get_device_name()
    return facts


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [value for value in result if isinstance(value, Tensor)]


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _leaves(arguments: tuple) -> list[Tensor]:
    return [value for value in arguments if isinstance(value, Tensor) and value.requires_grad]


def _as_leaves(arguments: Iterable[Any]) -> tuple:
    """Tensors cut off from what made them; those that required a gradient do so again."""
    return tuple(value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value for value in arguments)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
