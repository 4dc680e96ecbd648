import pytest
import torch
from torch import nn

from visionkit.models.backbones import NIN
from visionkit.registry import BACKBONES, ConfigError


def test_parameters_are_as_many_as_counted_by_hand():
    counted = {
        1: 3 * 192 * 25 + 192 * 160 + 160 * 96 + 2 * (192 + 160 + 96),
        2: 96 * 192 * 25 + 2 * 192 * 192 + 2 * 3 * 192,
        3: 192 * 192 * 9 + 2 * 192 * 192 + 2 * 3 * 192,
        4: 192 * 192 * 9 + 2 * 192 * 192 + 2 * 3 * 192,
    }
    net = NIN()
    for number, block in enumerate(net.blocks, start=1):
        assert sum(value.numel() for value in block.parameters()) == counted[number]
    assert sum(counted.values()) == 1_410_368
    assert not [module for module in net.modules() if isinstance(module, nn.Conv2d) and module.bias is not None]


def test_the_maps_have_a_half_and_a_quarter_of_the_side():
    net = NIN()
    assert (net.out_channels, net.strides) == ((96, 192, 192, 192), (2, 4, 4, 4))
    sizes = [tuple(level.shape[1:]) for level in net(torch.zeros(2, 3, 32, 32))]
    assert sizes == [(96, 16, 16), (192, 8, 8), (192, 8, 8), (192, 8, 8)]
    assert [tuple(level.shape[2:]) for level in net(torch.zeros(2, 3, 31, 33))] == [(16, 17), (8, 9), (8, 9), (8, 9)]


def test_the_first_pooling_takes_the_largest_and_the_second_the_mean():
    net = NIN(out_blocks=(2,))
    assert len(net.blocks) == 2
    assert [[type(layer) for layer in block if "Pool" in type(layer).__name__] for block in net.blocks] == [[nn.MaxPool2d], [nn.AvgPool2d]]


@pytest.mark.parametrize("blocks", [(), (0, 1), (2, 1), (5,)])
def test_blocks_that_are_not_there_are_refused(blocks):
    with pytest.raises(ConfigError, match="ascending numbers of 1 to 4"):
        BACKBONES.build({"type": "NIN", "out_blocks": blocks})
