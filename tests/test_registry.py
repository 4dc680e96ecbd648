"""What a look-up and a build answer, above all when the config is wrong."""
import importlib
import multiprocessing
import subprocess
import sys

import mmengine.registry as mm
import pytest
import torch
from mmengine.registry import DefaultScope
from torch import nn
from torch.utils.data import DataLoader

from visionkit import registry as registry_module
from visionkit.registry import (
    BACKBONES,
    DATASETS,
    FUNCTIONS,
    HOOKS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    SAMPLERS,
    TRANSFORMS,
    VISUALIZERS,
    ConfigError,
    Registry,
    check_arguments,
    did_you_mean,
    dotted,
    load_plugins,
    registries,
)


@pytest.fixture
def tools():
    """A registry of its own, so that nothing leaks into the others."""
    tools = Registry("tool")

    @tools.register_module()
    class Hammer:
        def __init__(self, weight, length=1, head=None):
            self.weight, self.length = weight, length
            self.head = tools.make(head, at="head", weight=weight)

    @tools.register_module()
    class Nail:
        def __init__(self, size=1):
            if size < 0:
                raise ValueError(f"size must be 0 or more, got {size}; drop the sign")
            self.size = size

    return tools


@pytest.fixture
def plugins(monkeypatch, tmp_path):
    """Writes distributions with entry points onto the path, as pip would; plugins are loaded anew, and forgotten afterwards."""
    installed, modules = [], set(sys.modules)

    def install(distribution, module, source):
        tmp_path.joinpath(f"{module}.py").write_text(source)
        info = tmp_path / f"{distribution}-1.0.dist-info"
        info.mkdir()
        info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        info.joinpath("entry_points.txt").write_text(f"[visionkit.plugins]\n{module} = {module}\n")
        installed.append(distribution)
        importlib.invalidate_caches()
        registry_module._entry_points.cache_clear()

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry_module, "_plugins", None)
    monkeypatch.delenv("VISIONKIT_PLUGINS", raising=False)
    install.path = tmp_path
    yield install
    registry_module._entry_points.cache_clear()
    for name in set(sys.modules) - modules:
        if name.startswith("vk_test_"):
            del sys.modules[name]
    for registry in registries():
        for name in [name for name, distribution in registry.distributions.items() if distribution in installed]:
            del registry.distributions[name], registry._module_dict[name]
        registry.contested.clear()


@pytest.fixture
def python():
    """Runs source in a process of its own."""
    def run(source):
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return run


def component(name, registry="BACKBONES"):
    return f"from visionkit.registry import {registry}\n@{registry}.register_module()\nclass {name}:\n    pass\n"


# ------------------------------------------------------------------------------------------------- look-up

@pytest.mark.parametrize("wrong, hint", [
    ("Resnet", "no backbone named 'Resnet'. Did you mean 'ResNet'?"),
    ("RESNET", "Did you mean 'ResNet'?"),
    ("ResNe", "Did you mean 'ResNet'?"),
    ("Zebra", "Known: "),
])
def test_a_failed_look_up_names_its_neighbours(wrong, hint):
    with pytest.raises(ConfigError) as caught:
        BACKBONES.get(wrong)
    assert hint in str(caught.value)
    assert caught.value.path == ("type",)


def test_a_misspelt_type_is_told_with_its_path_at_any_depth():
    config = {"type": "FasterRCNN", "backbone": {"type": "ResNet", "depth": 18}, "neck": {"type": "FPN", "out_channels": 8},
              "rpn": {"type": "RPN", "sampler": {"type": "BalancedSample"}}, "roi": {"type": "RoIBoxHead", "num_classes": 2}}
    with pytest.raises(ConfigError, match=r"^rpn\.sampler\.type: no target named 'BalancedSample'\. Did you mean 'BalancedSampler'"):
        MODELS.build(config)
    config["rpn"] = {"type": "RPM"}
    with pytest.raises(ConfigError, match=r"^rpn\.type: no head named 'RPM'\. Did you mean 'RPN'"):
        MODELS.build(config)
    config["type"] = "FasterRCN"
    with pytest.raises(ConfigError, match=r"^type: no model named 'FasterRCN'\. Did you mean 'FasterRCNN'"):
        MODELS.build(config)


