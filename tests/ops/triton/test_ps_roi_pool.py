import pytest
import torch

from visionkit.ops.ps_roi_pool import ps_roi_pool

pytest.importorskip("triton", reason="Triton has no wheel for this platform", exc_type=ImportError)

INSIDE, FAR_OUTSIDE, AT_THE_CORNER = [0, 4.3, 2.1, 40.7, 33.3], [1, -30, -20, 100, 90], [1, 60, 40, 72, 56]
EMPTY, INSIDE_OUT = [0, 10, 10, 10, 10], [1, 30, 20, 24, 12]
HALVES, BEYOND = [0, -4, -12, 28, 36], [1, 90, 80, 120, 130]                # of a map pixel, for the rounding; and a box without a pixel
ROIS = torch.tensor([INSIDE, FAR_OUTSIDE, AT_THE_CORNER, EMPTY, INSIDE_OUT, HALVES, BEYOND])


def maps(classes, dtype=torch.float32, width=9, order=torch.channels_last):
    """Score maps for 3 x 2 bins."""
    values = torch.randn(2, 6 * classes, 7, width, generator=torch.Generator().manual_seed(0))
    return values.to(dtype).contiguous(memory_format=order).requires_grad_()


@pytest.mark.parametrize("rule", ["torchvision", "r_fcn"])
@pytest.mark.parametrize("bin_major", [False, True])
def test_kernels_agree_with_the_portable_tier(assert_tiers_agree, bin_major, rule):
    assert_tiers_agree(lambda x, rois: ps_roi_pool(x, rois, (3, 2), 1 / 8, rule=rule, bin_major=bin_major), maps(4), ROIS)


@pytest.mark.parametrize("rule", ["torchvision", "r_fcn"])
def test_corners_and_edges_round_as_in_the_portable_tier(assert_tiers_agree, rule):
    corners = torch.rand(40, 4, generator=torch.Generator().manual_seed(0)).mul(160).round().div(2) - 8      # whole and half image pixels
    assert_tiers_agree(lambda x, rois: ps_roi_pool(x, rois, (3, 2), 1 / 8, rule=rule), maps(1), torch.cat([torch.ones(40, 1), corners], 1))


@pytest.mark.parametrize("classes", [1, 21, 130])
def test_classes_come_in_blocks(assert_tiers_agree, classes):
    assert_tiers_agree(lambda x, rois: ps_roi_pool(x, rois, (3, 2), 1 / 8), maps(classes), ROIS[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(assert_tiers_agree, dtype):
    assert_tiers_agree(lambda x, rois: ps_roi_pool(x, rois, (3, 2), 1 / 8), maps(8, dtype), ROIS)


@pytest.mark.parametrize("bin_major", [False, True])
def test_memory_order_makes_no_difference(assert_tiers_agree, bin_major):
    def pool(x, rois):
        return ps_roi_pool(x, rois, (3, 2), 1 / 8, bin_major=bin_major)
    assert_tiers_agree(pool, maps(4, order=torch.contiguous_format), ROIS)
    assert_tiers_agree(lambda x, rois: pool(x[..., ::2], rois), maps(4, width=18), ROIS)


def test_no_boxes_pool_to_nothing(assert_tiers_agree):
    assert_tiers_agree(lambda x, rois: ps_roi_pool(x, rois, (3, 2)), maps(3), torch.zeros(0, 5))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")          # NumPy's, interpreting
@pytest.mark.parametrize("rule", ["torchvision", "r_fcn"])
def test_boxes_that_are_no_boxes_cover_no_pixel(on_tier, device, rule):
    nan, infinity = float("nan"), float("inf")
    rois = torch.tensor([[0, nan, 0, 9, 9], [0, 0, 0, infinity, 9], [2, 0, 0, 9, 9], [-1, 0, 0, 9, 9], [0, 8, 8, 40, 40]], device=device)
    x = maps(3).detach().to(device).requires_grad_()
    output = on_tier("triton", lambda: ps_roi_pool(x, rois, (3, 2), 1 / 8, rule=rule))
    assert output.flatten(1).any(1).tolist() == [False] * 4 + [True]
    grad, = on_tier("triton", torch.autograd.grad, output, x, torch.ones_like(output))
    torch.testing.assert_close(grad.sum(), torch.tensor(3.0 * 3 * 2, device=device))       # of the one sound box
