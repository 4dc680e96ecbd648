"""Checkpoints of other projects into ours, by the tables of `checkpoint_formats`: every key is mapped, or left out for a stated reason."""
from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

import visionkit
from visionkit.engine.checkpoint import CheckpointError, read_checkpoint, write_atomically
from visionkit.engine.checkpoint_formats import CATEGORIES, FORMATS, ClassRows, Drop, Format, Repeat, Request, Rule, Zeros
from visionkit.registry import ConfigError, did_you_mean

# ---------------------------------------------------------------------------------------------------------------- the names

_PLACEHOLDERS = {"i": r"\d+", "j": r"\d+", "p": "weight|bias", "rest": ".+"}
_BRACES = re.compile(r"\{([^{}]*)\}")


class Name(NamedTuple):
    """A key with its placeholders and its choice, see `checkpoint_formats`."""
    template: str
    pattern: re.Pattern
    choice: tuple[str, ...]                 # empty: there is none

    @classmethod
    def parse(cls, template: str) -> Name:
        choice: tuple[str, ...] = ()
        pattern = ""
        for index, part in enumerate(_BRACES.split(template)):
            if index % 2 == 0:
                pattern += re.escape(part)
            elif part in _PLACEHOLDERS:
                pattern += f"(?P<{part}>{_PLACEHOLDERS[part]})"
            else:
                choice = tuple(part.split(","))
                pattern += f"(?P<choice>{'|'.join(map(re.escape, choice))})"
        return cls(template, re.compile(pattern), choice)

    def match(self, key: str) -> tuple[dict[str, str], int | None] | None:
        """What stands for the placeholders, and which of the choice it is; None where `key` is not such a name."""
        found = self.pattern.fullmatch(key)
        if not found:
            return None
        values = found.groupdict()
        taken = values.pop("choice", None)
        return values, None if taken is None else self.choice.index(taken)

    def fill(self, values: Mapping[str, str], index: int | None) -> str:
        """The key with `values` for the placeholders and number `index` of the choice."""
        def part(found: re.Match) -> str:
            return values[found[1]] if found[1] in _PLACEHOLDERS else self.choice[index]
        return _BRACES.sub(part, self.template)


# -------------------------------------------------------------------------------------------------------------- the conversion

@dataclass
class Conversion:
    """Weights in our form, and how they came about."""
    name: str                                                # of the format
    format: Format
    state_dict: dict[str, Tensor] = field(default_factory=dict)
    mapped: dict[Rule, list[str]] = field(default_factory=lambda: defaultdict(list))            # the keys that each rule took
    dropped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))            # reason -> keys left out
    added: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))              # reason -> our names without a key


def convert(state_dict: Mapping[str, Tensor], model: nn.Module, source_format: str | None = None,
            classes: str | None = None) -> dict[str, Tensor]:
    """The weights of another project's model as those of ours: `model.load_state_dict(convert(theirs, model))`.

    Args:
        state_dict: their tensors by their keys.
        model: ours, as the config builds it.
        source_format: a name of `FORMATS`; None: recognised by the keys.
        classes: a name of `CATEGORIES`, where the checkpoint has a row for every category number and our model one for each category;
            None: all rows as they are.

    Returns:
        our tensors by our names, of the format's `part` of the model.

    Raises:
        ConfigError: the format is unknown, a key is not in its table, or the model does not fit; names every key concerned.
    """
    return plan(state_dict, model, source_format, classes).state_dict


def plan(state_dict: Mapping[str, Tensor], model: nn.Module, source_format: str | None = None, classes: str | None = None) -> Conversion:
    """`convert`, with an account of what became of each key."""
    state_dict = {key.removeprefix("module."): tensor for key, tensor in state_dict.items()}      # as DistributedDataParallel saves
    name = recognise(state_dict) if source_format is None else source_format
    if name not in FORMATS:
        raise ConfigError(f"no checkpoint format {name!r}.{did_you_mean(name, FORMATS)} Known: {', '.join(FORMATS)}.")
    done = Conversion(name, FORMATS[name])
    ours = _tensors_of(model, done.format)
    request = Request({key: tuple(value.shape) for key, value in ours.items()}, _categories(classes, done), _part_of(model, done.format))
    problems = Problems()
    for piece in _pieces(state_dict, done, problems):
        _place(piece, ours, request, done, problems)
    _fill_tied(ours, done, problems)
    _fill_missing(ours, done)
    problems.missing += [key for key in ours if key not in done.state_dict]
    problems.raise_if_any(done, model)
    done.state_dict = {key: done.state_dict[key] for key in ours}
    return done