@pytest.mark.parametrize("registry, name, module", [
    (OPTIMIZERS, "AdamW", "torch.optim"), (HOOKS, "EMAHook", "mmengine.hooks"), (TRANSFORMS, "RandomGrayscale", "mmcv.transforms"),
    (PARAM_SCHEDULERS, "CosineAnnealingLR", "mmengine.optim"), (SAMPLERS, "InfiniteSampler", "mmengine.dataset"),
    (DATASETS, "ConcatDataset", "mmengine.dataset"), (MODELS, "Swish", "mmcv.cnn"), (VISUALIZERS, "Visualizer", "mmengine.visualization"),
    (FUNCTIONS, "pseudo_collate", "mmengine.dataset"), (OPTIM_WRAPPER_CONSTRUCTORS, "DefaultOptimWrapperConstructor", "mmengine.optim"),
], ids=lambda value: value if isinstance(value, str) and "." not in value else "")
def test_mmengines_own_components_are_found(registry, name, module):
    assert registry.get(name).__module__.startswith(module)
    assert name in registry.names()
    assert name in registry


def test_mmengines_components_are_found_by_a_process_that_imported_nothing_else(python):
    python("from visionkit.registry import OPTIMIZERS, PARAM_SCHEDULERS\n"
           "assert OPTIMIZERS.get('AdamW').__name__ == 'AdamW'\n"
           "assert 'MultiStepLR' in PARAM_SCHEDULERS")


def test_a_full_path_and_a_scope_prefix_find_a_component():
    assert MODELS.get("torch.nn.Identity") is nn.Identity
    assert BACKBONES.get("visionkit.ResNet") is BACKBONES.get("ResNet")


def test_membership_asks_without_raising():
    assert "ResNet" in BACKBONES
    assert "Zebra" not in BACKBONES


