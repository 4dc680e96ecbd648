import math
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionkit.ops import RoIAlign, pyramid_roi_align, roi_align
from visionkit.testing import check_op


def bilinear(image: torch.Tensor, y: float, x: float) -> float:
    """One sample of [H, W]; up to one pixel outside counts as the border, further out as 0."""
    height, width = image.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
    lower = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
    return (upper * (1 - (y - top)) + lower * (y - top)).item()


def roi_align_by_hand(input, rois, rows, columns, scale, sampling_ratio, aligned):
    output = torch.zeros(len(rois), input.shape[1], rows, columns, dtype=input.dtype)
    for r, (image, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (value * scale - (0.5 if aligned else 0.0) for value in box)
        height, width = y2 - y1, x2 - x1
        if not aligned:
            height, width = max(height, 1.0), max(width, 1.0)
        count_y, count_x = (sampling_ratio if sampling_ratio > 0 else math.ceil(side / cells)
                            for side, cells in ((height, rows), (width, columns)))
        for c in range(input.shape[1]):
            for p in range(rows):
                for q in range(columns):
                    samples = [bilinear(input[int(image), c], y1 + height / rows * (p + (i + 0.5) / count_y),
                                        x1 + width / columns * (q + (j + 0.5) / count_x))
                               for i in range(max(count_y, 0)) for j in range(max(count_x, 0))]
                    output[r, c, p, q] = sum(samples) / max(len(samples), 1)
    return output


def case(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, 3, 7, 9, generator=generator, dtype=dtype)
    inside, far_outside, at_the_corner = [0, 4.3, 2.1, 40.7, 33.3], [1, -30, -20, 100, 90], [1, 60, 40, 72, 56]
    empty, inside_out = [0, 10, 10, 10, 10], [1, 30, 20, 24, 12]
    return input, torch.tensor([inside, far_outside, at_the_corner, empty, inside_out], dtype=dtype)


def test_a_roi_on_one_pixel_reads_that_pixel():
    input = torch.arange(12.0).view(1, 1, 3, 4)
    rois = torch.tensor([[0.0, 2, 1, 3, 2]])                                  # aligned: pixel (1, 2) covers [2, 3) x [1, 2)
    assert roi_align(input, rois, 1, sampling_ratio=1, aligned=True).item() == 6


def test_a_map_larger_than_the_cache_is_read_as_any_other():
    input = torch.arange(2 * 600 * 300.0).view(1, 2, 600, 300)
    rois = torch.tensor([[0.0, 20, 300, 21, 301]])
    assert roi_align(input, rois, 1, sampling_ratio=1, aligned=True).flatten().tolist() == [300 * 300 + 20, 900 * 300 + 20]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [1, 2, 3, -1])
def test_roi_align_agrees_with_the_definition(sampling_ratio, aligned):
    input, rois = case()
    expected = roi_align_by_hand(input, rois, 3, 2, 1 / 8, sampling_ratio, aligned)
    torch.testing.assert_close(roi_align(input, rois, (3, 2), 1 / 8, sampling_ratio, aligned), expected, rtol=0, atol=1e-12)


# no corner and no sample on a border to the last bit, where rounding would decide
corners = st.integers(-60, 120).map(lambda value: value / 7.3 + 0.0123)


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(1, 6)] * 2), st.lists(st.tuples(st.integers(0, 1), *[corners] * 4), max_size=3),
       st.tuples(*[st.integers(1, 3)] * 2), st.sampled_from([-1, 1, 2, 3]), st.booleans())
