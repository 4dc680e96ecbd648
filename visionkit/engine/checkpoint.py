"""Checkpoints that never execute anything, are written whole or not at all, and say when they are damaged.

A checkpoint is torch's zip format. The zip comment, which every reader of zip files skips, carries when it was saved and a sha256
over all bytes before it, so that the seal cannot be separated from the file.

Importing this module makes mmengine read and write through it.
"""
from __future__ import annotations

import hashlib
import os
import pickle
import re
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import barrier, get_rank
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner.checkpoint import CheckpointLoader, get_torchvision_models
from torch import Tensor, nn

from visionkit.registry import ConfigError, did_you_mean

SEAL = b"visionkit saved_ns:%020d sha256:"                   # 19 letters, 20 digits, 8 letters, and then 64 digits of the digest
SEAL_LENGTH = len(SEAL % 0) + 64
TEMPORARY = ".partial"                                       # ends the name of a file that is being written
WRAPPED = "_checkpoint_wrapped_module."                      # in names of parts whose activations are computed again
COMPILED = re.compile(r"^(module\.)?_orig_mod\.")             # before the names of a compiled model, one process's or several
ENOUGH = 0.9                                                 # share of a model's values that load_from has to fill
RESNETS = {name: f"https://download.pytorch.org/models/{name}-{digest}.pth" for name, digest in (
    ("resnet18", "f37072fd"), ("resnet34", "b627a593"), ("resnet50", "0676ba61"), ("resnet101", "63fe2227"))}     # of torchvision


class CheckpointError(ConfigError):
    """A checkpoint that is damaged, holds what is never loaded, or does not fit the model."""


class NotResumable(CheckpointError):
    """A checkpoint in good order that holds weights, and not the state of a run."""


# ---------------------------------------------------------------------------------------------------------------- writing

def write_atomically(path: str | os.PathLike, *parts: bytes | memoryview) -> None:
    """Write `parts` to `path` so that after a crash at any moment the old file or the new one is there, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    with open(partial, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    if os.name == "posix":                                   # the new name has to reach the disk as well
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sweep_partial_files(folder: str | os.PathLike) -> list[str]:
    """Delete what killed runs left half-written in `folder`; the names deleted."""
    leftover = sorted(Path(folder).glob(f"*{TEMPORARY}"))
    for path in leftover:
        path.unlink(missing_ok=True)
    return [path.name for path in leftover]


def sealed(data: bytes, saved_ns: int) -> tuple[memoryview, bytes]:
    """The parts of a file that holds the torch zip archive `data` with a seal as its comment."""
    seal = SEAL % saved_ns
    body, length = memoryview(data)[:-2], struct.pack("<H", SEAL_LENGTH)  # a zip ends with the length of its comment, 0 here
    digest = hashlib.sha256(body)
    digest.update(length + seal)
    return body, length + seal + digest.hexdigest().encode()


class AtomicLocalBackend(LocalBackend):
    """mmengine's local files, written whole or not at all; torch archives are sealed on the way."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        parts = sealed(obj, time.time_ns()) if _is_zip(obj) and obj[-2:] == b"\0\0" else (obj,)
        write_atomically(filepath, *parts)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        write_atomically(filepath, obj.encode(encoding))


register_backend("local", AtomicLocalBackend, force=True, prefixes="")


# ---------------------------------------------------------------------------------------------------------------- reading

def saved_ns(path: str | os.PathLike) -> int:
    """When a checkpoint was saved, in nanoseconds since 1970: from its seal, or else from the file's time stamp."""
    try:
        return int(_read_seal(path)[19:39])
    except ValueError:                                       # no seal, or a damaged one
        return os.stat(path).st_mtime_ns


def verify_seal(path: str | os.PathLike) -> bool:
    """Whether the file has a seal; one that has and does not match it is an error.

    Raises:
        CheckpointError: the file is not what was written.
    """
    seal = _read_seal(path)
    if not seal:
        return False
    digest = hashlib.sha256()
    remaining = os.path.getsize(path) - 64
    with open(path, "rb") as file:
        while remaining:
            block = file.read(min(remaining, 1 << 20))
            digest.update(block)
            remaining -= len(block)
    if digest.hexdigest().encode() != seal[-64:]:
        raise CheckpointError(f"{path} is damaged: its content does not match the sha256 it carries")
    return True


