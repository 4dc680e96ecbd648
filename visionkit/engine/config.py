"""Text configs: read, change from the command line, and check, before anything heavy happens."""
from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.utils import import_modules_from_strings

from visionkit.registry import SCOPE, ConfigError, did_you_mean, dotted

SUFFIXES = (".py", ".json")                                  # not .yaml: mmengine's reader of it runs what is inside


def load_config(path: str | os.PathLike, options: Sequence[str] = ()) -> Config:
    """The config in the file `path`, its `_base_` below it and `options` on top.

    This is the one place that sets the default scope, by which mmengine finds visionkit's components.

    Args:
        path: a .py or .json file.
        options: each as `key=value`, see `apply_option`.

    Raises:
        ConfigError: the file is missing or of another kind, a value is not plain, or an option does not fit.
    """
    path = Path(path).expanduser()
    _check_files(path)
    try:
        loaded = Config.fromfile(path, lazy_import=False)    # otherwise `import os` in a config makes mmengine misread it
    except Exception as error:                               # a config is a program, and may fail in any way
        raise ConfigError(f"the config {str(path)!r} cannot be read: {type(error).__name__}: {error}") from error
    settings = {key: value for key, value in loaded.to_dict().items() if not callable(value)}    # what it imports is no setting
    for option in options:
        apply_option(settings, option)
    _import_modules(settings.get("custom_imports"), given=loaded.get("custom_imports"))
    settings.setdefault("default_scope", SCOPE)
    # unformatted: formatting takes seconds, and mmengine asks for the text at every checkpoint
    return Config(plain_settings(settings), cfg_text=loaded.text, filename=str(path), format_python_code=False)


def _import_modules(wanted: Any, given: Any) -> None:
    """Import what an option has put into `custom_imports`; what stands in the file, `given`, was imported when it was read."""
    if not wanted or wanted == given:
        return
    if not isinstance(wanted, Mapping) or not set(wanted) <= {"imports", "allow_failed_imports"}:
        raise ConfigError(f"this is dict(imports=[...]), the names of modules, got {wanted!r}", ("custom_imports",))
    try:
        import_modules_from_strings(**wanted)
    except ImportError as error:
        raise ConfigError(f"{error}", ("custom_imports", "imports")) from error


def apply_option(settings: dict[str, Any], option: str) -> None:
    """Change `settings` as `option` says.

    `model.backbone.depth=50` sets a key that is there, `pipeline.0.type=Load` an element of a list; `+model.extra=1` may add the
    key. A value is read as a Python literal (`1e-3`, `[1, 2]`, `{'a': 1}`, `None`, also `true` and `null`) and otherwise as text.
    It replaces what was there, dicts included.

    Raises:
        ConfigError: the option has no `=`, or names a key that the config does not have and no leading `+`.
    """
    target, equals, text = option.partition("=")
    may_add = target.startswith("+")
    keys = target.removeprefix("+").split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--cfg-options takes key=value, such as train_cfg.max_epochs=3; got {option!r}")
    value = _literal(text, option)
    place: Any = settings
    path: tuple[str | int, ...] = ()
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(place, (list, tuple)):
            key = _index(key, place, path, may_add)
            path += (key,)
            if last and key == len(place):
                place.append(value)
                return
        elif isinstance(place, dict):
            path += (key,)
            if key not in place and not may_add:
                hint = did_you_mean(key, place) or f" It has: {', '.join(map(str, place)) or 'nothing'}."
                raise ConfigError(f"--cfg-options {option!r}: the config has no such key.{hint} To add it, write {'+' + option!r}", path)
            if not last and place.get(key) is None:
                place[key] = {}
        else:
            raise ConfigError(f"--cfg-options {option!r}: the value here is {place!r}, which has no keys to set", path)
        if last:
            place[key] = value
        else:
            if isinstance(place[key], tuple):                # so that an element of it can be set
                place[key] = list(place[key])
            place = place[key]


def plain_settings(settings: Any, path: tuple[str | int, ...] = ()) -> Any:
    """A copy of `settings` of plain values only; paths become text.

    Raises:
        ConfigError: a value that cannot be written to a file and read back, such as a class or a function.
    """
    if isinstance(settings, Mapping):
        return {key: plain_settings(value, (*path, key)) for key, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return type(settings)(plain_settings(value, (*path, index)) for index, value in enumerate(settings))
    if isinstance(settings, os.PathLike):
        return os.fspath(settings)
    if settings is None or type(settings) in (bool, int, float, str):
        return settings
    raise ConfigError(f"a config holds plain values (numbers, text, lists, dicts), got {settings!r}; name a component by its "
                      f"registered name, as text", path)


def _check_files(path: Path) -> None:
    """`path` and every `_base_` below it exist and are of a kind that is read safely."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"a config is a {' or '.join(SUFFIXES)} file, got {str(path)!r}")
    if not path.is_file():
        near = did_you_mean(str(path), [str(other) for other in _nearby(path)])
        raise ConfigError(f"no config file {str(path)!r}.{near}" + ("" if near else f" It is looked for from {Path.cwd()}."))
    if path.suffix == ".py":
        for base in _bases(path):
            _check_files(path.parent / base)


def _bases(path: Path) -> list[str]:
    try:
        statements = ast.parse(path.read_text(encoding="utf-8")).body
    except SyntaxError:                                      # reading it will say so, unless it is one of mmengine's {{placeholders}}
        return []
    for statement in statements:
        if isinstance(statement, ast.Assign) and any(isinstance(name, ast.Name) and name.id == "_base_" for name in statement.targets):
            bases = ast.literal_eval(statement.value)
            return [bases] if isinstance(bases, str) else list(bases)
    return []


def _nearby(path: Path) -> Iterator[Path]:
    folder = next(parent for parent in path.parents if parent.is_dir())
    yield from (other for suffix in SUFFIXES for other in folder.glob(f"**/*{suffix}"))


def _literal(text: str, option: str) -> Any:
    words = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        if text[:1] in ("[", "(", "{", "'", '"'):
            raise ConfigError(f"--cfg-options {option!r}: {text!r} is not a Python literal; text within lists and dicts needs "
                              f"quotes, as in \"names=['a', 'b']\"") from error
        return text


def _index(key: str, items: Sequence[Any], path: tuple[str | int, ...], may_add: bool) -> int:
    if not key.removeprefix("-").isdigit() or not -len(items) <= int(key) < len(items) + may_add:
        raise ConfigError(f"the config has a list of {len(items)} here, which has no element {key!r}; "
                          f"an element is named by its number from 0, and +{dotted(path)}.{len(items)}=... appends one", path)
    return int(key)