def recognise(keys: Iterable[str]) -> str:
    """The name of the format that a checkpoint with these keys is in.

    Raises:
        CheckpointError: none, or more than one.
    """
    keys = set(keys)
    found = [name for name, form in FORMATS.items() if keys.issuperset(form.recognised_by)]
    if len(found) == 1:
        return found[0]
    known = "".join(f"\n  {name}: {form.title}, which has {', '.join(form.recognised_by)}" for name, form in FORMATS.items())
    reason = f"fits the formats {', '.join(found)}; say which with --from" if found else "is in no known format"
    raise CheckpointError(f"the checkpoint {reason}. Its first keys are {', '.join(sorted(keys)[:4]) or 'none'}. Known formats:{known}")


@dataclass
class Problems:
    """What is in the way of a conversion."""
    unmapped: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    classes: bool = False                   # whether tensors of another shape have rows for classes

    def raise_if_any(self, done: Conversion, model: nn.Module) -> None:
        listings = (
            _listing("not in the format's table", self.unmapped)
            + _listing("not in the config's model", self.unexpected)
            + _listing("of another shape (model <- checkpoint)", self.misshapen)
            + _listing("two keys for one tensor of the model, with different values", self.differing)
            + _listing("in the model, and not in the checkpoint", self.missing))
        if not listings:
            return
        hint = ""
        if self.classes:
            hint = (f"The numbers of classes differ: set num_classes in the config to the checkpoint's, or take the rows of some classes "
                    f"with --classes ({', '.join(CATEGORIES)}).\n")
        raise CheckpointError(f"the checkpoint ({done.name}: {done.format.title}) cannot become that of the config's "
                              f"{type(model).__name__}:\n{listings}{hint}".rstrip())


class Piece(NamedTuple):
    """A tensor on its way."""
    rule: Rule
    sources: tuple[str, ...]                # one key, or those that were put together
    target: str
    tensor: Tensor


def _pieces(state_dict: Mapping[str, Tensor], done: Conversion, problems: Problems) -> Iterator[Piece]:
    """What the rules make of every key, in the order of the keys."""
    parts: dict[tuple[Rule, str], dict[int, tuple[str, Tensor]]] = defaultdict(dict)         # by rule and target, what is put together
    names = {rule: (Name.parse(rule.source), Name.parse(rule.target) if isinstance(rule, Rule) else None)
             for rule in done.format.rules if isinstance(rule, Rule | Drop)}
    for key, tensor in state_dict.items():
        spelled = key
        for other, own in done.format.spellings:
            spelled = spelled.replace(other, own)
        rule, found = next(((rule, found) for rule, (source, _) in names.items() if (found := source.match(spelled))), (None, None))
        if rule is None:
            problems.unmapped.append(key + _nearest(spelled, [source.template for source, _ in names.values()]))
        elif isinstance(rule, Drop):
            done.dropped[rule.reason].append(key)
        else:
            (values, chosen), (source, target) = found, names[rule]
            if source.choice and not target.choice:
                found_so_far = parts[rule, target.fill(values, chosen)]
                found_so_far[chosen] = (key, tensor)
                if len(found_so_far) == len(source.choice):
                    yield from _together(rule, target.fill(values, chosen), found_so_far, problems)
                    del parts[rule, target.fill(values, chosen)]
            elif source.choice or not target.choice:
                yield Piece(rule, (key,), target.fill(values, chosen), tensor)
            elif tensor.ndim == 0 or len(tensor) % len(target.choice):
                problems.misshapen.append(f"{key} {list(tensor.shape)} is to be cut into {len(target.choice)} equal parts")
            else:
                for index, share in enumerate(tensor.chunk(len(target.choice))):
                    yield Piece(rule, (key,), target.fill(values, index), share)
    for (rule, name), some in parts.items():
        problems.misshapen.append(f"{name} is put together from {len(names[rule][0].choice)} tensors, and there is only "
                                  f"{', '.join(key for key, _ in some.values())}")


def _together(rule: Rule, target: str, parts: Mapping[int, tuple[str, Tensor]], problems: Problems) -> Iterator[Piece]:
    """Tensors row by row, in the order of the choice."""
    keys, tensors = zip(*(parts[index] for index in sorted(parts)), strict=True)
    if len({tensor.shape[1:] for tensor in tensors}) > 1 or any(tensor.ndim == 0 for tensor in tensors):
        shapes = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in zip(keys, tensors, strict=True))
        problems.misshapen.append(f"{target} <- {shapes}")
    else:
        yield Piece(rule, keys, target, torch.cat(tensors))


