"""python -m visionkit"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import visionkit
import visionkit.ops
from visionkit import registry as registry_module
from visionkit.__main__ import main
from visionkit.registry import BACKBONES, Plugin, registries

ROOT = Path(__file__).parents[1]


@pytest.fixture
def no_plugins(monkeypatch):
    monkeypatch.setattr(registry_module, "_plugins", [])
    return registry_module._plugins


def test_help_and_wrong_arguments_are_answered_before_anything_heavy_is_imported():
    source = "import sys, runpy\ntry:\n    runpy.run_module('visionkit', run_name='__main__')\nexcept SystemExit as end:\n" \
             "    print('status', end.code)\nprint('heavy', 'torch' in sys.modules or 'mmengine' in sys.modules)"
    for arguments, shown in ((["--help"], "status 0"), (["--version"], f"visionkit {visionkit.__version__}"), (["plugin"], "status 2")):
        done = subprocess.run([sys.executable, "-c", source, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert shown in done.stdout
        assert "heavy False" in done.stdout


def test_importing_everything_leaves_the_compiler_and_albumentations_alone():
    code = "import sys, visionkit.datasets, visionkit.engine, visionkit.models, visionkit.transforms\n" \
           "print([name for name in ('albumentations', 'torch._dynamo') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("arguments, message", [
    ([], "the following arguments are required: COMMAND"),
    (["plugin"], "invalid choice: 'plugin'"),
    (["plugins", "--kind", "backbon"], "no kind of component is called 'backbon'. Did you mean 'backbone'? Kinds: model, "),
    (["plugins", "--kind", "backbone", "--from", "visonkit"], "no component comes from 'visonkit'. Did you mean 'visionkit'?"),
])
def test_wrong_arguments_say_what_is_there(no_plugins, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_every_registered_component_is_listed_with_its_distribution(no_plugins, capsys):
    assert main(["plugins", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["components"]
    listed = {(row["kind"], row["name"]): (row["module"], row["distribution"]) for row in rows}
    assert set(listed) == {(registry.name.replace(" ", "_"), name) for registry in registries() for name in registry.names()}
    assert listed["backbone", "ResNet"] == ("visionkit.models.backbones.resnet", "visionkit")
    assert listed["hook", "EMAHook"] == ("mmengine.hooks.ema_hook", "mmengine")
    assert listed["transform", "RandomGrayscale"][1].startswith("mmcv")
    assert listed["optimizer", "AdamW"][1] == "torch"


def test_into_a_pipe_go_plain_columns(no_plugins, capsys):
    assert main(["plugins", "--kind", "backbone", "--from", "visionkit"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["kind", "name", "module", "distribution"]
    assert ["backbone", "ResNet", "visionkit.models.backbones.resnet", "visionkit"] in [line.split() for line in lines]
    assert all(line.index("visionkit.models") == header.index("module") for line in lines)


def test_on_a_terminal_stands_a_table(no_plugins, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["plugins", "--kind", "backbone"]) == 0
    shown = capsys.readouterr().out
    assert "┏" in shown
    assert "ResNet" in shown


def test_failed_left_out_and_contested_are_told(no_plugins, capsys, monkeypatch):
    no_plugins += [Plugin("bad", "bad-nets", "bad", error="Traceback (most recent call last):\nImportError: no luck"),
                   Plugin("idle", "idle-nets", "idle", left_out=True)]
    monkeypatch.setattr(BACKBONES, "contested", {"BigNet": ("first-nets", "second-nets")})
    assert main(["plugins", "--kind", "backbone"]) == 1
    shown = capsys.readouterr().out
    assert "plugin 'bad' of bad-nets failed to import:\nTraceback (most recent call last):\nImportError: no luck" in shown
    assert "plugin 'idle' of idle-nets is not loaded: VISIONKIT_PLUGINS leaves it out" in shown
    assert "backbone 'BigNet' is claimed by first-nets and second-nets" in shown
    assert main(["plugins", "--json"]) == 1
    listing = json.loads(capsys.readouterr().out)
    assert listing["contested"] == [{"kind": "backbone", "name": "BigNet", "distributions": ["first-nets", "second-nets"]}]
    assert [plugin["name"] for plugin in listing["plugins"]] == ["bad", "idle"]


def test_ops_says_which_tier_serves_each_op_and_why(capsys, monkeypatch):
    monkeypatch.delenv("VISIONKIT_OPS", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main(["ops", "--json"]) == 0
    listing = json.loads(capsys.readouterr().out)
    assert [listing["VISIONKIT_OPS"], listing["gpus"]] == [None, []]
    rows = {row["op"]: row for row in listing["ops"]}
    assert {name for name in visionkit.ops.__all__ if name.islower()} == set(rows)
    assert {(row["device"], row["tier"]) for row in rows.values()} == {("cpu", "portable")}
    assert rows["roi_align"]["reason"] == rows["pyramid_roi_align"]["reason"] != rows["nms"]["reason"]

    monkeypatch.setenv("VISIONKIT_OPS", "portable")
    assert main(["ops"]) == 0
    shown = capsys.readouterr().out
    assert "VISIONKIT_OPS  portable" in shown
    assert "GPU            none" in shown
    assert "roi_align cpu portable VISIONKIT_OPS=portable" in [" ".join(line.split()) for line in shown.splitlines()]


def test_ops_lists_the_gpu_beside_the_cpu(capsys, monkeypatch):
    monkeypatch.delenv("VISIONKIT_OPS", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "Big GPU")
    monkeypatch.setattr("visionkit.ops.tiers._triton_installed", lambda: True)
    monkeypatch.setattr("visionkit.ops.tiers._capability", lambda device: (9, 0))
    assert main(["ops", "--json"]) == 0
    listing = json.loads(capsys.readouterr().out)
    assert listing["gpus"] == ["Big GPU"]
    tiers = {(row["op"], row["device"]): row["tier"] for row in listing["ops"]}
    assert [tiers["roi_align", "cpu"], tiers["roi_align", "cuda"], tiers["nms", "cuda"]] == ["portable", "triton", "portable"]
    assert [tiers["attention", "cpu"], tiers["attention", "cuda"]] == ["portable", "triton"]
    assert main(["ops"]) == 0
    assert "GPU            Big GPU" in capsys.readouterr().out


def test_ops_tells_for_a_type_of_tensors(capsys, monkeypatch):
    monkeypatch.delenv("VISIONKIT_OPS", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("visionkit.ops.tiers._capability", lambda device: (9, 0))
    monkeypatch.setattr("visionkit.ops.tiers._triton_installed", lambda: True)
    monkeypatch.setattr("visionkit.ops.tiers._flash_attn_installed", lambda: True)

    def on_a_gpu(dtype):
        assert main(["ops", "--json", "--dtype", dtype]) == 0
        listing = json.loads(capsys.readouterr().out)
        assert listing["dtype"] == dtype
        tiers = {row["op"]: row["tier"] for row in listing["ops"] if row["device"] == "cuda"}
        return tiers["varlen_attention"], tiers["roi_align"], tiers["attention"]

    assert on_a_gpu("bfloat16") == ("flash_attn", "triton", "triton")
    assert on_a_gpu("float32") == ("triton", "triton", "triton")
    assert on_a_gpu("float64") == ("portable", "portable", "portable")


def test_ops_refuses_a_tier_that_does_not_exist(capsys, monkeypatch):
    monkeypatch.setenv("VISIONKIT_OPS", "fast")
    with pytest.raises(SystemExit) as end:
        main(["ops"])
    assert end.value.code == 2
    assert "VISIONKIT_OPS must be 'auto' or 'portable', got 'fast'" in capsys.readouterr().err


def test_a_closed_pipe_is_no_traceback():
    read, write = os.pipe()
    os.close(read)                                           # as `head` does when it has read enough
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-m", "visionkit", "plugins", "--kind", "backbone"], cwd=ROOT, stdout=write,
                          stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 141


def test_the_environment_names_versions_devices_and_plugins(no_plugins, capsys):
    import cv2
    import mmengine
    import torch
    no_plugins.append(Plugin("bad", "bad-nets", "bad", error="ImportError"))
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["visionkit"] == visionkit.__version__
    assert facts["torch"] == torch.__version__.partition("+")[0] or facts["torch"] == torch.__version__
    assert facts["mmengine"] == mmengine.__version__
    assert any(name.startswith("opencv") and version.startswith(cv2.__version__) for name, version in facts.items())
    assert any(name.startswith("mmcv") for name in facts)
    assert facts["plugin bad"] == "bad-nets, failed to import"
    assert any(name.startswith("GPU") for name in facts)
    assert main(["env"]) == 0
    assert f"visionkit  {'':{max(map(len, facts)) - 9}}{visionkit.__version__}" in capsys.readouterr().out
