"""Where components meet: the registries, the plugins that fill them, and errors that say what to change.

A component is a class or function registered under its name; a config names it as `dict(type="ResNet", depth=50)`. The registries
are children of mmengine's where mmengine has one, so its Runner finds our components by the default scope `visionkit`.
"""
from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.metadata
import inspect
import os
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mmengine.registry as mm
from mmengine.utils import ManagerMixin

SCOPE = "visionkit"
PLUGIN_GROUP = "visionkit.plugins"


class ConfigError(ValueError):
    """Something a user wrote in a config cannot be used.

    Args:
        message: what was wanted, what came, and what to change.
        path: the place in the config, outermost key first, as far as it is known where the error is raised.
    """

    def __init__(self, message: str, path: tuple[str | int, ...] = ()) -> None:
        super().__init__(message, path)
        self.message = message
        self.path = path

    def under(self, *keys: str | int) -> ConfigError:
        """The same error seen from further out: `keys` are put before the path."""
        return ConfigError(self.message, (*keys, *self.path))

    def __str__(self) -> str:
        return f"{dotted(self.path)}: {self.message}" if self.path else self.message


def dotted(path: tuple[str | int, ...]) -> str:
    """`("model", "heads", 0)` as a user would write it: `model.heads[0]`."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


def did_you_mean(word: str, candidates: Collection[str]) -> str:
    """` Did you mean 'ResNet'?`, or an empty string when nothing is near; capitals do not count."""
    by_lower = {candidate.lower(): candidate for candidate in sorted(candidates)}
    near = difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=0.6)
    likeness = {match: difflib.SequenceMatcher(None, match, word.lower()).ratio() for match in near}
    best = [repr(by_lower[match]) for match in near if likeness[match] > likeness[near[0]] - 0.1]
    return f" Did you mean {' or '.join(best)}?" if best else ""


class Registry(mm.Registry):
    """A named set of components of one kind.

    Args:
        kind: what an error calls one member, such as `backbone`.
        parent: mmengine's registry of the same kind, searched when the name is not found here.
        packages: those whose import registers the members, the parent's included; imported at the first look-up.
    """

    def __init__(self, kind: str, *, parent: mm.Registry | None = None, packages: Sequence[str] = ()) -> None:
        super().__init__(kind, build_func=_build, parent=parent, scope=SCOPE, locations=list(packages))
        self.distributions: dict[str, str] = {}              # component name -> the distribution that registered it
        self.contested: dict[str, tuple[str, str]] = {}      # component name -> the two distributions that claim it

    def get(self, key: str) -> Callable[..., Any]:
        """The component called `key`, here or in mmengine.

        Raises:
            ConfigError: no component has that name, or two distributions claim it.
        """
        load_plugins()
        if key in self.contested:
            first, second = self.contested[key]
            raise ConfigError(
                f"the {self.name} {key!r} is claimed by two distributions, {first} and {second}; uninstall one, or name in "
                f"VISIONKIT_PLUGINS only the plugins you want", ("type",))
        self.import_from_location()                          # outside of the next line: a RuntimeError in there must be seen
        with contextlib.suppress(RuntimeError):              # mmengine's "Failed to get"
            found = super().get(key)
            if found is not None:
                return found
        raise ConfigError(self._no_such(key), ("type",))

    def __contains__(self, key: str) -> bool:
        try:
            return self.get(key) is not None
        except ConfigError:
            return False

    def names(self) -> list[str]:
        """Every name that `get` answers, mmengine's included, sorted."""
        load_plugins()
        self.import_from_location()
        inherited = self.parent.module_dict if self.parent is not None else {}
        return sorted({*self.module_dict, *inherited})

    def make(self, part: Any, at: str, **offered: Any) -> Any:
        """Build the part of a larger component that stands in its config under the key `at`.

        Args:
            part: a config dict with a `type`, or an object that is built already and is returned as it is.
            at: the key, put before the path of every error.
            offered: what the larger component can tell the part, such as `in_channels`. A constructor takes from it the
                arguments it names; what the config sets itself wins.

        Raises:
            ConfigError: the part cannot be built; names the place.
        """
        if not isinstance(part, Mapping):
            return part
        try:
            return _build(part, registry=self, default_args=offered, optional=True)
        except ConfigError as error:
            raise error.under(at) from error.__cause__

    def _no_such(self, key: str) -> str:
        message = f"no {self.name} named {key!r}.{did_you_mean(key, self.names())}"
        if message.endswith("."):
            message += f" Known: {', '.join(self.names()) or 'none'}."
        for plugin in load_plugins():
            if plugin.error:
                message += f" The plugin {plugin.name!r} of {plugin.distribution} failed to import ({plugin.error.splitlines()[-1]}); " \
                           f"`python -m visionkit plugins` shows why."
            elif plugin.left_out:
                message += f" The plugin {plugin.name!r} of {plugin.distribution} was not loaded: VISIONKIT_PLUGINS leaves it out."
        return message

    def _register_module(self, module: Callable, module_name: str | list[str] | None = None, force: bool = False) -> None:
        names = [module_name] if isinstance(module_name, str) else module_name or [module.__name__]
        newcomer = _distribution_of(module)
        for name in names:
            holder = self.distributions.get(name)
            if self._module_dict.get(name) is module:
                continue
            if not force and name in self._module_dict:
                if holder == newcomer:
                    raise ConfigError(
                        f"two {self.name}s are called {name!r}: {_where(self._module_dict[name])} and {_where(module)}; "
                        f"rename one, or register the second with force=True to replace the first")
                self.contested[name] = (holder, newcomer)    # harmless until somebody looks the name up
                continue
            self.contested.pop(name, None)
            self.distributions[name] = newcomer
            super()._register_module(module, name, force=True)