def test_an_error_while_importing_our_own_package_is_not_taken_for_a_missing_name(tmp_path, monkeypatch):
    tmp_path.joinpath("vk_test_broken.py").write_text("import os\nif os.environ.pop('VK_TEST_BREAKS', ''):\n"
                                                      "    raise RuntimeError('no such device')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("VK_TEST_BREAKS", "once")
    with pytest.raises(RuntimeError, match="no such device"):
        Registry("part", packages=["vk_test_broken"]).get("Wheel")


@pytest.mark.parametrize("registry", list(registries()), ids=lambda registry: registry.name)
def test_every_name_a_registry_lists_can_be_looked_up(registry):
    for name in registry.names():
        assert callable(registry.get(name))


# --------------------------------------------------------------------------------------------------- build

def test_make_offers_arguments_and_the_config_wins(tools):
    hammer = tools.build({"type": "Hammer", "weight": 3, "head": {"type": "Hammer"}})
    assert hammer.head.weight == 3                           # offered, and named by the constructor
    assert tools.build({"type": "Hammer", "weight": 3, "head": {"type": "Hammer", "weight": 5}}).head.weight == 5
    assert tools.build({"type": "Hammer", "weight": 3, "head": {"type": "Nail"}}).head.size == 1       # takes no weight: left out


def test_make_passes_on_what_is_built_already(tools):
    part = object()
    assert tools.make(part, at="head") is part


def test_a_built_config_is_not_changed(tools):
    config = {"type": "Hammer", "weight": 3, "head": {"type": "Hammer"}}
    tools.build(config)
    assert config == {"type": "Hammer", "weight": 3, "head": {"type": "Hammer"}}


def test_a_wrong_argument_names_class_argument_neighbour_and_place(tools):
    with pytest.raises(ConfigError) as caught:
        tools.build({"type": "Hammer", "weight": 3, "head": {"type": "Hammer", "lenght": 2}})
    assert str(caught.value) == "head.lenght: Hammer has no argument 'lenght'. Did you mean 'length'? It takes: weight, length, head."


def test_a_missing_argument_is_named_with_its_place(tools):
    with pytest.raises(ConfigError, match=r"^Hammer needs the argument 'weight'; got length$"):
        tools.build({"type": "Hammer", "length": 2})
    with pytest.raises(ConfigError, match=r"^claw: Hammer needs the argument 'weight'; got none$"):
        tools.make({"type": "Hammer"}, at="claw")


def test_a_value_the_constructor_refuses_keeps_its_message_and_gains_the_place(tools):
    with pytest.raises(ConfigError, match=r"^head: Nail: size must be 0 or more, got -1; drop the sign$") as caught:
        tools.build({"type": "Hammer", "weight": 3, "head": {"type": "Nail", "size": -1}})
    assert isinstance(caught.value, ValueError)


def test_a_config_without_a_type_says_what_it_has(tools):
    with pytest.raises(ConfigError, match="a tool needs a `type`, got only 'weight'"):
        tools.build({"weight": 3})
    with pytest.raises(ConfigError, match="a tool needs a `type`, got only an empty dict"):
        tools.build({})


@pytest.mark.parametrize("wrong", [3, None, ["Hammer"]])
def test_a_type_that_is_neither_name_nor_class_is_refused(tools, wrong):
    with pytest.raises(ConfigError, match="^type: a tool needs as `type` a name or a class, got"):
        tools.build({"type": wrong})


def test_a_class_is_as_good_as_a_name():
    assert MODELS.build({"type": nn.Linear, "in_features": 2, "out_features": 3}).weight.shape == (3, 2)
    with pytest.raises(ConfigError, match="Linear has no argument 'in_feature'. Did you mean 'in_features'"):
        MODELS.build({"type": nn.Linear, "in_feature": 2, "out_features": 3})


def test_a_function_is_built_by_calling_it(tools):
    @tools.register_module()
    def saw(teeth: int):
        return ["tooth"] * teeth
    assert tools.build({"type": "saw", "teeth": 2}) == ["tooth", "tooth"]


def test_constructors_without_a_signature_take_what_they_take():
    check_arguments(dict, ["anything"])


def test_an_argument_that_swallows_everything_is_respected():
    check_arguments(lambda a, **rest: None, ["a", "b"])
    with pytest.raises(ConfigError, match="needs the argument 'a'"):
        check_arguments(lambda a, **rest: None, ["b"])
    check_arguments(lambda a, **rest: None, ["b"], missing=False)


def test_what_mmengine_keeps_one_of_is_made_through_its_manager():
    from mmengine.visualization import Visualizer
    visualizer = VISUALIZERS.build({"type": "Visualizer", "name": "of test_registry"})
    assert Visualizer.get_instance("of test_registry") is visualizer


def test_mmengines_root_registry_builds_ours_in_our_scope():
    with DefaultScope.overwrite_default_scope("visionkit"):
        hook = mm.HOOKS.build({"type": "CheckpointHook", "interval": 2})
        assert type(hook).__module__.startswith("visionkit.")
        assert isinstance(mm.MODELS.build({"type": "ImagePreprocessor"}), MODELS.get("ImagePreprocessor"))
        with pytest.raises(ConfigError, match="no model named 'ImagePreproces'. Did you mean 'ImagePreprocessor'"):
            mm.MODELS.build({"type": "ImagePreproces"})
        optimizer = mm.OPTIMIZERS.build({"type": "AdamW", "params": [nn.Parameter(torch.zeros(1))], "lr": 0.1})
        assert isinstance(optimizer, torch.optim.AdamW)


# --------------------------------------------------------------------------------------- registering a name

def test_one_distribution_may_not_use_a_name_twice(tools):
    with pytest.raises(ConfigError, match=r"two tools are called 'Nail': .*tools.<locals>.Nail and .*<locals>.Other; "
                                          r"rename one, or register the second with force=True"):
        @tools.register_module(name="Nail")
        class Other:
            pass
    assert tools.build({"type": "Nail"}).size == 1


def test_registering_the_same_object_again_is_harmless(tools):
    tools.register_module(module=tools.get("Nail"))
    assert not tools.contested


def test_force_replaces(tools):
    @tools.register_module(name="Nail", force=True)
    class Screw:
        pass
    assert tools.get("Nail") is Screw


def test_two_distributions_with_one_name_fail_at_look_up_and_name_both(plugins, monkeypatch):
    plugins("first-nets", "vk_test_first", component("Claimed") + component("OnlyFirst"))
    plugins("second-nets", "vk_test_second", component("Claimed"))
    assert BACKBONES.get("OnlyFirst").__module__ == "vk_test_first"                # others are not disturbed
    with pytest.raises(ConfigError, match="the backbone 'Claimed' is claimed by two distributions, first-nets and second-nets; uninstall"):
        BACKBONES.get("Claimed")


def test_force_settles_a_claim(plugins):
    plugins("first-nets", "vk_test_first", component("Claimed"))
    plugins("second-nets", "vk_test_second", component("Claimed"))
    plugins("third-nets", "vk_test_third", component("Claimed").replace("module()", "module(force=True)"))
    assert BACKBONES.get("Claimed").__module__ == "vk_test_third"
    assert BACKBONES.distributions["Claimed"] == "third-nets"


def test_a_plugin_that_claims_a_name_of_ours_fails_at_look_up_and_names_both(plugins):
    plugins("rival-nets", "vk_test_rival", component("ResNet"))
    BACKBONES.import_from_location()
    with pytest.raises(ConfigError, match="the backbone 'ResNet' is claimed by two distributions, visionkit and rival-nets"):
        BACKBONES.get("ResNet")


# ------------------------------------------------------------------------------------------------- plugins

def test_a_plugin_is_found_and_its_distribution_known(plugins):
    plugins("my-nets", "vk_test_nets", component("MyNet"))
    assert BACKBONES.get("MyNet").__module__ == "vk_test_nets"
    assert BACKBONES.distributions["MyNet"] == "my-nets"
    assert "MyNet" in BACKBONES.names()


def test_a_plugin_imported_by_hand_still_belongs_to_its_distribution(plugins):
    plugins("my-nets", "vk_test_nets", component("MyNet"))
    __import__("vk_test_nets")
    assert BACKBONES.distributions["MyNet"] == "my-nets"
    assert BACKBONES.get("MyNet")


def test_a_class_from_elsewhere_belongs_to_the_plugin_that_registers_it(plugins):
    plugins("my-nets", "vk_test_nets", "import collections\nfrom visionkit.registry import BACKBONES\n"
                                       "BACKBONES.register_module('Odd', module=collections.OrderedDict)\n")
    assert "Odd" in BACKBONES
    assert BACKBONES.distributions["Odd"] == "my-nets"


def test_plugins_are_loaded_once(plugins):
    plugins("my-nets", "vk_test_nets", "import builtins\nbuiltins.vk_loads = getattr(builtins, 'vk_loads', 0) + 1\n" + component("MyNet"))
    import builtins
    for _ in range(3):
        assert [plugin.name for plugin in load_plugins()] == ["vk_test_nets"]
        BACKBONES.get("MyNet")
    assert builtins.vk_loads == 1
    del builtins.vk_loads


def test_a_plugin_that_fails_to_import_breaks_nobody_and_is_shown_when_a_look_up_fails(plugins):
    plugins("broken-nets", "vk_test_broken", "import vk_no_such_module")
    plugins("my-nets", "vk_test_nets", component("MyNet"))
    assert BACKBONES.get("MyNet")
    with pytest.raises(ConfigError) as caught:
        BACKBONES.get("BrokenNet")
    assert "The plugin 'vk_test_broken' of broken-nets failed to import (ModuleNotFoundError: No module named 'vk_no_such_module')" \
        in str(caught.value)
    broken = next(plugin for plugin in load_plugins() if plugin.error)
    assert "Traceback" in broken.error


@pytest.mark.parametrize("setting, loaded", [
    ("", set()), ("vk_test_nets", {"vk_test_nets"}), (" vk_test_nets , vk_test_more", {"vk_test_nets", "vk_test_more"}),
    (None, {"vk_test_nets", "vk_test_more"}),
], ids=["none", "one", "both", "unset"])
def test_the_environment_restricts_which_plugins_are_loaded(plugins, monkeypatch, setting, loaded):
    plugins("my-nets", "vk_test_nets", component("MyNet"))
    plugins("more-nets", "vk_test_more", component("MoreNet"))
    if setting is not None:
        monkeypatch.setenv("VISIONKIT_PLUGINS", setting)
    assert {plugin.name for plugin in load_plugins() if not plugin.left_out and not plugin.error} == loaded
    assert ("MyNet" in BACKBONES) == ("vk_test_nets" in loaded)
    assert ("vk_test_more" in sys.modules) == ("vk_test_more" in loaded)


def test_a_failed_look_up_tells_which_plugins_the_environment_leaves_out(plugins, monkeypatch):
    plugins("my-nets", "vk_test_nets", component("MyNet"))
    monkeypatch.setenv("VISIONKIT_PLUGINS", "")
    with pytest.raises(ConfigError, match="The plugin 'vk_test_nets' of my-nets was not loaded: VISIONKIT_PLUGINS leaves it out"):
        BACKBONES.get("MyNet")


def test_a_plugin_named_in_the_environment_that_is_not_installed_is_told(plugins, monkeypatch):
    plugins("my-nets", "vk_test_nets", component("MyNet"))
    monkeypatch.setenv("VISIONKIT_PLUGINS", "vk_test_net")
    with pytest.raises(ConfigError, match="VISIONKIT_PLUGINS names 'vk_test_net', but no installed distribution declares such a plugin"):
        BACKBONES.get("MyNet")


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers_have_the_plugins(plugins, start):
    plugins("my-nets", "vk_test_nets", component("MyNet"))
    plugins.path.joinpath("vk_test_data.py").write_text(
        "from visionkit.registry import BACKBONES\nclass LooksUp(list):\n    def __getitem__(self, index):\n"
        "        return BACKBONES.get('MyNet').__module__\n")
    dataset = importlib.import_module("vk_test_data").LooksUp([0, 1])
    loader = DataLoader(dataset, num_workers=1, batch_size=None, multiprocessing_context=multiprocessing.get_context(start))
    assert list(loader) == ["vk_test_nets", "vk_test_nets"]


# -------------------------------------------------------------------------------------------------- errors

def test_a_path_is_written_as_a_user_would():
    assert dotted(("model", "heads", 0, "loss")) == "model.heads[0].loss"
    assert dotted(()) == ""
    assert str(ConfigError("no", ("a", 1))) == "a[1]: no"
    assert str(ConfigError("no")) == "no"
    assert str(ConfigError("no", ("b",)).under("a", 0)) == "a[0].b: no"


def test_suggestions_come_nearest_first_and_not_at_all_when_nothing_is_near():
    assert did_you_mean("resnet", ["ResNet", "ResNeXt", "FPN"]) == " Did you mean 'ResNet' or 'ResNeXt'?"
    assert did_you_mean("lenght", ["length", "weight"]) == " Did you mean 'length'?"         # far behind the nearest: left out
    assert did_you_mean("zebra", ["ResNet"]) == ""
