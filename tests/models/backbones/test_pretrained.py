import pytest
import torch
from torch import nn

from visionkit.models.backbones.pretrained import load_part
from visionkit.registry import BACKBONES, ConfigError


def trunk(blocks: int = 2) -> nn.Module:
    """Names such as `stem.weight`, `norm.running_mean` and `layer0.weight`."""
    layers = {"stem": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)} | {f"layer{index}": nn.Conv2d(4, 4, 3) for index in range(blocks)}
    torch.manual_seed(blocks)
    return nn.ModuleDict(layers)


def checkpoint(prefix: str, **others: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value + 1 for name, value in trunk().state_dict().items()} | others


@pytest.mark.parametrize("prefix", ["", "backbone.", "encoder.", "module.", "module.backbone.", "model.student.backbone.0."])
def test_the_prefix_is_found_and_the_part_filled(prefix):
    part, given = trunk(), checkpoint(prefix, **{"head.weight": torch.zeros(1), "puzzle.order": torch.zeros(1)})
    assert load_part(part, given, "w.pth") == prefix
    assert all(torch.equal(value, given[prefix + name]) for name, value in part.state_dict().items())


def test_the_log_tells_the_prefix_and_counts(monkeypatch):
    said = []
    monkeypatch.setattr("visionkit.models.backbones.pretrained.print_log", lambda message, logger: said.append(message))
    load_part(trunk(), checkpoint("backbone.", **{"head.weight": torch.zeros(1)}), "w.pth")
    assert said == ["ModuleDict: loaded 11 tensors of w.pth, whose names there have the prefix 'backbone.'; left out 1"]


def test_counts_of_batches_may_be_missing_and_layers_that_are_not_built_are_left_out():
    given = checkpoint("backbone.")
    del given["backbone.norm.num_batches_tracked"]
    part = trunk(blocks=1)
    load_part(part, given, "w.pth")
    assert torch.equal(part["layer0"].weight, given["backbone.layer0.weight"])


def test_half_a_checkpoint_is_refused_with_the_nearest_prefix_and_fills_nothing():
    part, given = trunk(), checkpoint("backbone.", **{"norm.weight": torch.zeros(4)})
    del given["backbone.layer1.bias"]
    before = part["stem"].weight.clone()
    with pytest.raises(ConfigError, match=r"under no prefix are all of its names. Nearest: under 'backbone.' 9 of 10, without layer1.bias; "
                                          r"under '' 1 of 10, without "):
        load_part(part, given, "w.pth")
    assert torch.equal(part["stem"].weight, before)


def test_a_tensor_of_another_shape_is_named_and_nothing_filled():
    part, given = trunk(), checkpoint("backbone.", **{"backbone.layer1.weight": torch.zeros(4, 8, 3, 3)})
    before = part["stem"].weight.clone()
    with pytest.raises(ConfigError, match=r"another shape .* layer1.weight \(4, 4, 3, 3\) <- \(4, 8, 3, 3\)"):
        load_part(part, given, "w.pth")
    assert torch.equal(part["stem"].weight, before)


def test_a_part_that_is_there_twice_is_refused_unless_the_prefix_is_given():
    given = checkpoint("online.") | {name: value + 1 for name, value in checkpoint("target.").items()}
    with pytest.raises(ConfigError, match="2 times, under 'online.', 'target.'"):
        load_part(trunk(), given, "w.pth")
    part = trunk()
    load_part(part, given, "w.pth", prefix="target")
    assert torch.equal(part["stem"].weight, given["target.stem.weight"])


def test_a_checkpoint_of_something_else_shows_its_first_names():
    with pytest.raises(ConfigError, match=r"Nearest: none. The first names there: other.weight"):
        load_part(trunk(), {"other.weight": torch.zeros(1)}, "w.pth")
    with pytest.raises(ConfigError, match="The first names there: none"):
        load_part(trunk(), {}, "w.pth")


@pytest.mark.parametrize("config", [{"type": "ConvBlocks", "channels": (4, 8)}, {"type": "NIN", "out_blocks": (1,)},
                                    {"type": "StridedConvs", "channels": (4, 8)}],
                         ids=lambda config: config["type"])
def test_a_small_trunk_starts_from_the_run_of_a_model_with_one(config, tmp_path):
    trained, file = BACKBONES.build(config), tmp_path / "rotation.pth"
    torch.save({"state_dict": {f"backbone.{name}": value for name, value in trained.state_dict().items()}
                | {"head.weight": torch.zeros(1)}}, file)
    begun = BACKBONES.build({**config, "pretrained": str(file)})
    begun.init_weights()
    assert all(torch.equal(value, begun.state_dict()[name]) for name, value in trained.state_dict().items())
