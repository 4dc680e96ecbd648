import pytest
import torch

from visionkit.ops.ps_roi_align import ps_roi_align

pytest.importorskip("triton", reason="Triton has no wheel for this platform", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")      # NumPy's, interpreting

INSIDE, FAR_OUTSIDE, AT_THE_CORNER = [0, 4.3, 2.1, 40.7, 33.3], [1, -30, -20, 100, 90], [1, 60, 40, 72, 56]
EMPTY, INSIDE_OUT = [0, 10, 10, 10, 10], [1, 30, 20, 24, 12]
ROIS = torch.tensor([INSIDE, FAR_OUTSIDE, AT_THE_CORNER, EMPTY, INSIDE_OUT])


def maps(classes, dtype=torch.float32, width=9, order=torch.channels_last):
    """Score maps for 3 x 2 bins."""
    values = torch.randn(2, 6 * classes, 7, width, generator=torch.Generator().manual_seed(0))
    return values.to(dtype).contiguous(memory_format=order).requires_grad_()


@pytest.mark.parametrize("sampling_ratio", [1, 3, -1])
@pytest.mark.parametrize("bin_major", [False, True])
def test_kernels_agree_with_the_portable_tier(assert_tiers_agree, bin_major, sampling_ratio):
    assert_tiers_agree(lambda x, rois: ps_roi_align(x, rois, (3, 2), 1 / 8, sampling_ratio, bin_major=bin_major), maps(4), ROIS)


@pytest.mark.parametrize("classes", [1, 21, 130])
def test_classes_come_in_blocks(assert_tiers_agree, classes):
    assert_tiers_agree(lambda x, rois: ps_roi_align(x, rois, (3, 2), 1 / 8, 1), maps(classes), ROIS[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(assert_tiers_agree, dtype):
    assert_tiers_agree(lambda x, rois: ps_roi_align(x, rois, (3, 2), 1 / 8, 2), maps(8, dtype), ROIS)


@pytest.mark.parametrize("bin_major", [False, True])
def test_memory_order_makes_no_difference(assert_tiers_agree, bin_major):
    def pool(x, rois):
        return ps_roi_align(x, rois, (3, 2), 1 / 8, 2, bin_major=bin_major)
    assert_tiers_agree(pool, maps(4, order=torch.contiguous_format), ROIS)
    assert_tiers_agree(lambda x, rois: pool(x[..., ::2], rois), maps(4, width=18), ROIS)


def test_no_boxes_pool_to_nothing(assert_tiers_agree):
    assert_tiers_agree(lambda x, rois: ps_roi_align(x, rois, (3, 2)), maps(3), torch.zeros(0, 5))


def test_boxes_that_are_no_boxes_give_nan_and_touch_nothing(on_tier, device):
    nan, infinity = float("nan"), float("inf")
    rois = torch.tensor([[0, nan, 0, 9, 9], [0, 0, 0, infinity, 9], [2, 0, 0, 9, 9], [-1, 0, 0, 9, 9], [0, 8, 8, 40, 40]], device=device)
    x = maps(3).detach().to(device).requires_grad_()
    output = on_tier("triton", ps_roi_align, x, rois, (3, 2), 1 / 8, 2)
    assert output.isnan().flatten(1).all(1).tolist() == [True] * 4 + [False]
    assert not output[4].isnan().any()
    grad, = on_tier("triton", torch.autograd.grad, output, x, torch.ones_like(output))
    torch.testing.assert_close(grad.sum(), torch.tensor(3.0 * 3 * 2, device=device))       # of the one sound box
