"""tools/convert_checkpoint.py: files of other projects in, a file for a config's model out, or one message and exit code 2."""
import argparse
import hashlib
import json
import os
import sys

import pytest
import torch
from torch import nn

from visionkit.engine.checkpoint import load_weights
from visionkit.models.backbones import ResNet
from visionkit.registry import MODELS

torchvision = pytest.importorskip("torchvision", reason="the checkpoints here are torchvision's or begin with one: pip install torchvision")

D = 32
DETR = dict(type="DETR", backbone=dict(type="ResNet", depth=18, norm="FrozenBN", out_stages=(5,)), num_classes=80, num_queries=7,
            channels=D, num_heads=4, hidden_channels=24, encoder_layers=1, decoder_layers=1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the configs detr.py and white.py (a model that no format is of) and resnet18.pth."""
    (tmp_path / "detr.py").write_text(f"model = {DETR!r}\n")
    (tmp_path / "white.py").write_text('model = dict(type="WhiteBlock", num_classes=2)\n')
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def official():
    """A small DETR under its authors' names, of COCO's 91 category numbers."""
    torch.manual_seed(0)
    body = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    del body.fc
    parts = {"backbone.0.body": body, "input_proj": nn.Conv2d(512, D, 1), "query_embed": nn.Embedding(7, D),
             "transformer.encoder.layers.0": nn.TransformerEncoderLayer(D, 4, 24),
             "transformer.decoder.layers.0": nn.TransformerDecoderLayer(D, 4, 24), "transformer.decoder.norm": nn.LayerNorm(D),
             "class_embed": nn.Linear(D, 92), "bbox_embed.layers.0": nn.Linear(D, D), "bbox_embed.layers.1": nn.Linear(D, D),
             "bbox_embed.layers.2": nn.Linear(D, 4)}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


def test_a_training_checkpoint_of_detrs_authors_becomes_one_of_ours(folder, official, tool, capsys):
    torch.save({"model": official, "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=1e-4, masks=False)}, "detr.pth")
    assert tool("convert_checkpoint", "detr.pth", "out.safetensors", "--config", "detr.py", "--classes", "coco80") == 0
    printed = capsys.readouterr().out
    for line in ("detr: DETR of its authors", "transformer.encoder.layers.{i}.linear{1,2}.{p}", "rows of the classes",
                 "Also in the file, and left there: optimizer, epoch, args", "Objects in the file that were not read: argparse.Namespace",
                 "in out.safetensors"):
        assert line in printed
    model = MODELS.build(DETR)
    load_weights(model, "out.safetensors")
    assert torch.equal(model.queries.weight, official["query_embed.weight"])
    assert torch.equal(model.classify.bias[[0, 11, 79, 80]], official["class_embed.bias"][[1, 13, 90, 91]])


def test_the_file_says_where_it_comes_from(folder, tool):
    from safetensors import safe_open
    assert tool("convert_checkpoint", "resnet18.pth", "out.safetensors", "--config", "detr.py") == 0
    with safe_open("out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "source", "source_sha256", "source_format", "config", "classes", "visionkit"}
    assert [metadata[key] for key in ("source", "source_format", "config", "classes")] == ["resnet18.pth", "resnet", "detr.py", "all"]
    assert metadata["source_sha256"] == hashlib.sha256((folder / "resnet18.pth").read_bytes()).hexdigest()
    resnet = ResNet(18, pretrained="out.safetensors")                              # what the note of this format says
    resnet.init_weights()
    assert torch.equal(resnet.layer4[1].conv2.weight, torch.load("resnet18.pth")["layer4.1.conv2.weight"])


def test_a_dry_run_tells_and_writes_nothing(folder, official, tool, capsys):
    torch.save(official, "detr.pth")
    before = sorted(os.listdir())
    assert tool("convert_checkpoint", "detr.pth", "--config", "detr.py", "--dry-run", "--cfg-options", "model.num_classes=91") == 0
    assert "nothing written (--dry-run)" in capsys.readouterr().out
    assert sorted(os.listdir()) == before


def wrong(folder, official):
    """Arguments for each way in which a conversion can be wrong, with what is said."""
    torch.save(official, "detr.pth")
    torch.save({**official, "transformer.extra": torch.zeros(1)}, "unknown.pth")
    torch.save({key: value for key, value in official.items() if key != "query_embed.weight"}, "missing.pth")
    torch.save({"epoch": 3}, "no_tensors.pth")
    torch.save([official], "list.pth")
    whole = (folder / "resnet18.pth").read_bytes()
    (folder / "short.pth").write_bytes(whole[:len(whole) // 2])
    (folder / "short.safetensors").write_bytes(whole[:50])
    return {
        "an unknown key": (["unknown.pth"], "not in the format's table (1):\n    transformer.extra"),
        "a missing key": (["missing.pth", "--from", "detr"], "in the model, and not in the checkpoint (1):\n    queries.weight"),
        "another number of classes": (["detr.pth"], "classify.weight [81, 32] <- class_embed.weight [92, 32]"),
        "another model": (["detr.pth", "--config", "white.py"], "cannot become that of the config's WhiteBlock"),
        "no such file": (["dert.pth"], "no checkpoint 'dert.pth'. Did you mean 'detr.pth'"),
        "no such format": (["detr.pth", "--from", "dtr"], "no checkpoint format 'dtr'. Did you mean 'detr'"),
        "no such classes": (["detr.pth", "--classes", "coco81"], "no set of classes 'coco81'. Did you mean 'coco80'"),
        "a truncated pickle": (["short.pth"], "short.pth cannot be read, it may be cut short"),
        "a truncated safetensors": (["short.safetensors"], "short.safetensors cannot be read, it may be cut short"),
        "a file without tensors": (["no_tensors.pth"], "no_tensors.pth holds something else than tensors under epoch"),
        "a list": (["list.pth"], "list.pth holds a list, not a checkpoint"),
        "no such config": (["detr.pth", "--config", "deter.py"], "no config file 'deter.py'"),
        "a wrong part of the config": (["detr.pth", "--cfg-options", "model.backbone.depth=19"], "model.backbone: ResNet: ResNet comes in"),
    }


def test_what_is_wrong_is_one_message_and_exit_code_2_and_leaves_the_old_file_alone(folder, official, tool, capsys):
    (folder / "out.safetensors").write_text("what was here before")
    for what, (arguments, said) in wrong(folder, official).items():
        config = [] if "--config" in arguments else ["--config", "detr.py"]
        assert tool("convert_checkpoint", *arguments[:1], "out.safetensors", *arguments[1:], *config) == 2, what
        printed = capsys.readouterr().err
        assert "error: " in printed, what
        assert said in printed, what
        assert (folder / "out.safetensors").read_text() == "what was here before", what
    assert tool("convert_checkpoint", "detr.pth", "out.pth", "--config", "detr.py") == 2
    assert "written as .safetensors: name such a file, or give --dry-run; got 'out.pth'" in capsys.readouterr().err
    assert not list(folder.glob("*.partial"))


class Attack:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, exec, __import__], ids=lambda function: function.__name__)
def test_nothing_in_a_checkpoint_is_executed(folder, official, tool, capsys, function):
    argument = {os.system: "touch attacked", exec: "open('attacked', 'w')", __import__: "antigravity"}[function]
    torch.save({"model": official, "args": Attack(function, argument)}, "attack.pth")
    assert tool("convert_checkpoint", "attack.pth", "out.safetensors", "--config", "detr.py", "--classes", "coco80") == 2
    assert "is refused because loading it could run what is in it" in capsys.readouterr().err
    assert not (folder / "attacked").exists()


def test_a_class_in_a_checkpoint_is_not_looked_up(folder, official, tool, monkeypatch):
    (folder / "trap.py").write_text("open('imported', 'w')\nclass Options:\n    pass\n")
    monkeypatch.syspath_prepend(str(folder))
    import trap  # as it was where the checkpoint was saved
    (folder / "imported").unlink()
    torch.save({"model": official, "args": trap.Options()}, "options.pth")
    monkeypatch.delitem(sys.modules, "trap")
    assert tool("convert_checkpoint", "options.pth", "out.safetensors", "--config", "detr.py", "--classes", "coco80") == 0
    assert not (folder / "imported").exists()


def test_a_checkpoint_in_several_files_is_read_by_its_index(folder, tool, capsys):
    from safetensors.torch import save_file
    state = torch.load("resnet18.pth")
    halves = [dict(list(state.items())[:60]), dict(list(state.items())[60:])]
    names = [f"model-{index}-of-2.safetensors" for index in (1, 2)]
    for half, name in zip(halves, names, strict=True):
        save_file(half, name)
    where = {key: name for half, name in zip(halves, names, strict=True) for key in half}
    arguments = ["model.safetensors.index.json", "out.safetensors", "--config", "detr.py"]
    for weight_map, code, said in [
        (where, 0, "in out.safetensors"),
        ({**where, "fc.bias": "../elsewhere.safetensors"}, 2, "names '../elsewhere.safetensors'; files of a checkpoint are"),
        ({**where, "more": names[0]}, 2, "do not hold the same tensors: more"),
        ({**where, "fc.bias": "model-3-of-2.safetensors"}, 2, "model-3-of-2.safetensors'. Did you mean"),
        (None, 2, "is not the index of a checkpoint"),
    ]:
        (folder / arguments[0]).write_text(json.dumps({"weight_map": weight_map}))
        assert tool("convert_checkpoint", *arguments) == code
        captured = capsys.readouterr()
        assert said in captured.out + captured.err
