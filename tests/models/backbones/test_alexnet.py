import pytest
import torch
from torch import nn

from visionkit.models.backbones import AlexNet
from visionkit.registry import BACKBONES, ConfigError


def test_parameters_are_as_many_as_counted_by_hand():
    """Five convolutions without a bias, and scale and shift of five norms."""
    weights = [3 * 96 * 121, 96 * 256 * 25, 256 * 384 * 9, 384 * 384 * 9, 384 * 256 * 9]
    net = AlexNet()
    for stage, count, channels in zip(net.stages, weights, (96, 256, 384, 384, 256), strict=True):
        assert sum(value.numel() for value in stage.parameters()) == count + 2 * channels
    assert sum(value.numel() for value in net.parameters()) == sum(weights) + 2 * 1376 == 3_748_576


def test_maps_have_the_sides_their_strides_promise():
    net = AlexNet()
    assert (net.out_channels, net.strides) == ((96, 256, 384, 384, 256), (8, 16, 16, 16, 32))
    sizes = [tuple(level.shape[1:]) for level in net(torch.zeros(1, 3, 224, 224))]
    assert sizes == [(96, 28, 28), (256, 14, 14), (384, 14, 14), (384, 14, 14), (256, 7, 7)]
    assert [tuple(level.shape[2:]) for level in net(torch.zeros(2, 3, 65, 97))] == [(9, 13), (5, 7), (5, 7), (5, 7), (3, 4)]


def test_stages_beyond_the_last_are_not_built_and_a_map_is_that_of_its_stage():
    torch.manual_seed(0)
    every, some = AlexNet().eval(), AlexNet(out_stages=(2, 3)).eval()
    assert (some.out_channels, some.strides, len(some.stages)) == ((256, 384), (16, 16), 3)
    some.load_state_dict({key: value for key, value in every.state_dict().items() if not key.startswith(("stages.3", "stages.4"))})
    images = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(some(images), every(images)[1:3], strict=True))


def test_the_first_second_and_last_stage_pool():
    assert [isinstance(stage[-1], nn.MaxPool2d) for stage in AlexNet().stages] == [True, True, False, False, True]


@pytest.mark.parametrize("stages", [(), (0, 1), (2, 1), (6,)])
def test_stages_that_are_not_there_are_refused(stages):
    with pytest.raises(ConfigError, match="ascending numbers of 1 to 5"):
        BACKBONES.build({"type": "AlexNet", "out_stages": stages})