def check_arguments(component: Callable, given: Collection[str], *, missing: bool = True) -> None:
    """Compare argument names with a constructor's signature before it is called.

    Args:
        component: the class or function.
        given: the argument names it would be called with.
        missing: also require every argument without a default.

    Raises:
        ConfigError: an argument that the constructor does not have, or one that it needs and that is not given.
    """
    name = getattr(component, "__name__", repr(component))
    parameters = _parameters(component).values()
    named = {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in given:
        if key not in named and not takes_any:
            raise ConfigError(f"{name} has no argument {key!r}.{did_you_mean(key, named)} It takes: {', '.join(named)}.", (key,))
    absent = [key for key, p in named.items() if p.default is p.empty and key not in given]
    if missing and absent:
        raise ConfigError(f"{name} needs the argument{'s' * (len(absent) > 1)} {', '.join(map(repr, absent))}; "
                          f"got {', '.join(given) or 'none'}")


def _parameters(component: Callable) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(component).parameters
    except (TypeError, ValueError):                          # built in C, without a signature: it takes what it takes
        return {"arguments": inspect.Parameter("arguments", inspect.Parameter.VAR_KEYWORD)}


def _build(cfg: Mapping[str, Any], *, registry: mm.Registry, default_args: Mapping[str, Any] | None = None,
           optional: bool = False) -> Any:
    """Build `cfg`; `optional` default arguments are left out where the constructor does not name them."""
    if "type" not in cfg:
        raise ConfigError(f"a {registry.name} needs a `type`, got only {', '.join(map(repr, cfg)) or 'an empty dict'}")
    component = registry.get(cfg["type"]) if isinstance(cfg["type"], str) else cfg["type"]
    if not callable(component):
        raise ConfigError(f"a {registry.name} needs as `type` a name or a class, got {component!r}", ("type",))
    arguments = {key: value for key, value in cfg.items() if key != "type"}
    for key, value in (default_args or {}).items():
        if not optional or key in _parameters(component):
            arguments.setdefault(key, value)
    check_arguments(component, arguments)
    # what mmengine keeps one of for each name, such as a visualizer, is made through its manager
    managed = inspect.isclass(component) and issubclass(component, ManagerMixin)
    try:
        return component.get_instance(**arguments) if managed else component(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{getattr(component, '__name__', component)}: {error}") from error


# ---------------------------------------------------------------------------------------------------------------- plugins

@dataclass
class Plugin:
    """One entry point of the group `visionkit.plugins`, and how loading it went."""
    name: str
    distribution: str
    module: str
    error: str = ""                                          # the traceback, where the import failed
    left_out: bool = False                                   # not loaded, because VISIONKIT_PLUGINS does not name it


_plugins: list[Plugin] | None = None
_loading: Plugin | None = None


def load_plugins() -> list[Plugin]:
    """Import every installed plugin, once per process, and tell how it went.

    The environment variable `VISIONKIT_PLUGINS` restricts which (names separated by commas; empty: none). A plugin that
    fails to import is reported, never raised: those who do not use it must not notice. So is a name in the variable that
    no distribution declares.
    """
    global _plugins
    if _plugins is None:
        _plugins = []                                        # set first: a plugin may look something up while it is imported
        setting = os.environ.get("VISIONKIT_PLUGINS")
        wanted = None if setting is None else {name.strip() for name in setting.split(",")} - {""}
        for entry in _entry_points():
            plugin = Plugin(entry.name, entry.dist.name if entry.dist else "unknown", entry.value)
            if wanted is None or entry.name in wanted:
                _load(plugin, entry)
            else:
                plugin.left_out = True
            _plugins.append(plugin)
        installed = {plugin.name for plugin in _plugins}
        for name in sorted((wanted or set()) - installed):
            _plugins.append(Plugin(name, "no distribution", "", error=f"VISIONKIT_PLUGINS names {name!r}, but no installed "
                                   f"distribution declares such a plugin.{did_you_mean(name, installed)}"))
    return _plugins


@functools.cache
def _entry_points() -> list[importlib.metadata.EntryPoint]:
    found = {(entry.name, entry.value): entry for entry in importlib.metadata.entry_points(group=PLUGIN_GROUP)}
    return [found[key] for key in sorted(found)]             # once each, even where a distribution is found on two paths


def _load(plugin: Plugin, entry: importlib.metadata.EntryPoint) -> None:
    global _loading
    outer, _loading = _loading, plugin
    try:
        entry.load()
    except Exception:                                        # whatever a stranger's module does at import
        plugin.error = traceback.format_exc().strip()
    finally:
        _loading = outer


def _distribution_of(component: Callable) -> str:
    """The distribution that registers `component`.

    That is the plugin whose module stands nearest to the component's; for a class from elsewhere, the plugin that is being
    loaded; otherwise the top package, such as a user's own that `custom_imports` names.
    """
    module = getattr(component, "__module__", None) or "unknown"
    if module.partition(".")[0] == SCOPE:
        return SCOPE
    shared = {len(os.path.commonprefix([module.split("."), entry.module.split(".")])): entry for entry in _entry_points()}
    nearest = max(shared, default=0)
    if nearest and shared[nearest].dist:
        return shared[nearest].dist.name
    return _loading.distribution if _loading else module.partition(".")[0]


def _where(component: Callable) -> str:
    return f"{component.__module__}.{getattr(component, '__qualname__', component)}"


def registries() -> Iterator[Registry]:
    """The registries of this module, in the order they stand."""
    return (value for value in globals().values() if isinstance(value, Registry))


MODELS = Registry("model", parent=mm.MODELS, packages=["visionkit.models", "mmcv.cnn"])
BACKBONES = Registry("backbone", packages=["visionkit.models.backbones"])
NECKS = Registry("neck", packages=["visionkit.models.necks"])
HEADS = Registry("head", packages=["visionkit.models.heads"])
LOSSES = Registry("loss", packages=["visionkit.models.losses"])
TARGETS = Registry("target", packages=["visionkit.models.targets"])
OPS = Registry("op", packages=["visionkit.ops"])
DATASETS = Registry("dataset", parent=mm.DATASETS, packages=["visionkit.datasets", "mmengine.dataset"])
SAMPLERS = Registry("sampler", parent=mm.DATA_SAMPLERS, packages=["visionkit.datasets", "mmengine.dataset"])
PACKERS = Registry("packer", packages=["visionkit.datasets"])
LENGTHS = Registry("length", packages=["visionkit.datasets"])
TRANSFORMS = Registry("transform", parent=mm.TRANSFORMS, packages=["visionkit.transforms", "mmcv.transforms"])
METRICS = Registry("metric", parent=mm.METRICS, packages=["visionkit.evaluation", "mmengine.evaluator"])
HOOKS = Registry("hook", parent=mm.HOOKS, packages=["visionkit.engine", "mmengine.hooks"])
LOOPS = Registry("loop", parent=mm.LOOPS, packages=["visionkit.engine", "mmengine.runner"])
OPTIM_WRAPPERS = Registry("optim wrapper", parent=mm.OPTIM_WRAPPERS, packages=["visionkit.engine", "mmengine.optim"])
OPTIMIZERS = Registry("optimizer", parent=mm.OPTIMIZERS, packages=["mmengine.optim"])
PARAM_SCHEDULERS = Registry("parameter scheduler", parent=mm.PARAM_SCHEDULERS, packages=["visionkit.engine", "mmengine.optim"])
# Whatever else the Runner builds, so that it finds a registry of our scope for each, and a plugin can add to each.
OPTIM_WRAPPER_CONSTRUCTORS = Registry("optim wrapper constructor", parent=mm.OPTIM_WRAPPER_CONSTRUCTORS, packages=["mmengine.optim"])
MODEL_WRAPPERS = Registry("model wrapper", parent=mm.MODEL_WRAPPERS, packages=["mmengine.model"])
WEIGHT_INITIALIZERS = Registry("weight initializer", parent=mm.WEIGHT_INITIALIZERS, packages=["mmengine.model"])
EVALUATORS = Registry("evaluator", parent=mm.EVALUATOR, packages=["mmengine.evaluator"])
VISUALIZERS = Registry("visualizer", parent=mm.VISUALIZERS, packages=["visionkit.visualization", "mmengine.visualization"])
VISBACKENDS = Registry("visualizer backend", parent=mm.VISBACKENDS, packages=["mmengine.visualization"])
LOG_PROCESSORS = Registry("log processor", parent=mm.LOG_PROCESSORS, packages=["mmengine.runner"])
FUNCTIONS = Registry("function", parent=mm.FUNCTIONS, packages=["visionkit.datasets", "mmengine.dataset"])