def _place(piece: Piece, ours: Mapping[str, Tensor], request: Request, done: Conversion, problems: Problems) -> None:
    """Put a tensor where it belongs, if it fits."""
    rule, sources, target, tensor = piece
    source = ", ".join(sources)
    if target not in ours:
        if rule.unless_built and not _is_built(rule, target, ours):
            done.dropped[rule.unless_built] += sources
        else:
            problems.unexpected.append(f"{target} (from {source})")
        return
    wanted, misfit = ours[target], ""
    try:
        changed = rule.operation(tensor, request) if rule.operation else tensor
    except (ValueError, RuntimeError, LookupError) as error:
        changed, misfit = tensor, f": {error}"
    if tensor.is_floating_point() != wanted.is_floating_point():
        misfit = f": {tensor.dtype} is not for {wanted.dtype}"                                   # such as a quantised one
    if misfit or changed.shape != wanted.shape:
        problems.misshapen.append(f"{target} {list(wanted.shape)} <- {source} {list(tensor.shape)}{misfit}")
        problems.classes |= isinstance(rule.operation, ClassRows)
    changed = changed.detach().to(wanted.device, wanted.dtype)
    if target in done.state_dict and not torch.equal(done.state_dict[target], changed):
        problems.differing.append(f"{target} (from {source} and a key before)")
    done.state_dict[target] = changed
    if done.mapped[rule][-1:] != [sources[-1]]:              # once for a key that is cut
        done.mapped[rule] += sources


def _is_built(rule: Rule, target: str, ours: Iterable[str]) -> bool:
    """Whether our model has any name of the same rule and choice as `target`: then it is not the whole part that is missing."""
    name = Name.parse(rule.target)
    chosen = name.match(target)[1]
    return any(found[1] == chosen for key in ours if (found := name.match(key)))


def _tensors_of(model: nn.Module, form: Format) -> dict[str, Tensor]:
    """What a checkpoint in this format is to fill: parameters and buffers by name, those with two names twice."""
    tensors = _part_of(model, form).state_dict(keep_vars=True)
    return {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}


def _part_of(model: nn.Module, form: Format) -> nn.Module:
    return getattr(model, form.part, model) if form.part else model


def _categories(classes: str | None, done: Conversion) -> tuple[int, ...] | None:
    if classes is None:
        return None
    if classes not in CATEGORIES:
        raise ConfigError(f"no set of classes {classes!r}.{did_you_mean(classes, CATEGORIES)} Known: {', '.join(CATEGORIES)}.")
    if not any(isinstance(rule, Rule) and isinstance(rule.operation, ClassRows) for rule in done.format.rules):
        raise ConfigError(f"--classes {classes}: checkpoints in the format {done.name} have no rows by category number to choose from")
    return CATEGORIES[classes]


def _fill_tied(ours: Mapping[str, Tensor], done: Conversion, problems: Problems) -> None:
    """Names of one and the same tensor of the model get the same values."""
    names_of: dict[int, list[str]] = defaultdict(list)
    for name, value in ours.items():
        names_of[id(value)].append(name)
    for names in names_of.values():
        given = [name for name in names if name in done.state_dict]
        for name in names if given else ():
            if name not in done.state_dict:
                done.state_dict[name] = done.state_dict[given[0]]
                done.added["the same tensor as another, in the config's model"].append(name)
            elif not torch.equal(done.state_dict[name], done.state_dict[given[0]]):
                problems.differing.append(f"{name} and {given[0]}, which are one tensor in the model")


def _fill_missing(ours: Mapping[str, Tensor], done: Conversion) -> None:
    """What the table says of names that no key leads to."""
    given = set(done.state_dict)
    for rule in done.format.rules:
        if isinstance(rule, Zeros):
            name = Name.parse(rule.target)
            for target in [target for target in ours if target not in given and name.match(target)]:
                done.state_dict[target] = torch.zeros_like(ours[target]).detach()
                done.added[f"zero: {rule.reason}"].append(target)
        elif isinstance(rule, Repeat):
            name, first = Name.parse(rule.target), Name.parse(rule.first)
            alike = {target: first.fill(found[0], None) for target in ours if (found := name.match(target))}
            if not any(target in given for target, origin in alike.items() if target != origin):
                for target, origin in alike.items():
                    if origin in given and target != origin:
                        done.state_dict[target] = done.state_dict[origin]
                        done.added[f"repeated: {rule.reason}"].append(target)


def _nearest(key: str, templates: Sequence[str]) -> str:
    """The rule that a key comes nearest to, for an error."""
    form = re.sub(r"(?<=\.)\d+(?=\.)", "{i}", re.sub(r"(weight|bias)$", "{p}", key))
    near = difflib.get_close_matches(form, templates, n=1, cutoff=0.5)
    return f" (nearest rule: {near[0]})" if near else ""