def test_boxes_anywhere_on_maps_of_any_size_agree_with_the_definition(size, boxes, output_size, sampling_ratio, aligned):
    input, rois = torch.randn(2, 2, *size, dtype=torch.float64), torch.tensor(boxes, dtype=torch.float64).view(-1, 5)
    expected = roi_align_by_hand(input, rois, *output_size, 0.6, sampling_ratio, aligned)
    torch.testing.assert_close(roi_align(input, rois, output_size, 0.6, sampling_ratio, aligned), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampling_ratio", [2, -1])
def test_gradients_are_right_at_the_borders_too(sampling_ratio):
    input, rois = case()
    assert torch.autograd.gradcheck(lambda x: roi_align(x, rois, (2, 3), 1 / 8, sampling_ratio, True), input.requires_grad_())


def test_backward_gives_the_same_bits_every_time():
    input = torch.randn(2, 16, 40, 40, requires_grad=True)
    rois = torch.cat([torch.randint(0, 2, (200, 1)).float(), torch.rand(200, 2) * 100, 200 + torch.rand(200, 2) * 100], 1)
    first, second = (torch.autograd.grad(roi_align(input, rois, 7, 1 / 8, 2).square().sum(), input)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_each_box_is_pooled_from_its_level():
    levels = [torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True) for size in ((8, 10), (4, 5))]
    rois = torch.tensor([[1, 5.0, 5, 60, 40], [0, 0, 0, 30, 30], [1, 20, 10, 80, 60]], dtype=torch.float64)
    level = torch.tensor([1, 0, 0])
    together = pyramid_roi_align(levels, rois, level, 3, [1 / 8, 1 / 16], 2)
    for index in range(3):
        alone = roi_align(levels[level[index]], rois[index:index + 1], 3, [1 / 8, 1 / 16][level[index]], 2, aligned=True)
        torch.testing.assert_close(together[index], alone[0], rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *maps: pyramid_roi_align(maps, rois, level, 2, [1 / 8, 1 / 16], 2), levels)


def test_boxes_of_each_image_may_come_as_a_list():
    input, _ = case()
    boxes = [torch.tensor([[4.0, 4, 30, 30]], dtype=torch.float64), torch.zeros(0, 4, dtype=torch.float64)]
    rois = torch.tensor([[0, 4.0, 4, 30, 30]], dtype=torch.float64)
    assert torch.equal(roi_align(input, boxes, 2, 1 / 8, 2), roi_align(input, rois, 2, 1 / 8, 2))


@pytest.mark.parametrize("sampling_ratio", [2, -1])
def test_no_boxes_pool_to_nothing_and_give_no_gradient(sampling_ratio):
    input = torch.randn(2, 3, 5, 5, requires_grad=True)
    output = roi_align(input, torch.zeros(0, 5), 7, sampling_ratio=sampling_ratio)
    assert output.shape == (0, 3, 7, 7)
    output.sum().backward()
    assert not input.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(dtype):
    input, rois = case(torch.float32)
    half = roi_align(input.to(dtype), rois, 7, 1 / 8, 4, True)
    assert half.dtype == dtype
    exact = roi_align(input.to(dtype).float(), rois, 7, 1 / 8, 4, True)
    assert torch.equal(half, exact.to(dtype))


def test_channels_last_and_strided_inputs_give_the_same_numbers():
    input, rois = case()
    expected = roi_align(input, rois, 3, 1 / 8, 2)
    assert torch.equal(roi_align(input.contiguous(memory_format=torch.channels_last), rois, 3, 1 / 8, 2), expected)
    assert torch.equal(roi_align(input.repeat_interleave(2, 3)[..., ::2], rois, 3, 1 / 8, 2), expected)


@pytest.mark.parametrize("change, message", [
    ({"input": torch.zeros(3, 5, 5)}, r"needs an input \[B, C, H, W\], got \[3, 5, 5\]"),
    ({"boxes": torch.zeros(2, 4)}, r"needs boxes \[R, 5\].*got \[2, 4\]"),
    ({"boxes": torch.tensor([[2.0, 0, 0, 1, 1]])}, "name images 2 to 2 of a batch of 2"),
    ({"sampling_ratio": 0}, "sampling_ratio must be positive, or -1"),
    ({"output_size": 0}, "output_size must be positive"),
    ({"boxes": torch.zeros(2, 5, device="meta")}, "input is on cpu, boxes on meta"),
], ids=["input", "boxes", "image index", "sampling", "output size", "device"])
def test_roi_align_tells_what_is_wrong(change, message):
    arguments = {"input": torch.zeros(2, 3, 5, 5), "boxes": torch.zeros(2, 5), "output_size": 7} | change
    with pytest.raises(ValueError, match=message):
        roi_align(**arguments)


@pytest.mark.parametrize("sampling_ratio", [2, -1])
def test_roi_align_keeps_the_contract_of_an_op(sampling_ratio):
    input, rois = case(torch.float32)
    input = input[..., :4, :5]                                              # finite differences take their time
    rest = (2, 1 / 8, sampling_ratio, True)
    check_op(roi_align, [input.requires_grad_(), rois, *rest],
             empty={"no boxes": [input, rois[:0], *rest], "no images": [input[:0], rois[:0], *rest]})


@pytest.mark.parametrize("change, message", [
    ({"inputs": []}, "one spatial scale a level, got 2 for 0 levels"),
    ({"inputs": [torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, 4, 4)]}, r"must agree .* got \[1, 3, 8, 8\].*\[1, 4, 4, 4\]"),
    ({"levels": torch.tensor([0])}, r"needs levels \[2\] of integers.*got \[1\]"),
    ({"levels": torch.tensor([0.0, 1])}, r"needs levels \[2\] of integers.*got \[2\] of torch.float32"),
    ({"levels": torch.zeros(2, dtype=torch.int64, device="meta")}, "boxes are on cpu, levels on meta"),
    ({"levels": torch.tensor([0, 2])}, "levels name 0 to 2 of a pyramid of 2"),
    ({"levels": torch.tensor([-1, 0])}, "levels name -1 to 0 of a pyramid of 2"),
], ids=["no levels", "channels", "number", "type", "device", "beyond", "negative"])
def test_pyramid_roi_align_tells_what_is_wrong(change, message):
    arguments = {"inputs": [torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 4)], "boxes": torch.zeros(2, 5), "levels": torch.tensor([0, 1]),
                 "output_size": 7, "spatial_scales": [1 / 4, 1 / 8]} | change
    with pytest.raises(ValueError, match=message):
        pyramid_roi_align(**arguments)


