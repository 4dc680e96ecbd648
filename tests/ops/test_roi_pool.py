import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionkit.ops import RoIPool, roi_pool
from visionkit.testing import check_op


def round_in_c(value: float) -> int:
    return math.floor(value + 0.5) if value >= 0 else math.ceil(value - 0.5)


def roi_pool_by_hand(input, rois, rows, columns, scale):
    output = torch.zeros(len(rois), input.shape[1], rows, columns, dtype=input.dtype)
    for r, (image, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (round_in_c(value * scale) for value in box)
        height, width = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)             # the last pixel is inside
        for p in range(rows):
            for q in range(columns):
                top, bottom = (min(max(edge + y1, 0), input.shape[2])
                               for edge in (math.floor(p * (height / rows)), math.ceil((p + 1) * (height / rows))))
                left, right = (min(max(edge + x1, 0), input.shape[3])
                               for edge in (math.floor(q * (width / columns)), math.ceil((q + 1) * (width / columns))))
                pixels = input[int(image), :, top:bottom, left:right].flatten(1)
                output[r, :, p, q] = pixels.amax(1) if pixels.shape[1] else 0
    return output


def case(dtype=torch.float64, channels=3):
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, channels, 9, 11, generator=generator, dtype=dtype)
    inside, far_outside, at_the_corner = [0, 4.3, 2.1, 60.7, 53.3], [1, -30, -20, 100, 90], [1, 60, 40, 92, 76]
    inside_out, halves, beside, whole = [1, 30, 20, 24, 12], [0, 4, 12, 20, 28], [0, 300, 0, 400, 10], [1, 0, 0, 88, 72]
    return input, torch.tensor([inside, far_outside, at_the_corner, inside_out, halves, beside, whole], dtype=dtype)


def test_a_bin_takes_the_largest_of_its_pixels_and_its_lower_right_one_is_inside():
    input = torch.arange(12.0).view(1, 1, 3, 4)
    assert roi_pool(input, torch.tensor([[0.0, 0, 0, 2, 1]]), 1).item() == 6


@pytest.mark.parametrize("output_size", [(3, 2), (7, 7), (1, 1)])
def test_roi_pool_agrees_with_the_definition(output_size):
    input, rois = case()
    assert torch.equal(roi_pool(input, rois, output_size, 1 / 8), roi_pool_by_hand(input, rois, *output_size, 1 / 8))


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, 8)] * 2), st.lists(st.tuples(st.integers(0, 1), *[st.floats(-20, 40, width=16)] * 4), max_size=4),
       st.tuples(*[st.integers(1, 5)] * 2))
def test_boxes_anywhere_on_maps_of_any_size_agree_with_the_definition(size, boxes, output_size):
    input, rois = torch.randn(2, 2, *size, dtype=torch.float64), torch.tensor(boxes, dtype=torch.float64).view(-1, 5)
    assert torch.equal(roi_pool(input, rois, output_size, 0.5), roi_pool_by_hand(input, rois, *output_size, 0.5))


def test_a_bin_without_pixels_is_0_where_all_others_are_negative():
    input = -torch.ones(1, 2, 4, 4)
    output = roi_pool(input, torch.tensor([[0.0, 10, 0, 12, 3], [0, 0, 0, 3, 3]]), 2)
    assert (output[0] == 0).all()
    assert (output[1] == -1).all()


def test_the_gradient_goes_to_the_first_of_equal_maxima():
    input = torch.tensor([[[[0.0, 1, 1], [1, 0, 1]]]], requires_grad=True)
    roi_pool(input, torch.tensor([[0.0, 0, 0, 2, 1]]), 1).backward()
    assert input.grad.tolist() == [[[[0, 1, 0], [0, 0, 0]]]]


@pytest.mark.parametrize("output_size", [(3, 2), 1])
def test_gradients_are_right(output_size):
    input, rois = case(channels=1)
    assert torch.autograd.gradcheck(lambda x: roi_pool(x, rois, output_size, 1 / 8), input.requires_grad_())


@pytest.mark.parametrize("channels", [1, 3, 2000])
def test_blocks_of_any_size_give_the_same(channels):
    input, rois = case(torch.float32)
    input = input[:, :1].repeat(1, channels, 1, 1).requires_grad_()
    output = roi_pool(input, rois.repeat(8, 1), 7, 1 / 8)
    assert torch.equal(output[7:14, -1], roi_pool_by_hand(input[:, :1].detach(), rois, 7, 7, 1 / 8)[:, 0])
    output.sum().backward()
    torch.testing.assert_close(input.grad[:, 0], input.grad[:, -1])
    assert input.grad[:, 0].sum() == 8 * 7 * 49 - 8 * (output[:7, 0] == 0).sum()


