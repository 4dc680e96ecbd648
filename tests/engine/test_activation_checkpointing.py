import copy

import pytest
import torch
from torch import nn

from visionkit.engine.activation_checkpointing import parts_to_recompute, recompute_parts
from visionkit.models.backbones import ResNet
from visionkit.registry import ConfigError


def test_a_run_with_parts_that_are_computed_again_is_the_same_run(toy, toy_parts):
    """mmengine's own way would leave the first layer, whose input needs no gradient, as it was."""
    plain = toy("plain")
    losses = list(toy_parts.LOSSES)
    assert losses
    again = toy("again", more='activation_checkpointing = ["features", "classify"]')
    assert toy_parts.LOSSES == losses
    expected = plain.model.state_dict()
    assert again.model.state_dict().keys() == expected.keys()
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert again.model.features.forward.args[0].__self__ is again.model.features


def test_the_parts_run_twice_take_named_arguments_and_count_a_batch_once():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x, *, scale):
            return self.norm(x) * scale

    model = nn.ModuleDict({"head": Head()})
    recompute_parts(model, "head")
    calls = []
    model["head"].norm.register_forward_pre_hook(lambda *_: calls.append(1))
    for module in (model, copy.deepcopy(model)):                     # as an average of weights does
        module["head"](torch.randn(3, 4), scale=2).sum().backward()
        assert module["head"].norm.num_batches_tracked == 1
        assert module["head"].norm.weight.grad is not None
    assert len(calls) == 4
    model.eval()["head"](torch.randn(3, 4), scale=2).sum().backward()
    assert len(calls) == 5


def model():
    return nn.ModuleDict({"backbone": ResNet(18, out_stages=(2,)), "layers": nn.ModuleList([nn.Linear(2, 2)])})


def test_a_pattern_names_every_part_it_fits():
    layers = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(2), "mlp": nn.Linear(2, 2)}) for _ in range(3))
    network = nn.ModuleDict({"layers": layers, "head": nn.Linear(2, 2)})
    assert parts_to_recompute(network, "layers.*.mlp") == [layer["mlp"] for layer in layers]
    assert parts_to_recompute(network, ["layers.[12].*", "h*"]) == [*layers[1].values(), *layers[2].values(), network["head"]]


@pytest.mark.parametrize("names, message", [
    ("layers.*.norm", "Linear has no part 'norm'"),
    ("lairs.*", "ModuleDict has no part 'lairs'. Did you mean 'layers'"),
    ("layers.x*", "^activation_checkpointing: 'layers.x\\*' names nothing: ModuleList has no part 'x\\*'. It has: 0"),
    (["backbon"], "^activation_checkpointing: ModuleDict has no part 'backbon'. Did you mean 'backbone'"),
    ("backbone.layer1.0", "is a part of a ResNet, which has a switch of its own: its argument checkpointing"),
    (5, "^activation_checkpointing: this is the name of a part of the model, or a list of names .*got 5"),
    ([["backbone"]], r"^activation_checkpointing: .*got \[\['backbone'\]\]"),
    ("layers", "'layers' is a ModuleList, which is not run itself; name what is in it: layers.0"),
])
def test_parts_that_cannot_be_computed_again_are_refused(names, message):
    with pytest.raises(ConfigError, match=message):
        recompute_parts(model(), names)


def test_the_preflight_sees_a_wrong_name(toy):
    with pytest.raises(ConfigError, match="^activation_checkpointing: ToyModel has no part 'featurs'. Did you mean 'features'"):
        toy(more='activation_checkpointing = "featurs"')
