import pytest
import torch

from visionkit.ops.ms_deform_attention import ms_deform_attn

pytest.importorskip("triton", reason="Triton has no wheel for this platform", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")            # NumPy's, interpreting

SHAPES, STARTS, PIXELS = torch.tensor([[5, 7], [3, 4], [1, 1]]), torch.tensor([0, 35, 47]), 48
IMAGES, QUERIES, HEADS, LEVELS, POINTS = 2, 5, 3, 3, 2


def inputs(channels=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(IMAGES, PIXELS, HEADS, channels, generator=generator)
    locations = torch.rand(IMAGES, QUERIES, HEADS, LEVELS, POINTS, 2, generator=generator) * 1.6 - 0.3       # a third of them outside
    weights = torch.rand(IMAGES, QUERIES, HEADS, LEVELS, POINTS, generator=generator)
    return [tensor.to(dtype).requires_grad_() for tensor in (value, locations, weights)]


def attend(value, locations, weights):
    return ms_deform_attn(value, SHAPES.to(value.device), STARTS.to(value.device), locations, weights)


@pytest.mark.parametrize("channels", [1, 4, 20, 32, 300])
def test_kernels_agree_with_the_portable_tier(assert_tiers_agree, channels):
    value, locations, weights = (tensor.detach() for tensor in inputs(channels))
    if channels > 32:                                                        # a few are enough, the interpreter is slow
        locations, weights = locations[:, 2:3], weights[:, 2:3]
    tensors = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
    assert_tiers_agree(attend, *tensors, rtol=1e-5, atol=1e-4 if channels > 32 else 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(assert_tiers_agree, dtype):
    assert_tiers_agree(attend, *inputs(8, dtype))


def test_locations_may_be_in_float32_where_the_value_is_not(assert_tiers_agree):
    value, locations, weights = inputs(8)
    assert_tiers_agree(attend, value.detach().bfloat16().requires_grad_(), locations, weights)


def test_strides_make_no_difference(assert_tiers_agree):
    _, locations, weights = inputs()
    value = inputs(8)[0]
    assert_tiers_agree(lambda v, x, w: attend(v[..., ::2], x.transpose(0, 1).contiguous().transpose(0, 1), w), value, locations, weights)


def test_shapes_may_stay_on_the_cpu(assert_tiers_agree):
    assert_tiers_agree(lambda v, x, w: ms_deform_attn(v, SHAPES, STARTS, x, w), *inputs(), rtol=1e-5, atol=2e-5)


def test_pixel_centres_and_edges_are_met_exactly(assert_tiers_agree):
    value, locations, weights = inputs()
    for corner in torch.tensor([[-0.5, 0.5], [0.5, 0.5], [1.5, 0], [1, 0.5], [3.5, 2.5], [4.5, 3.5], [3, 2], [4, 3]]):   # of 4 x 3 pixels
        where = (corner / torch.tensor([4.0, 3.0])).expand(locations.shape).contiguous().requires_grad_()
        assert_tiers_agree(attend, value, where, weights, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("queries, images", [(0, 2), (5, 0)], ids=["no queries", "no images"])
def test_nothing_comes_of_nothing(assert_tiers_agree, queries, images):
    value, locations, weights = (tensor.detach()[:images] for tensor in inputs())
    tensors = [tensor.clone().requires_grad_() for tensor in (value, locations[:, :queries], weights[:, :queries])]
    assert_tiers_agree(attend, *tensors)


@pytest.mark.parametrize("bad, is_nan", [(float("nan"), True), (-float("inf"), False), (1e38, False)])
def test_a_location_that_is_no_place_reads_nothing(on_tier, device, bad, is_nan):
    value, locations, weights = (tensor.detach().to(device).requires_grad_() for tensor in inputs())
    with torch.no_grad():
        locations[1, 2, :, :, :, 0] = bad
    output = on_tier("triton", attend, value, locations, weights)
    assert output[1, 2].isnan().all() == is_nan
    assert is_nan or not output[1, 2].any()
    output = output.detach()
    output[1, 2] = 0
    assert output.isfinite().all()
    grad, = on_tier("triton", lambda: torch.autograd.grad(attend(value, locations, weights), value, torch.ones_like(output)))
    assert grad.isfinite().all()


def test_a_level_that_does_not_fit_gives_nan(on_tier, device):
    value, locations, weights = (tensor.detach().to(device) for tensor in inputs())
    assert on_tier("triton", attend, value[:, :-1], locations, weights).isnan().all()