def test_roi_pool_keeps_the_contract_of_an_op():
    input, rois = case(torch.float32)
    input = input[..., :4, :5]                                              # finite differences take their time
    check_op(roi_pool, [input.requires_grad_(), rois, (3, 2), 1 / 8],
             empty={"no boxes": [input, rois[:0], 2, 1 / 8], "no images": [input[:0], rois[:0], 2, 1 / 8]})
    torch.library.opcheck(torch.ops.visionkit.roi_pool.default, (input, rois, 3, 2, 1 / 8))
    input, grad = input.detach(), torch.randn(len(rois), 3, 3, 2)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.visionkit.roi_pool_backward.default, (grad.to(dtype), input.to(dtype), rois, 1 / 8))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_box_that_is_not_finite_pools_to_nan_and_leaves_the_others_alone(value):
    input, rois = case()
    input = input[..., :8]                                                   # an even width: wrapped indices do not cancel
    sound = roi_pool(input, rois, 3, 1 / 8)
    rois[1, 3] = value
    output = roi_pool(input, rois, 3, 1 / 8)
    assert output[1].isnan().all()
    rest = torch.tensor([0, 2, 3, 4, 5, 6])
    assert torch.equal(output[rest], sound[rest])


def test_a_feature_that_is_not_a_number_shows_in_its_bins():
    input = torch.zeros(1, 1, 4, 4, requires_grad=True)
    with torch.no_grad():
        input[0, 0, 1, 1] = torch.nan
    output = roi_pool(input, torch.tensor([[0.0, 0, 0, 3, 3]]), 2)
    assert output.isnan().flatten().tolist() == [True, False, False, False]
    output.nansum().backward()


def test_the_result_lies_channels_last_in_memory_whatever_the_input():
    input, rois = case()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        output = roi_pool(input.contiguous(memory_format=memory_format), rois, 3, 1 / 8)
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(output, roi_pool(input, rois, 3, 1 / 8))


@pytest.mark.parametrize("input_dtype, box_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_mixed_dtypes_under_autocast_pool_in_the_dtype_of_the_input(input_dtype, box_dtype):
    input, rois = case(torch.float32)
    input, rois = input.to(input_dtype).requires_grad_(), rois.to(box_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        output = roi_pool(input, rois, 3, 1 / 8)
        output.float().square().mean().backward()
    assert output.dtype == input.grad.dtype == input_dtype
    assert torch.equal(output, roi_pool(input.float(), rois.float(), 3, 1 / 8).to(input_dtype))


def test_backward_gives_the_same_bits_every_time():
    input = torch.randn(2, 16, 40, 40, requires_grad=True)
    rois = torch.cat([torch.randint(0, 2, (200, 1)).float(), torch.rand(200, 2) * 100, 200 + torch.rand(200, 2) * 100], 1)
    first, second = (torch.autograd.grad(roi_pool(input, rois, 7, 1 / 8).square().sum(), input)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("change, message", [
    ({"input": torch.zeros(3, 5, 5)}, r"roi_pool needs an input \[B, C, H, W\], got \[3, 5, 5\]"),
    ({"boxes": torch.zeros(2, 4)}, r"roi_pool needs boxes \[R, 5\].*got \[2, 4\]"),
    ({"boxes": [torch.zeros(2, 5)]}, r"boxes of image 0 must be \[R, 4\], got \[2, 5\]"),
    ({"boxes": torch.tensor([[2.0, 0, 0, 1, 1]])}, "name images 2 to 2 of a batch of 2"),
    ({"boxes": torch.zeros(2, 5, device="meta")}, "input is on cpu, boxes on meta"),
    ({"output_size": (3, 0)}, r"output_size must be positive, got \(3, 0\)"),
], ids=["input", "boxes", "list of boxes", "image index", "device", "output size"])
def test_roi_pool_tells_what_is_wrong(change, message):
    arguments = {"input": torch.zeros(2, 3, 5, 5), "boxes": torch.zeros(2, 5), "output_size": 7} | change
    with pytest.raises(ValueError, match=message):
        roi_pool(**arguments)


def test_the_module_calls_the_function_with_its_settings():
    input, rois = case()
    assert torch.equal(RoIPool((3, 2), 1 / 8)(input, rois), roi_pool(input, rois, (3, 2), 1 / 8))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_roi_pool_gives_torchvisions_numbers_and_gradients(dtype, ties):
    peer = pytest.importorskip("torchvision", reason="the peer to compare with is not installed", exc_type=ImportError).ops.roi_pool
    input, rois = case(dtype)
    input = (input.relu().round() if ties else input).requires_grad_()
    for output_size in (7, 2, 1):
        ours, theirs = (function(input, rois, output_size, 1 / 8) for function in (roi_pool, peer))
        assert torch.equal(ours, theirs)
        weights = torch.randn_like(ours)
        grads = [torch.autograd.grad((output * weights).sum(), input)[0] for output in (ours, theirs)]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-5)