def read_checkpoint(path: str | os.PathLike, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """What a .pth or .safetensors file holds: at least `state_dict`, and for a checkpoint of a run also `meta` and the rest.

    Nothing in the file is executed, neither by reading it nor later: text that mmengine would run as a config is left out.

    Args:
        path: the file.
        map_location: where the tensors go, as in `torch.load`.
        mmap: leave the tensors on disk until they are used.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it holds objects other than tensors and plain values.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        folder, name = os.path.split(path)
        files = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
        raise CheckpointError(f"no checkpoint {str(path)!r}.{did_you_mean(name, files)}")
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file  # a format without code by design
        try:
            return {"state_dict": _unwrapped(load_file(path, device=str(map_location or "cpu")))}
        except Exception as error:                           # SafetensorError, OSError, ...
            raise CheckpointError(f"{path} cannot be read, it may be cut short: {type(error).__name__}: {error}") from error
    if not verify_seal(path):
        print_log(f"{path} carries no checksum, so it is loaded unverified", logger="current")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise CheckpointError(
                f"{path} holds more than tensors and plain values, and is refused because loading it could run what is in it. "
                f"Save it again as torch.save({{'state_dict': model.state_dict()}}) where it came from. "
                f"({str(error).strip().splitlines()[0]})") from error
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except Exception as error:                               # a truncated file gives EOFError, RuntimeError, OSError, ...
        raise CheckpointError(f"{path} cannot be read, it may be cut short: {type(error).__name__}: {error}") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    if "state_dict" not in checkpoint:                       # the bare weights, as torchvision saves them
        checkpoint = {"state_dict": checkpoint}
    checkpoint["state_dict"] = _unwrapped(checkpoint["state_dict"])
    if isinstance(checkpoint.get("meta"), dict):
        checkpoint["meta"].pop("config", None)               # Runner.resume of mmengine runs it as Python
    return checkpoint


def _unwrapped(state_dict: Any) -> Any:
    """Names without what torch's `checkpoint_wrapper` puts into them, and `torch.compile` before those of a whole model. A model that is
    wrapped takes names without it, too; a part that is compiled does not, so in the middle of names `_orig_mod.` stays."""
    if not isinstance(state_dict, dict) or not all(isinstance(key, str) for key in state_dict):
        return state_dict
    compiled = all(COMPILED.match(key) for key in state_dict)
    if not compiled and not any(WRAPPED in key for key in state_dict):
        return state_dict                                    # with torch's versions of its parts, which a plain dict does not carry
    return {(COMPILED.sub("", key) if compiled else key).replace(WRAPPED, ""): value for key, value in state_dict.items()}


def write_average(path: str | os.PathLike, checkpoints: Sequence[str | os.PathLike]) -> int:
    """Write the mean of the weights of `checkpoints` as .safetensors; counts, such as that of batches seen, are those of the last one.

    Returns:
        how many tensors there are.

    Raises:
        CheckpointError: there are fewer than two, one cannot be read, or they are not of one model.
    """
    from safetensors.torch import save

    if len(checkpoints) < 2 or not str(path).endswith(".safetensors"):
        raise CheckpointError(f"the mean of two checkpoints or more is written as .safetensors; got {len(checkpoints)} and the name {path}")
    total: dict[str, Tensor] = {}
    for number, checkpoint in enumerate(checkpoints):
        weights = read_checkpoint(checkpoint)["state_dict"]
        shapes, wanted = ({key: tuple(value.shape) for key, value in some.items()} for some in (weights, total or weights))
        differ = sorted(key for key in {*shapes, *wanted} if shapes.get(key) != wanted.get(key))
        if differ:
            raise CheckpointError(f"{checkpoint} and {checkpoints[0]} are not of one model: they differ in {', '.join(differ[:5])}"
                                  + (f" and {len(differ) - 5} more" if len(differ) > 5 else ""))
        for key, value in weights.items():
            if not value.is_floating_point():
                total[key] = value.clone()
            elif number:
                total[key] += value
            else:
                total[key] = value.double()
    for key, value in total.items():
        if value.is_floating_point():
            total[key] = (value / len(checkpoints)).to(weights[key].dtype)
    write_atomically(path, save({key: value.contiguous() for key, value in total.items()}, {"format": "pt"}))
    return len(total)


def load_from_file(filename: str, map_location: Any = None) -> dict[str, Any]:
    """`read_checkpoint` as mmengine calls it."""
    return read_checkpoint(filename, map_location)


def load_from_url(filename: str, map_location: Any = None) -> dict[str, Any]:
    """`read_checkpoint` of a file downloaded once into torch's cache."""
    cached = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(urlparse(filename).path))
    try:
        if not os.path.isfile(cached) and get_rank() == 0:
            os.makedirs(os.path.dirname(cached), exist_ok=True)
            torch.hub.download_url_to_file(filename, cached)     # by way of a temporary file
    finally:
        barrier()                                            # also after an error: the others must not wait for ever
    return read_checkpoint(cached, map_location)


