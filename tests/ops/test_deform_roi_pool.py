import math
import sys
from types import SimpleNamespace

import pytest
import torch

from visionkit.ops import DeformPSRoIPool, DeformRoIPool, deform_ps_roi_pool, deform_roi_pool
from visionkit.testing import check_op

FORMS = [(deform_roi_pool, 3, 1), (deform_ps_roi_pool, 12, 2)]              # with channels and classes of a case


def round_in_c(value: float) -> int:
    return math.floor(value + 0.5) if value >= 0 else math.ceil(value - 0.5)


def deform_roi_pool_by_hand(input, rois, offset, rows, columns, scale, samples=4, gamma=0.1, *, position_sensitive=False):
    height, width = input.shape[2:]
    channels = input.shape[1] // (rows * columns if position_sensitive else 1)
    classes = offset.shape[1] // 2
    output = torch.zeros(len(rois), channels, rows, columns, dtype=input.dtype)
    for r, (image, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (round_in_c(value) + last for value, last in zip(box, (0, 0, 1, 1), strict=True))
        left, top, roi_width, roi_height = x1 * scale - 0.5, y1 * scale - 0.5, max((x2 - x1) * scale, 0.1), max((y2 - y1) * scale, 0.1)
        for c in range(channels):
            n = c * classes // channels                                     # the class that the channel moves with
            for i in range(rows):
                for j in range(columns):
                    dx, dy = (gamma * offset[r, 2 * n + axis, i, j].item() * size for axis, size in ((0, roi_width), (1, roi_height)))
                    image_map = input[int(image), (c * rows + i) * columns + j if position_sensitive else c]
                    values = []
                    for y in (top + dy + (i + s / samples) * roi_height / rows for s in range(samples)):
                        for x in (left + dx + (j + s / samples) * roi_width / columns for s in range(samples)):
                            if -0.5 <= y <= height - 0.5 and -0.5 <= x <= width - 0.5:
                                values.append(bilinear(image_map, min(max(y, 0), height - 1), min(max(x, 0), width - 1)))
                    output[r, c, i, j] = sum(values) / max(len(values), 1)
    return output


def bilinear(image, y: float, x: float) -> float:
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
    upper = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
    lower = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
    return (upper * (1 - (y - top)) + lower * (y - top)).item()


def case(channels=3, classes=1, size=(2, 3), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, channels, 7, 9, generator=generator, dtype=dtype)
    inside, far_outside, at_the_corner = [0, 4.3, 2.1, 40.7, 33.3], [1, -30, -20, 100, 90], [1, 60, 40, 72, 56]
    inside_out, beside = [1, 30, 20, 24, 12], [0, 300, 0, 400, 10]
    rois = torch.tensor([inside, far_outside, at_the_corner, inside_out, beside], dtype=dtype)
    return input, rois, torch.randn(len(rois), 2 * classes, *size, generator=generator, dtype=dtype)


def test_a_bin_is_the_mean_of_4x4_samples_from_its_edge_on():
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)
    # columns 4 to 7, so from 3.5 to 7.5; samples at 3.5, 4.5, 5.5 and 6.5
    assert deform_roi_pool(ramp, torch.tensor([[0.0, 4, 4, 7, 7]]), None, 1).item() == 5


@pytest.mark.parametrize("axis, slopes", [(0, (1.0, 0.0)), (1, (0.0, 2.0))], ids=["x", "y"])
def test_an_offset_moves_a_bin_by_a_tenth_of_the_roi_x_first(axis, slopes):
    """Spec 03, item 7: on a ramp, to 1e-12."""
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    ramp = (3 * x + 2 * y)[None, None].double()
    rois = torch.tensor([[0, 10.0, 12, 21, 19]], dtype=torch.float64)      # 12 x 8 pixels
    offset = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    offset[:, axis, 0, 1] = 1.5
    moved = deform_roi_pool(ramp, rois, offset, 2) - deform_roi_pool(ramp, rois, None, 2)
    expected = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    expected[..., 0, 1] = 0.1 * 1.5 * (12 * 3 if axis == 0 else 8 * 2)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(2, 3), (3, 1)])
