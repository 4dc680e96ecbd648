import pytest
import torch
from torch import nn

from visionkit.models.heads import DeformableRoIPooling, RoIBoxHead
from visionkit.ops import boxes_to_rois, deform_roi_pool

BOXES = [torch.tensor([[8.0, 8, 72, 72], [16, 24, 88, 80]]), torch.tensor([[0.0, 16, 64, 96]])]


def pooling(**changes) -> DeformableRoIPooling:
    torch.manual_seed(0)
    return DeformableRoIPooling(**{"in_channels": (3, 8), "strides": (4, 4), "reduced_channels": 6} | changes)


def test_the_offset_layer_has_98_outputs_for_12544_features_and_starts_at_zero():
    """Spec: 256 channels of 7x7 bins, (dx, dy) of each bin."""
    layer = pooling(reduced_channels=256).offset
    assert layer.weight.shape == (98, 12544)
    assert not layer.weight.any()
    assert not layer.bias.any()


def test_bins_start_in_place():
    pool = pooling()
    features = [torch.randn(2, 3, 24, 24), torch.randn(2, 8, 24, 24)]
    rois = boxes_to_rois(BOXES) - torch.tensor([0.0, 0, 0, 1, 1])                       # the op counts the last pixel as inside
    still = deform_roi_pool(pool.conv_new(features[1]).relu(), rois, None, 7, 0.25)
    assert torch.equal(pool(features, BOXES), still)


def test_an_offset_of_one_moves_a_bin_by_a_tenth_of_the_boxs_size():
    """On maps that rise by 1 a pixel along x, or along y, bins rise by 0.1 * side / stride: 1.6 for a box of 64 pixels at stride 4."""
    pool = pooling(in_channels=(2,), strides=(4,), reduced_channels=2)
    nn.init.dirac_(pool.conv_new.weight)
    ramp = torch.arange(24.0)
    features = [torch.stack([ramp.expand(24, 24), ramp[:, None].expand(24, 24)])[None]]
    box = [torch.tensor([[16.0, 16, 80, 48]])]                                          # 64 wide, 32 high
    before = pool(features, box)
    nn.init.ones_(pool.offset.bias[:49].data)                                           # dx of the 49 bins; dy follow
    moved = pool(features, box) - before
    torch.testing.assert_close(moved[:, 0], torch.full((1, 7, 7), 1.6), rtol=0, atol=1e-5)
    assert moved[:, 1].abs().max() < 1e-5
    nn.init.zeros_(pool.offset.bias[:49].data)
    nn.init.ones_(pool.offset.bias[49:].data)
    moved = pool(features, box) - before
    torch.testing.assert_close(moved[:, 1], torch.full((1, 7, 7), 0.8), rtol=0, atol=1e-5)


def test_offsets_learn_in_the_first_step():
    pool = pooling()
    pool([torch.randn(2, 8, 24, 24)], BOXES).square().mean().backward()
    assert all(value.grad.any() for value in pool.parameters())


def test_no_boxes_give_no_features():
    assert pooling()([torch.randn(1, 8, 24, 24)], [torch.zeros(0, 4)]).shape == (0, 6, 7, 7)


def test_a_box_head_is_as_wide_as_its_pooling():
    head = RoIBoxHead(3, (3, 8), (4, 4), {"type": "DeformableRoIPooling", "reduced_channels": 5, "pool_size": 3}, hidden_channels=(16,))
    assert head.hidden[0].in_features == 5 * 9
    logits, deltas = head([torch.randn(2, 3, 24, 24), torch.randn(2, 8, 24, 24)], BOXES)
    assert logits.shape == (3, 4)
    assert deltas.shape == (3, 3, 4)


def test_maps_of_different_width_are_refused():
    with pytest.raises(ValueError, match="same channels on each, got"):
        RoIBoxHead(3, (3, 8), (4, 8))