def load_from_torchvision(filename: str, map_location: Any = None) -> dict[str, Any]:
    """torchvision's own weights: of a ResNet, such as `torchvision://resnet50`; of the rest only torchvision knows where they are."""
    name = filename.partition("://")[2]
    try:
        urls = RESNETS if name in RESNETS else get_torchvision_models()
    except ImportError:
        raise CheckpointError(f"to know where {filename!r} is takes torchvision: pip install torchvision. Without it there are "
                              f"{', '.join(RESNETS)}") from None
    if name not in urls:
        raise CheckpointError(f"torchvision has no weights named {name!r}.{did_you_mean(name, urls)}")
    return load_from_url(urls[name], map_location)


def load_from_elsewhere(filename: str, map_location: Any = None) -> dict[str, Any]:
    raise CheckpointError(f"checkpoints come from files, http(s)://... or torchvision://..., not from {filename!r}")


# mmengine's own loaders of URLs run what is in a pickle, so every way into its loader is replaced.
CheckpointLoader.register_scheme([prefix for prefix in CheckpointLoader._schemes if prefix], loader=load_from_elsewhere, force=True)
CheckpointLoader.register_scheme("", loader=load_from_file, force=True)
CheckpointLoader.register_scheme(["http://", "https://"], loader=load_from_url, force=True)
CheckpointLoader.register_scheme("torchvision://", loader=load_from_torchvision, force=True)


def _is_zip(data: bytes) -> bool:
    return data[:4] == b"PK\x03\x04"