@pytest.mark.parametrize("samples", [1, 4])
def test_deform_roi_pool_agrees_with_the_definition(size, samples):
    """Differences up to 2e-15."""
    input, rois, offset = case(size=size)
    expected = deform_roi_pool_by_hand(input, rois, offset * 3, *size, 1 / 8, samples, 0.2)
    torch.testing.assert_close(deform_roi_pool(input, rois, offset * 3, size, 1 / 8, samples, 0.2), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_deform_ps_roi_pool_agrees_with_the_definition(classes):
    """Differences up to 1e-15."""
    input, rois, offset = case(4 * 6, classes)
    expected = deform_roi_pool_by_hand(input, rois, offset, 2, 3, 1 / 8, position_sensitive=True)
    torch.testing.assert_close(deform_ps_roi_pool(input, rois, offset, (2, 3), 1 / 8), expected, rtol=0, atol=1e-12)


def test_samples_further_apart_than_pixels_agree_with_the_definition():
    input = torch.randn(1, 2, 30, 40, dtype=torch.float64)
    rois, offset = torch.tensor([[0, 1.0, 2, 36, 27], [0, 3, 3, 9, 28]], dtype=torch.float64), torch.randn(2, 2, 1, 2, dtype=torch.float64)
    expected = deform_roi_pool_by_hand(input, rois, offset, 1, 2, 1.0)
    torch.testing.assert_close(deform_roi_pool(input, rois, offset, (1, 2)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("op, channels, classes", FORMS, ids=["plain", "position-sensitive"])
def test_offsets_of_zero_change_nothing(op, channels, classes):
    input, rois, offset = case(channels, classes)
    assert torch.equal(op(input, rois, torch.zeros_like(offset), (2, 3), 1 / 8), op(input, rois, None, (2, 3), 1 / 8))


def test_each_bin_reads_maps_of_its_own():
    input = torch.arange(2 * 6.0).view(1, 12, 1, 1).expand(1, 12, 8, 8)
    output = deform_ps_roi_pool(input, torch.tensor([[0.0, 0, 0, 7, 7]]), None, (2, 3))
    assert output.tolist() == [[[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]]


def test_each_class_moves_with_its_own_offsets():
    """Spec 03, item 7: the class whose offsets are 0 stays to the bit."""
    input, rois, offset = case(4 * 6, 2)
    still = deform_ps_roi_pool(input, rois, torch.zeros_like(offset), (2, 3), 1 / 8)
    offset[:, :2] = 0
    moved = deform_ps_roi_pool(input, rois, offset, (2, 3), 1 / 8)
    assert torch.equal(moved[:, :2], still[:, :2])                          # channels 0 and 1 are of class 0
    assert not torch.isclose(moved[0, 2:], still[0, 2:]).any()


@pytest.mark.parametrize("op, channels, classes", [(deform_roi_pool, 2, 1), (deform_ps_roi_pool, 8, 1), (deform_ps_roi_pool, 8, 2)])
def test_gradients_are_right_at_the_borders_too(op, channels, classes):
    input = torch.randn(1, channels, 5, 6, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 3, 2, 15, 13], [0, 14, 12, 25, 21], [0, -9, -7, 30, 24]], dtype=torch.float64)
    offset = torch.randn(3, 2 * classes, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, o: op(x, rois, o, 2, 1 / 4), (input, offset))
    assert torch.autograd.gradcheck(lambda x: op(x, rois, None, 2, 1 / 4), (input,))


def test_regions_in_blocks_give_the_same(monkeypatch):
    input, rois, offset = case(12, 2)
    rest = (2, 3, 1 / 8, 4, 0.1, True)
    grad = torch.randn(5, 2, 2, 3, dtype=torch.float64)
    whole = torch.ops.visionkit.deform_roi_pool(input, rois, offset, *rest)
    grads = torch.ops.visionkit.deform_roi_pool_backward(grad, input, rois, offset, *rest)
    monkeypatch.setattr(sys.modules["visionkit.ops.deform_roi_pool"], "_BLOCK_UNITS", 2 * 12)
    assert torch.equal(torch.ops.visionkit.deform_roi_pool(input, rois, offset, *rest), whole)
    for ours, theirs in zip(torch.ops.visionkit.deform_roi_pool_backward(grad, input, rois, offset, *rest), grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("op, channels, classes", FORMS, ids=["plain", "position-sensitive"])
def test_deform_roi_pool_keeps_the_contract_of_an_op(op, channels, classes):
    input, rois, offset = (value.float() for value in case(channels, classes))
    input = input[..., :4, :5]                                              # finite differences take their time
    rest = ((2, 3), 1 / 8)
    check_op(op, [input.requires_grad_(), rois + 0.2, offset.requires_grad_(), *rest],
             empty={"no boxes": [input, rois[:0], offset[:0], *rest], "no images": [input[:0], rois[:0], offset[:0], *rest]})


@pytest.mark.parametrize("with_offset", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_deform_roi_pool_is_one_operator_to_the_compiler(memory_format, with_offset):
    input, rois, offset = (value.float() for value in case(12, 2))
    input = input.contiguous(memory_format=memory_format).requires_grad_()
    offset = offset.requires_grad_() if with_offset else None
    rest = (2, 3, 1 / 8, 4, 0.1, True)
    torch.library.opcheck(torch.ops.visionkit.deform_roi_pool.default, (input, rois, offset, *rest))
    input, offset = input.detach(), None if offset is None else offset.detach()
    grad = torch.randn(5, 2, 2, 3)
    torch.library.opcheck(torch.ops.visionkit.deform_roi_pool_backward.default, (grad, input, rois, offset, *rest))
    half = [None if value is None else value.bfloat16() for value in (grad, input, rois, offset)]
    torch.library.opcheck(torch.ops.visionkit.deform_roi_pool_backward.default, (*half, *rest))


@pytest.mark.parametrize("position_sensitive", [False, True])
def test_the_memory_format_is_that_of_the_table(position_sensitive):
    input, rois, offset = case(12, 1)
    op = deform_ps_roi_pool if position_sensitive else deform_roi_pool
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        leaf = input.contiguous(memory_format=memory_format).requires_grad_()
        output = op(leaf, rois, offset, (2, 3), 1 / 8)
        assert output.is_contiguous(memory_format=torch.channels_last)
        grad, = torch.autograd.grad(output.square().sum(), leaf)
        assert grad.is_contiguous(memory_format=memory_format if position_sensitive else torch.channels_last)
        results.append((output, grad))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16, torch.float32),
                                    (torch.float32, torch.float32, torch.bfloat16), (torch.float16, torch.float32, torch.float32)])
def test_mixed_dtypes_under_autocast_pool_in_the_dtype_of_the_input(dtypes):
    input, rois, offset = (value.to(dtype) for value, dtype in zip(case(), dtypes, strict=True))
    input.requires_grad_()
    offset.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = deform_roi_pool(input, rois, offset, (2, 3), 1 / 8)
        output.float().square().mean().backward()
    assert (output.dtype, input.grad.dtype, offset.grad.dtype) == (dtypes[0], dtypes[0], dtypes[2])
    exact = deform_roi_pool(input.float(), rois.float(), offset.float(), (2, 3), 1 / 8)
    assert torch.equal(output, exact.to(dtypes[0]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_its_bins_and_in_no_others(value):
    input, rois, offset = case()
    input = input[..., :8]                                                   # an even width: wrapped indices do not cancel
    sound = deform_roi_pool(input, rois, offset, (2, 3), 1 / 8)
    rois[1, 3] = value
    offset[2, 0, 1, 1] = math.nan
    output = deform_roi_pool(input, rois, offset, (2, 3), 1 / 8)
    expected = sound.clone()
    expected[1] = math.nan
    expected[2, :, 1, 1] = math.nan
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output.nan_to_num(), expected.nan_to_num())


def test_backward_gives_the_same_bits_every_time():
    input = torch.randn(2, 16, 40, 40, requires_grad=True)
    rois = torch.cat([torch.randint(0, 2, (200, 1)).float(), torch.rand(200, 2) * 100, 200 + torch.rand(200, 2) * 100], 1)
    offset = torch.randn(200, 2, 7, 7, requires_grad=True)
    first, second = (torch.autograd.grad(deform_roi_pool(input, rois, offset, 7, 1 / 8).square().sum(), (input, offset)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_kernels_that_serve_the_tensor_are_called_with_the_operators_arguments(monkeypatch):
    input, rois, offset = case(dtype=torch.float32)
    served = SimpleNamespace(forward=lambda *arguments: arguments[0].new_full((5, 3, 2, 3), len(arguments)),
                             backward=lambda *arguments: (torch.full_like(input, len(arguments)), torch.full_like(offset, 1)))
    module = sys.modules["visionkit.ops.deform_roi_pool"]
    monkeypatch.setattr(module, "kernels", lambda op, tensor: served if op == "deform_roi_pool" else None)
    rest = (2, 3, 1 / 8, 4, 0.1, False)
    assert (torch.ops.visionkit.deform_roi_pool(input, rois, offset, *rest) == 9).all()
    grads = torch.ops.visionkit.deform_roi_pool_backward(torch.ones(5, 3, 2, 3), input, rois, offset, *rest)
    assert (grads[0] == 10).all()
    assert (grads[1] == 1).all()


@pytest.mark.parametrize("op, change, message", [
    (deform_roi_pool, {"input": torch.zeros(3, 5, 5)}, r"deform_roi_pool needs an input \[B, C, H, W\], got \[3, 5, 5\]"),
    (deform_roi_pool, {"boxes": torch.tensor([[2.0, 0, 0, 1, 1]] * 3)}, "name images 2 to 2 of a batch of 2"),
    (deform_roi_pool, {"offset": torch.zeros(3, 2, 2, 3)}, r"needs offset \[3, 2 \* N, 2, 2\].*got \[3, 2, 2, 3\]"),
    (deform_roi_pool, {"offset": torch.zeros(3, 4, 2, 2)}, r"needs offset \[R, 2, P, Q\], got \[3, 4, 2, 2\].*deform_ps_roi_pool"),
    (deform_roi_pool, {"offset": torch.zeros(3, 2, 2, 2, device="meta")}, "input is on cpu, offset on meta"),
    (deform_roi_pool, {"sampling_ratio": 0}, "sampling_ratio must be positive, got 0"),
    (deform_roi_pool, {"output_size": 0}, "output_size must be positive"),
    (deform_ps_roi_pool, {"input": torch.zeros(2, 10, 5, 5)}, "deform_ps_roi_pool with 2x2 bins needs a multiple of 4 channels, got 10"),
    (deform_ps_roi_pool, {"offset": torch.zeros(3, 3, 2, 2)}, "an N that divides the 2 output channels, got 3"),
    (deform_ps_roi_pool, {"offset": torch.zeros(3, 6, 2, 2)}, "an N that divides the 2 output channels, got 6"),
    (deform_ps_roi_pool, {"offset": torch.zeros(3, 0, 2, 2)}, "an N that divides the 2 output channels, got 0"),
])
def test_deform_roi_pool_tells_what_is_wrong(op, change, message):
    arguments = {"input": torch.zeros(2, 8, 5, 5), "boxes": torch.zeros(3, 5), "offset": torch.zeros(3, 2, 2, 2), "output_size": 2} | change
    with pytest.raises(ValueError, match=message):
        op(**arguments)


@pytest.mark.parametrize("module, op, channels", [(DeformRoIPool, deform_roi_pool, 3), (DeformPSRoIPool, deform_ps_roi_pool, 12)])
def test_the_modules_call_the_functions_with_their_settings(module, op, channels):
    input, rois, offset = case(channels)
    assert torch.equal(module((2, 3), 1 / 8, 2, 0.3)(input, rois, offset), op(input, rois, offset, (2, 3), 1 / 8, 2, 0.3))
