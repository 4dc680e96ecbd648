import pytest
import torch

from visionkit.ops import pyramid_roi_align, roi_align

pytest.importorskip("triton", reason="Triton has no wheel for this platform", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")      # NumPy's, interpreting

INSIDE, FAR_OUTSIDE, AT_THE_CORNER = [0, 4.3, 2.1, 40.7, 33.3], [1, -30, -20, 100, 90], [1, 60, 40, 72, 56]
EMPTY, INSIDE_OUT = [0, 10, 10, 10, 10], [1, 30, 20, 24, 12]
ROIS = torch.tensor([INSIDE, FAR_OUTSIDE, AT_THE_CORNER, EMPTY, INSIDE_OUT])


def maps(channels, dtype=torch.float32, height=7, width=9, order=torch.channels_last):
    """By default in the memory order that kernels read without a copy."""
    values = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))
    return values.to(dtype).contiguous(memory_format=order).requires_grad_()


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [1, 3, -1])
def test_kernels_agree_with_the_portable_tier(assert_tiers_agree, sampling_ratio, aligned):
    assert_tiers_agree(lambda x, rois: roi_align(x, rois, (3, 2), 1 / 8, sampling_ratio, aligned), maps(3), ROIS)


@pytest.mark.parametrize("channels", [1, 8, 81, 260])
def test_channels_come_in_blocks(assert_tiers_agree, channels):
    assert_tiers_agree(lambda x, rois: roi_align(x, rois, (1, 2), 1 / 8, 2), maps(channels), ROIS[:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(assert_tiers_agree, dtype):
    assert_tiers_agree(lambda x, rois: roi_align(x, rois, 2, 1 / 8, 2), maps(16, dtype), ROIS)


def test_memory_order_makes_no_difference(assert_tiers_agree):
    def pool(x, rois):
        return roi_align(x, rois, 2, 1 / 8, 2)
    assert_tiers_agree(pool, maps(5, order=torch.contiguous_format), ROIS)
    assert_tiers_agree(lambda x, rois: pool(x[..., ::2], rois), maps(5, width=18), ROIS)
    assert_tiers_agree(pool, maps(5), ROIS.double())


def test_each_box_is_pooled_from_its_level(assert_tiers_agree):
    levels = torch.tensor([1, 0, 0, 1, 0])
    assert_tiers_agree(lambda fine, coarse, rois, level: pyramid_roi_align([fine, coarse], rois, level, 2, [1 / 4, 1 / 8], 2),
                       maps(4, height=14, width=18), maps(4), ROIS, levels)


def test_no_boxes_pool_to_nothing(assert_tiers_agree):
    assert_tiers_agree(lambda x, rois: roi_align(x, rois, 2), maps(3), torch.zeros(0, 5))


@pytest.mark.parametrize("sampling_ratio", [2, -1])
def test_boxes_that_are_no_boxes_give_nan_and_touch_nothing(on_tier, device, sampling_ratio):
    nan, infinity = float("nan"), float("inf")
    rois = torch.tensor([[0, nan, 0, 9, 9], [0, 0, 0, infinity, 9], [2, 0, 0, 9, 9], [-1, 0, 0, 9, 9], [0, 8, 8, 40, 40]], device=device)
    x = maps(3).detach().to(device).requires_grad_()
    output = on_tier("triton", roi_align, x, rois, 2, 1 / 8, sampling_ratio)
    assert output.isnan().flatten(1).all(1).tolist() == [True] * 4 + [False]
    assert not output[4].isnan().any()
    grad, = on_tier("triton", torch.autograd.grad, output, x, torch.ones_like(output))
    torch.testing.assert_close(grad.sum(), torch.tensor(3.0 * 2 * 2, device=device))       # of the one sound box


def test_a_box_of_no_level_gives_nan(on_tier, device):
    x = maps(3).detach().to(device)
    levels = torch.tensor([1, 2, -1], device=device)
    output = on_tier("triton", pyramid_roi_align, [x, x], ROIS[:3].to(device), levels, 2, [1 / 8, 1 / 8], 2)
    assert output.isnan().flatten(1).all(1).tolist() == [False, True, True]


def test_a_box_far_larger_than_the_map_does_not_take_forever(on_tier, device):
    x = torch.ones(1, 2, 4, 4, device=device)
    output = on_tier("triton", roi_align, x, torch.tensor([[0, -1e30, -1e30, 1e30, 1e30]], device=device), 3, 1.0, -1)
    assert output.isfinite().all()
    assert 0 <= output.max() < 1e-6                                          # nearly all samples lie outside
