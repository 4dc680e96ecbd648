import pytest
import torch
from torch import nn

from visionkit.models.backbones import StridedConvs
from visionkit.registry import BACKBONES
from visionkit.testing import check_backbone


@pytest.mark.parametrize("channels", [(8, 16, 24), (8, 8, 16, 24)], ids=["32 pixels", "64 pixels"])
def test_it_keeps_the_contract_of_a_backbone(channels):
    check_backbone(BACKBONES.build({"type": "StridedConvs", "channels": channels}))


def test_the_papers_encoder_halves_32_pixels_to_16_8_and_4():
    backbone = StridedConvs()
    assert [tuple(level.shape) for level in backbone(torch.zeros(2, 3, 32, 32))] == [(2, 64, 16, 16), (2, 128, 8, 8), (2, 256, 4, 4)]
    weights = 16 * (3 * 64 + 64 * 128 + 128 * 256)           # 4x4 kernels, without bias
    assert sum(parameter.numel() for parameter in backbone.parameters()) == weights + 2 * (64 + 128 + 256)


def test_the_copy_of_the_layers_after_a_map_has_their_shape_and_weights_of_its_own():
    backbone = StridedConvs((4, 6, 8, 10))
    maps = backbone(torch.randn(2, 3, 64, 64))
    copy = backbone.copy_after(1)
    assert copy(maps[1]).shape == maps[3].shape
    assert [type(layer) for layer in copy[0]] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    own = {id(parameter) for parameter in backbone.parameters()}
    assert not any(id(parameter) in own for parameter in copy.parameters())
    assert torch.equal(backbone.copy_after(3)(maps[3]), maps[3])        # nothing follows the last one


def test_no_convolution_is_no_backbone():
    with pytest.raises(ValueError, match=r"one positive number a convolution, got \(\)"):
        StridedConvs(())
