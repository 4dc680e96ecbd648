import pytest
import torch

from visionkit.models.backbones import ConvBlocks
from visionkit.registry import BACKBONES, ConfigError


def test_parameters_and_maps_are_those_of_the_published_experiment():
    net = ConvBlocks()
    convolutions = 9 * (3 * 32 + 32 * 32 + 32 * 64 + 64 * 64 + 64 * 96 + 96 * 96)
    assert sum(value.numel() for value in net.parameters()) == convolutions + 2 * 2 * (32 + 64 + 96) == 204_384
    assert (net.out_channels, net.strides) == ((32, 64, 96), (2, 4, 8))
    assert [tuple(level.shape) for level in net(torch.zeros(2, 3, 32, 32))] == [(2, 32, 16, 16), (2, 64, 8, 8), (2, 96, 4, 4)]


def test_weights_and_maps_lie_with_their_channels_side_by_side_also_once_loaded():
    net = ConvBlocks((4, 6), 1)
    net.load_state_dict({key: value.contiguous() for key, value in ConvBlocks((4, 6), 1).state_dict().items()})
    held = [value for value in net.parameters() if value.ndim == 4] + list(net(torch.randn(2, 3, 8, 8)))
    assert len(held) == 4
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in held)


def test_odd_sizes_are_rounded_up_and_lose_no_pixel():
    net = ConvBlocks((4,), 1)
    net.blocks[0] = net.blocks[0][-1]                                                   # the pooling alone
    image = torch.arange(15.0).view(1, 1, 3, 5)
    assert net(image)[0].tolist() == [[[[6, 8, 9], [11, 13, 14]]]]


def test_a_map_is_the_last_of_its_block_and_blocks_beyond_are_not_built():
    torch.manual_seed(0)
    every, one = ConvBlocks((4, 6, 8), 1).eval(), ConvBlocks((4, 6, 8), 1, out_blocks=(2,)).eval()
    assert (one.out_channels, one.strides, len(one.blocks)) == ((6,), (4,), 2)
    one.load_state_dict({key: value for key, value in every.state_dict().items() if not key.startswith("blocks.2")})
    images = torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(one(images)[0], every(images)[1])


@pytest.mark.parametrize("changes, message", [({"channels": ()}, "a positive number for each block"), ({"convs_per_block": 0}, "positive"),
                                              ({"out_blocks": (0,)}, "numbers of 1 to 3, got"), ({"out_blocks": (2, 1)}, "ascending"),
                                              ({"out_blocks": (4,)}, "numbers of 1 to 3, got")])
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        BACKBONES.build({"type": "ConvBlocks"} | changes)