def _listing(title: str, lines: Sequence[str], most: int = 12) -> str:
    if not lines:
        return ""
    more = f"\n    and {len(lines) - most} more" if len(lines) > most else ""
    return f"  {title} ({len(lines)}):" + "".join(f"\n    {line}" for line in lines[:most]) + more + "\n"


# ------------------------------------------------------------------------------------------------------------------- the files

@dataclass
class Foreign:
    """What a checkpoint of another project holds."""
    state_dict: dict[str, Tensor]
    beside: list[str]                       # what else is in the file, by its name there
    unread: list[str]                       # classes of objects in the file, of which nothing was read


def read_foreign(path: str | os.PathLike) -> Foreign:
    """The tensors of anybody's checkpoint: a .pth, .pt, .bin or .safetensors file, or the .index.json of a checkpoint in several files.

    Nothing in the file is executed. Where `read_checkpoint` refuses a file for Python objects in it, such as the command line that the
    authors of DETR save, here an empty shell takes the place of each object: its class is never looked up.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it does not hold tensors by name.
    """
    if str(path).endswith(".index.json"):
        return Foreign(_read_shards(Path(path)), [], [])
    shells: dict[str, type] = {}
    while True:
        try:
            with torch.serialization.safe_globals(list(shells.values())):
                checkpoint = read_checkpoint(path)
            break
        except CheckpointError as error:
            refused = re.search(r"GLOBAL (\S+)\.(\w+) was not an allowed global", str(error.__cause__))
            if refused is None or refused[0] in shells:
                raise
            shells[refused[0]] = type(refused[2], (_Shell,), {"__module__": refused[1]})
    beside = [key for key in checkpoint if key != "state_dict"]
    tensors = checkpoint["state_dict"]
    if isinstance(tensors, Mapping) and isinstance(tensors.get("model"), Mapping):             # as the authors of DETR save
        beside += [key for key in tensors if key != "model"]
        tensors = tensors["model"]
    if not isinstance(tensors, Mapping) or not tensors:
        raise CheckpointError(f"{path} holds no tensors by name, as state_dict, model, or by themselves")
    strange = [str(key) for key, value in tensors.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(f"{path} holds something else than tensors under {', '.join(strange[:4])}")
    return Foreign(dict(tensors), beside, [f"{shell.__module__}.{shell.__name__}" for shell in shells.values()])


class _Shell:
    """Stands for an object that is not read."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        if cls.__module__.startswith("numpy"):
            return super().__new__(cls)
        return OrderedDict()                                 # torch lets pickles fill this one with items as well as with attributes

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors that the index of a sharded safetensors checkpoint of transformers lists."""
    try:
        file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted({str(name) for name in file_of.values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is not the index of a checkpoint: {type(error).__name__}: {error}") from error
    tensors: dict[str, Tensor] = {}
    for name in shards:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {name!r}; files of a checkpoint are .safetensors files beside their index")
        tensors |= read_checkpoint(index.parent / name)["state_dict"]
    if tensors.keys() != file_of.keys():
        odd = sorted(tensors.keys() ^ file_of.keys())
        raise CheckpointError(f"{index} and its files do not hold the same tensors: {', '.join(odd[:4])}")
    return tensors


def write_converted(path: str | os.PathLike, done: Conversion, source: str | os.PathLike, config: str, classes: str | None) -> None:
    """Write weights as .safetensors, whole or not at all, with where they came from in the metadata."""
    from safetensors.torch import save

    digest = hashlib.sha256()
    with open(source, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    metadata = {"format": "pt", "source": Path(source).name, "source_sha256": digest.hexdigest(), "source_format": done.name,
                "config": config, "classes": classes or "all", "visionkit": visionkit.__version__}
    # copies: safetensors refuses tensors that share memory
    write_atomically(path, save({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in done.state_dict.items()},
                                metadata))


def as_table(done: Conversion) -> Table:
    """What became of every key, for a reader: a line a rule."""
    table = Table("in the checkpoint", "here", "keys", "changed", title=f"{done.name}: {done.format.title}", title_justify="left")
    for rule, keys in done.mapped.items():
        table.add_row(rule.source, rule.target, str(len(keys)), str(rule.operation or ""))
    for reason, keys in done.dropped.items():
        table.add_row(_some(keys), "left out", str(len(keys)), reason)
    for reason, names in done.added.items():
        table.add_row("", _some(names), str(len(names)), reason)
    return table


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
