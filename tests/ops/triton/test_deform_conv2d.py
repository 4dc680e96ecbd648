import pytest
import torch

from visionkit.ops.deform_conv import deform_conv2d

pytest.importorskip("triton", reason="Triton has no wheel for this platform", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")            # NumPy's, interpreting

SIZE, KERNEL = (5, 6), (3, 2)


def inputs(channels=4, *, offset_groups=1, dtype=torch.float32, out=(5, 7), weight_channels=None):
    """Input, weight, offset and mask of a convolution with a padding of 1."""
    generator = torch.Generator().manual_seed(0)
    taps = KERNEL[0] * KERNEL[1]
    x = torch.randn(2, channels, *SIZE, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(4, weight_channels or channels, *KERNEL, generator=generator)
    offset = torch.randn(2, 2 * offset_groups * taps, *out, generator=generator) * 2        # far enough for many to fall outside
    tensors = x, weight, offset, torch.randn(2, offset_groups * taps, *out, generator=generator)
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def convolve(x, weight, offset, mask=None, **settings):
    return deform_conv2d(x, offset, weight, mask=mask, **({"padding": 1} | settings))


TOLERANCE = {"rtol": 1e-5, "atol": 3e-5}                                     # sums over taps and channels in another order


@pytest.mark.parametrize("border", ["fade", "clamp"])
@pytest.mark.parametrize("modulated", [False, True], ids=["v1", "v2"])
def test_kernels_agree_with_the_portable_tier(assert_tiers_agree, modulated, border):
    assert_tiers_agree(lambda *tensors: convolve(*tensors, border=border), *inputs()[:4 if modulated else 3], **TOLERANCE)


@pytest.mark.parametrize("channels, offset_groups", [(1, 1), (20, 2), (81, 3), (300, 1)])
def test_channels_come_in_groups_and_blocks(assert_tiers_agree, channels, offset_groups):
    x, weight, offset, mask = inputs(channels, offset_groups=offset_groups, out=(1, 2))
    atol = 2e-4 if channels == 300 else 3e-5
    assert_tiers_agree(lambda *tensors: convolve(*tensors, stride=(5, 4)), x, weight, offset, mask, rtol=1e-4, atol=atol)


def test_strides_dilations_and_groups_of_the_convolution_are_kept(assert_tiers_agree):
    settings = {"stride": (1, 2), "padding": (2, 0), "dilation": (3, 2)}
    assert_tiers_agree(lambda *tensors: convolve(*tensors, **settings), *inputs(out=(3, 2)), **TOLERANCE)
    assert_tiers_agree(convolve, *inputs(8, offset_groups=2, weight_channels=2), **TOLERANCE)


def test_bands_of_rows_make_the_same_as_the_whole(assert_tiers_agree, monkeypatch):
    monkeypatch.setattr("visionkit.ops.deform_conv._BAND_BYTES", 1)
    monkeypatch.setattr("visionkit.ops.deform_conv._GPU_BAND_BYTES", 1)
    assert_tiers_agree(convolve, *inputs(), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_samples_are_right(assert_tiers_agree, dtype):
    assert_tiers_agree(convolve, *inputs(8, dtype=dtype), rtol=0.05, atol=0.1)          # columns of kernels are rounded to the type


def test_offsets_may_be_in_float32_where_the_input_is_not(assert_tiers_agree):
    x, weight, offset, mask = (tensor.detach() for tensor in inputs(8))
    tensors = [tensor.requires_grad_() for tensor in (x.bfloat16(), weight.bfloat16(), offset, mask)]
    assert_tiers_agree(convolve, *tensors, rtol=0.05, atol=0.1)


def test_memory_order_makes_no_difference(assert_tiers_agree):
    x, *others = inputs()
    x = x.detach().contiguous()
    assert_tiers_agree(convolve, x.requires_grad_(), *others, **TOLERANCE)
    others[1:] = [tensor.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for tensor in others[1:]]
    assert_tiers_agree(convolve, x, *others, **TOLERANCE)
    x = x.detach().repeat_interleave(2, 3)
    assert_tiers_agree(lambda x, *others: convolve(x[..., ::2], *others), x.requires_grad_(), *others, **TOLERANCE)


@pytest.mark.parametrize("border", ["fade", "clamp"])
def test_whole_pixels_and_edges_are_met_exactly(assert_tiers_agree, border):
    x, weight, offset, mask = inputs()
    whole = offset.detach().round().requires_grad_()
    assert_tiers_agree(lambda *tensors: convolve(*tensors, border=border), x, weight, whole, mask, **TOLERANCE)


def test_no_images_make_no_images(assert_tiers_agree):
    x, weight, offset, mask = (tensor.detach() for tensor in inputs())
    assert_tiers_agree(convolve, x[:0].requires_grad_(), weight.requires_grad_(), offset[:0].requires_grad_(), mask[:0].requires_grad_())


@pytest.mark.parametrize("border", ["fade", "clamp"])
@pytest.mark.parametrize("bad, is_nan", [(float("nan"), True), (-float("inf"), False), (1e38, False)])
def test_an_offset_that_is_no_place_reads_nothing(on_tier, device, border, bad, is_nan):
    x, weight, offset, mask = (tensor.detach().to(device).requires_grad_() for tensor in inputs())
    with torch.no_grad():
        offset[1, :, 2, 3] = bad
    output = on_tier("triton", lambda: convolve(x, weight, offset, mask, border=border))
    assert output[1, :, 2, 3].isnan().all() == is_nan
    assert is_nan or not output[1, :, 2, 3].any()
    grad, = on_tier("triton", lambda: torch.autograd.grad(convolve(x, weight, offset, mask, border=border), x, torch.ones_like(output)))
    assert grad.isfinite().all()