def _read_seal(path: str | os.PathLike) -> bytes:
    """The seal, or nothing where there is none; what remains of a damaged one is an error."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - SEAL_LENGTH - 22))           # 22: the zip's last record, which ends with the length of its comment
        tail = file.read()
    seal = tail[-SEAL_LENGTH:]
    if len(tail) > SEAL_LENGTH and seal.startswith(SEAL[:19]) and seal[19:39].isdigit() and seal[39:47] == SEAL[-8:]:
        return seal
    _, is_zip, record = tail.rpartition(b"PK\5\6")
    if SEAL[:19] in tail or SEAL[-8:] in tail or is_zip and record[16:18] == struct.pack("<H", SEAL_LENGTH):
        raise CheckpointError(f"{path} is damaged: the seal at its end is not whole")
    return b""


# ------------------------------------------------------------------------------------------------------------ plain values

def to_plain(value: Any) -> Any:
    """`value` without what a safe loader refuses: numpy and mmengine's history buffers become plain, functions in a dict are
    left out (schedulers have some in their state, and get them from their constructor anyway)."""
    if isinstance(value, HistoryBuffer):
        return {"history": torch.tensor(value._log_history, dtype=torch.float64), "counts": torch.tensor(value._count_history)}
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy()) if value.dtype.kind in "biuf" else value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {to_plain(key): to_plain(item) for key, item in value.items() if not callable(item)}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [to_plain(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str, bytes, Tensor)):
        return value
    return repr(value)


def to_history(log_scalars: Mapping[str, Any]) -> dict[str, HistoryBuffer]:
    """The history buffers of a message hub, back from what `to_plain` made of them."""
    return {key: HistoryBuffer(value["history"].cpu().numpy(), value["counts"].cpu().numpy())
            for key, value in log_scalars.items()}


# ---------------------------------------------------------------------------------------------------------------- resuming

@dataclass
class Resumable:
    """The checkpoint to go on from with its `meta`, and which newer ones were passed over, with the reason."""
    path: Path | None
    passed_over: dict[str, str]
    damaged: bool = False                                    # whether one was passed over that a run could have resumed from
    meta: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        skipped = "".join(f"\n  passed over {name}: {reason}" for name, reason in self.passed_over.items())
        return (f"resuming from {self.path}, the newest readable checkpoint" if self.path else "no checkpoint to resume from") + skipped


def find_resumable(work_dir: str | os.PathLike) -> Resumable:
    """The newest checkpoint of a run in `work_dir` that can be read, whole and verified.

    A moved folder, a lost or stale `last_checkpoint`, and damaged files are no obstacle. Newest is by when it was saved.
    """
    work_dir = Path(work_dir)
    candidates = set(work_dir.glob("*.pth"))
    pointer = work_dir / "last_checkpoint"
    if pointer.is_file():                                    # it may lead to another folder, see CheckpointHook.out_dir
        target = work_dir / pointer.read_text().strip()
        candidates |= set(target.parent.glob("*.pth"))
    passed_over, damaged = {}, False
    for path in sorted(candidates, key=saved_ns, reverse=True):
        try:
            return Resumable(path, passed_over, damaged, read_resumable(path)["meta"])
        except (CheckpointError, OSError) as error:
            passed_over[path.name] = str(error)
            damaged |= not isinstance(error, NotResumable)
    return Resumable(None, passed_over, damaged)


def read_resumable(path: str | os.PathLike) -> dict[str, Any]:
    """What a checkpoint holds, its tensors still on disk.

    Raises:
        NotResumable: it has no more than weights.
        CheckpointError: it cannot be read.
    """
    checkpoint = read_checkpoint(path, mmap=not str(path).endswith(".safetensors"))
    missing = [key for key in ("meta", "message_hub", "optimizer") if key not in checkpoint]
    if missing:
        raise NotResumable(f"{path} holds weights only ({', '.join(missing)} missing), from which no run resumes; to start a new run "
                           f"from them, use load_from")
    return checkpoint


# ---------------------------------------------------------------------------------------------------------------- weights

def check_fit(model: nn.Module, state_dict: Mapping[str, Tensor], source: str, share: float = ENOUGH) -> None:
    """Whether `state_dict` fills at least `share` of the values (weights and buffers) of `model`.

    Raises:
        CheckpointError: it fills fewer; lists what is missing, unexpected, or of another shape.
    """
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    given = {key.removeprefix("module."): tuple(value.shape) for key, value in state_dict.items()}
    missing = [key for key in wanted if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in wanted]
    misshapen = [key for key in wanted if key in given and given[key] != wanted[key]]
    total = sum(_size(shape) for shape in wanted.values())
    filled = total - sum(_size(wanted[key]) for key in missing + misshapen)
    if filled >= share * total and (share < 1 or not missing + misshapen):
        return
    raise CheckpointError(
        f"{source} fills {filled / max(total, 1):.1%} of the model's values, and at least {share:.0%} are wanted.\n"
        + _listing("missing in the file", missing)
        + _listing("of another shape (model <- file)", [f"{key} {wanted[key]} <- {given[key]}" for key in misshapen])
        + _listing("in the file only", unexpected)
        + ("To load what fits nevertheless, set load_from_strict=False in the config." if share < 1 else
           "A run is resumed with the model it was started with; to start a new one from these weights use load_from."))


def part_of(model: nn.Module, name: str, at: str = "load_from_part") -> nn.Module:
    """The part of `model` that the key `at` of a config names, such as `backbone` or `roi.pooling`.

    Raises:
        ConfigError: the model has no such part.
    """
    part = model
    for piece in str(name).split("."):
        children = dict(part.named_children())
        if piece not in children:
            raise ConfigError(f"{type(part).__name__} has no part {piece!r}.{did_you_mean(piece, children)} It has: {', '.join(children)}.",
                              (at,))
        part = children[piece]
    return part


def load_weights(model: nn.Module, path: str | os.PathLike, strict: bool = True) -> None:
    """Load the weights of a .pth or .safetensors file into `model`.

    Args:
        model: receives them, on whatever device it is.
        path: the file.
        strict: whether a file that fills under 90 % of the model is an error.

    Raises:
        CheckpointError: the file is damaged, unsafe, or does not fit.
    """
    from mmengine.runner.checkpoint import _load_checkpoint_to_model

    checkpoint = read_checkpoint(path)
    if strict:
        check_fit(model, checkpoint["state_dict"], str(path))
    _load_checkpoint_to_model(model, checkpoint, logger="current")


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _listing(title: str, keys: list[str], most: int = 12) -> str:
    if not keys:
        return ""
    more = f", and {len(keys) - most} more" if len(keys) > most else ""
    return f"  {title} ({len(keys)}): {', '.join(keys[:most])}{more}\n"
