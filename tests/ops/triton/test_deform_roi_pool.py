import pytest
import torch

from visionkit.ops.deform_roi_pool import deform_ps_roi_pool, deform_roi_pool

pytest.importorskip("triton", reason="Triton has no wheel for this platform", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")            # NumPy's, interpreting

INSIDE, FAR_OUTSIDE, AT_THE_CORNER = [0, 4.3, 2.1, 40.7, 33.3], [1, -30, -20, 100, 90], [1, 60, 40, 72, 56]
ONE_PIXEL, INSIDE_OUT, HALVES = [0, 10, 10, 10, 10], [1, 30, 20, 24, 12], [0, -4.5, -12.5, 28.5, 36.5]
ROIS = torch.tensor([INSIDE, FAR_OUTSIDE, AT_THE_CORNER, ONE_PIXEL, INSIDE_OUT, HALVES])
TOLERANCE = {"rtol": 1e-5, "atol": 3e-5}                                     # gradients of offsets sum over samples and channels


def inputs(channels, classes=1, *, dtype=torch.float32, width=9, order=torch.channels_last):
    """Maps, and offsets of 3 x 2 bins."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, channels, 7, width, generator=generator).to(dtype).contiguous(memory_format=order)
    offset = torch.randn(len(ROIS), 2 * classes, 3, 2, generator=generator) * 3
    return maps.requires_grad_(), offset.to(dtype).requires_grad_()


def pool(maps, offset, rois=ROIS, op=deform_roi_pool, sampling_ratio=2):
    return op(maps, rois.to(maps.device), offset, (3, 2), 1 / 8, sampling_ratio)


def pool_scores(maps, offset):
    return pool(maps, offset, op=deform_ps_roi_pool)


@pytest.mark.parametrize("sampling_ratio", [1, 2, 4])
def test_kernels_agree_with_the_portable_tier(assert_tiers_agree, sampling_ratio):
    assert_tiers_agree(lambda *tensors: pool(*tensors, sampling_ratio=sampling_ratio), *inputs(4), **TOLERANCE)


def test_without_offsets_nothing_moves(assert_tiers_agree):
    assert_tiers_agree(lambda maps: pool(maps, None), inputs(4)[0], **TOLERANCE)
    assert_tiers_agree(lambda maps: pool_scores(maps, None), inputs(24)[0], **TOLERANCE)


@pytest.mark.parametrize("channels, classes", [(1, 1), (6, 6), (6, 3), (20, 1)])
def test_classes_move_by_themselves(assert_tiers_agree, channels, classes):
    assert_tiers_agree(pool_scores, *inputs(6 * channels, classes), **TOLERANCE)


@pytest.mark.parametrize("channels", [1, 8, 81, 260])
def test_channels_come_in_blocks(assert_tiers_agree, channels):
    maps, offset = inputs(channels)
    offset = offset.detach()[:2].requires_grad_()
    assert_tiers_agree(lambda *tensors: pool(*tensors, rois=ROIS[:2], sampling_ratio=1), maps, offset, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(assert_tiers_agree, dtype):
    assert_tiers_agree(pool, *inputs(8, dtype=dtype))


def test_offsets_may_be_in_float32_where_the_maps_are_not(assert_tiers_agree):
    maps, offset = inputs(8)
    assert_tiers_agree(pool, maps.detach().bfloat16().requires_grad_(), offset, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("op, channels", [(pool, 5), (pool_scores, 12)], ids=["plain", "position-sensitive"])
def test_memory_order_makes_no_difference(assert_tiers_agree, op, channels):
    assert_tiers_agree(op, *inputs(channels, order=torch.contiguous_format), **TOLERANCE)
    maps, offset = inputs(channels, width=18)
    offset = offset.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert_tiers_agree(lambda maps, offset: op(maps[..., ::2], offset), maps, offset, **TOLERANCE)


def test_no_boxes_pool_to_nothing(assert_tiers_agree):
    maps, offset = inputs(3)
    assert_tiers_agree(lambda *tensors: pool(*tensors, rois=torch.zeros(0, 5)), maps, offset.detach()[:0].requires_grad_())


def test_boxes_that_are_no_boxes_give_nan_and_touch_nothing(on_tier, device):
    nan, infinity = float("nan"), float("inf")
    rois = torch.tensor([[0, nan, 0, 9, 9], [0, 0, 0, infinity, 9], [2, 0, 0, 9, 9], [-1, 0, 0, 9, 9], [0, 8, 8, 40, 40]], device=device)
    maps, offset = inputs(3)
    maps, offset = maps.detach().to(device).requires_grad_(), torch.zeros(5, 2, 3, 2, device=device)
    output = on_tier("triton", pool, maps, offset, rois)
    assert output.isnan().flatten(1).all(1).tolist() == [True] * 4 + [False]
    assert not output[4].isnan().any()
    grad, = on_tier("triton", torch.autograd.grad, output, maps, torch.ones_like(output))
    torch.testing.assert_close(grad.sum(), torch.tensor(3.0 * 3 * 2, device=device))       # of the one sound box


@pytest.mark.parametrize("bad, is_nan", [(float("nan"), True), (-float("inf"), False), (1e38, False)])
def test_an_offset_that_is_no_place_reads_nothing(on_tier, device, bad, is_nan):
    maps, offset = (tensor.detach().to(device).requires_grad_() for tensor in inputs(3))
    with torch.no_grad():
        offset[1, :, 2, 1] = bad
    output = on_tier("triton", pool, maps, offset)
    assert output[1, :, 2, 1].isnan().all() == is_nan
    assert is_nan or not output[1, :, 2, 1].any()
    grad, = on_tier("triton", torch.autograd.grad, output, maps, torch.ones_like(output))
    assert grad.isfinite().all()