@pytest.mark.parametrize("levels", [1, 2])
def test_roi_align_is_one_operator_to_the_compiler(levels):
    input, rois = case(torch.float32)
    inputs = [input.clone().requires_grad_() for _ in range(levels)]
    level = torch.arange(len(rois)) % levels
    torch.library.opcheck(torch.ops.visionkit.roi_align.default, (inputs, rois, level, 3, 2, [1 / 8] * levels, 2, True))
    sizes = [7, 9] * levels
    contiguous = torch.randn(len(rois), 3, 3, 2)
    for grad in (contiguous, contiguous.bfloat16(), contiguous.mT.contiguous().mT):
        torch.library.opcheck(torch.ops.visionkit.roi_align_backward.default, (grad, rois, level, 2, sizes, [1 / 8] * levels, 2, True))


@pytest.mark.parametrize("input_dtype, box_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
                                                    (torch.float32, torch.float64), (torch.float32, torch.int64)])
def test_mixed_dtypes_under_autocast_pool_in_the_dtype_of_the_input(input_dtype, box_dtype):
    input, rois = case(torch.float32)
    input, rois = input.to(input_dtype).requires_grad_(), rois.to(box_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        output = roi_align(input, rois, 3, 1 / 8, 2)
        output.float().square().mean().backward()
    assert output.dtype == input.grad.dtype == input_dtype
    torch.testing.assert_close(output, roi_align(input, rois.to(torch.float32), 3, 1 / 8, 2))


@pytest.mark.parametrize("sampling_ratio", [2, -1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_box_that_is_not_finite_pools_to_nan_and_leaves_the_others_alone(value, sampling_ratio):
    input, rois = case()
    input = input[..., :8]                                                   # an even width: wrapped indices do not cancel
    sound = roi_align(input, rois, 3, 1 / 8, sampling_ratio)
    rois[1, 3] = value
    output = roi_align(input, rois, 3, 1 / 8, sampling_ratio)
    assert output[1].isnan().all()
    assert torch.equal(output[2:], sound[2:])
    assert torch.equal(output[0], sound[0])


def test_the_result_lies_channels_last_in_memory():
    input, rois = case()
    assert roi_align(input, rois, 3, 1 / 8, 2).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_that_come_in_any_memory_give_the_same(memory_format):
    rois = case(torch.float32)[1].repeat(41, 1)                                       # many parts for the transpose, the last one smaller
    rest = (rois, torch.zeros(len(rois), dtype=torch.int64), 2, [7, 9], [1 / 8], 2, False)
    grad = torch.randn(len(rois), 300, 7, 7)
    expected, = torch.ops.visionkit.roi_align_backward(grad.double().contiguous(memory_format=torch.channels_last), *rest)
    given, = torch.ops.visionkit.roi_align_backward(grad.contiguous(memory_format=memory_format), *rest)
    torch.testing.assert_close(given.double(), expected, rtol=0, atol=1e-3)


def test_kernels_that_serve_the_tensor_are_called_with_the_operators_arguments(monkeypatch):
    input, rois = case(torch.float32)
    level = torch.zeros(len(rois), dtype=torch.int64)
    served = SimpleNamespace(forward=lambda *arguments: arguments[0][0].new_full((len(rois), 3, 3, 2), len(arguments)),
                             backward=lambda *arguments: [arguments[0].new_full((2, 3, 7, 9), len(arguments))])
    monkeypatch.setattr(sys.modules["visionkit.ops.roi_align"], "kernels", lambda op, tensor: served if op == "roi_align" else None)
    assert (torch.ops.visionkit.roi_align([input], rois, level, 3, 2, [1 / 8], 2, True) == 8).all()
    assert (torch.ops.visionkit.roi_align_backward(torch.ones(5, 3, 3, 2), rois, level, 2, [7, 9], [1 / 8], 2, True)[0] == 8).all()


def test_the_module_calls_the_function_with_its_settings():
    input, rois = case()
    assert torch.equal(RoIAlign((3, 2), 1 / 8, 2, aligned=True)(input, rois), roi_align(input, rois, (3, 2), 1 / 8, 2, True))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [2, -1])
def test_roi_align_gives_torchvisions_numbers_and_gradients(sampling_ratio, aligned):
    peer = pytest.importorskip("torchvision", reason="the peer to compare with is not installed", exc_type=ImportError).ops.roi_align
    input, rois = case()
    input.requires_grad_()
    ours, theirs = (function(input, rois, (5, 7), 1 / 8, sampling_ratio, aligned) for function in (roi_align, peer))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    weights = torch.randn_like(ours)
    grads = [torch.autograd.grad((output * weights).sum(), input)[0] for output in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-10)
