import pytest
import torch
from torch import nn

from visionkit.registry import NECKS


def mapper(**changes):
    return NECKS.build({"type": "ChannelMapper", "in_channels": (8, 16, 24), "strides": (8, 16, 32), "out_channels": 32,
                        "num_levels": 5} | changes)


def test_every_level_has_the_same_channels_and_extra_levels_half_the_size():
    neck = mapper()
    features = [torch.randn(2, channels, *size) for channels, size in ((8, (20, 13)), (16, (10, 7)), (24, (5, 4)))]
    pyramid = neck(features)
    assert [tuple(level.shape) for level in pyramid] == [(2, 32, *size) for size in ((20, 13), (10, 7), (5, 4), (3, 2), (2, 1))]
    assert neck.out_channels == (32,) * 5
    assert neck.strides == (8, 16, 32, 64, 128)


def test_levels_do_not_see_each_other_and_the_first_extra_one_sees_the_coarsest_input():
    neck = mapper().double()
    features = [torch.randn(1, channels, 8, 8, dtype=torch.float64, requires_grad=True) for channels in (8, 16, 24)]
    seen = []
    for level in neck(features):
        gradients = torch.autograd.grad(level.square().sum(), features, retain_graph=True, allow_unused=True)
        seen.append([gradient is not None for gradient in gradients])
    assert seen == [[True, False, False], [False, True, False], [False, False, True], [False, False, True], [False, False, True]]
    # of the input itself, not of its projection
    nn.init.zeros_(neck.lateral[2][0].weight)
    assert torch.autograd.grad(neck(features)[3].square().sum(), features[2])[0].any()


def test_levels_are_normalised_in_32_groups():
    level = mapper(out_channels=64)([torch.randn(1, channels, 8, 8) for channels in (8, 16, 24)])[0]
    groups = level.view(32, -1)
    torch.testing.assert_close(groups.mean(1), torch.zeros(32), rtol=0, atol=1e-5)
    torch.testing.assert_close(groups.var(1, unbiased=False), torch.ones(32), rtol=0, atol=1e-2)


def test_it_says_what_it_cannot_build():
    with pytest.raises(ValueError, match="at least its 3 input levels, got num_levels=2"):
        mapper(num_levels=2)
    with pytest.raises(ValueError, match="a multiple of 32, got 48"):
        mapper(out_channels=48)
