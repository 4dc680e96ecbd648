import math

import pytest
import torch

from visionkit.ops import PSRoIPool, ps_roi_pool
from visionkit.testing import check_op

# inside; far outside; past the right and bottom border; touching them; empty; inside out
ROIS = [[0, 4.3, 2.1, 40.7, 33.3], [1, -30, -20, 100, 90], [1, 60, 40, 80, 72], [0, 0, 0, 71, 63], [0, 10, 10, 10, 10], [1, 30, 20, 24, 12]]


def case(classes=2, rows=3, columns=3, dtype=torch.float64, size=(8, 9)):
    input = torch.randn(2, classes * rows * columns, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return input.to(dtype), torch.tensor(ROIS, dtype=torch.float64).to(dtype)


def rounded(value):
    return math.copysign(math.floor(abs(value) + 0.5), value)                 # halves away from 0


def bin_edges(low, high, bins, size, scale, rule):
    """(first, last) pixels of each bin along an axis, last not included."""
    if rule == "torchvision":                                                 # rounded on the map, and the last pixel is never read
        low, high = rounded(low * scale), rounded(high * scale)
        length = max(high - low, 1)
        edges = [(low + math.floor(i * length / bins), low + math.ceil((i + 1) * length / bins)) for i in range(bins)]
        limit = size - 1
    else:                                                                     # rounded on the image, the lower right pixel included
        low, high = rounded(low) * scale, (rounded(high) + 1) * scale
        length = max(high - low, 0.1)
        edges = [(math.floor(low + i * length / bins), math.ceil(low + (i + 1) * length / bins)) for i in range(bins)]
        limit = size
    return [tuple(int(min(max(edge, 0), limit)) for edge in pair) for pair in edges]


def ps_roi_pool_by_hand(input, rois, rows, columns, scale, rule):
    classes = input.shape[1] // (rows * columns)
    output = input.new_zeros(len(rois), classes, rows, columns)
    for r, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        for i, (top, bottom) in enumerate(bin_edges(y1, y2, rows, input.shape[2], scale, rule)):
            for j, (left, right) in enumerate(bin_edges(x1, x2, columns, input.shape[3], scale, rule)):
                for c in range(classes):
                    if bottom > top and right > left:
                        output[r, c, i, j] = input[int(image), (c * rows + i) * columns + j, top:bottom, left:right].mean()
    return output


def bin_major(input, bins):
    """The same score maps with channels in the order (bin, class)."""
    return input.unflatten(1, (-1, bins)).transpose(1, 2).flatten(1, 2)


def test_each_bin_reads_its_own_map():
    input = torch.arange(8.0).view(1, 8, 1, 1).expand(1, 8, 4, 4).contiguous()           # channel k holds k everywhere; 2 classes, 2x2 bins
    pooled = ps_roi_pool(input, torch.tensor([[0.0, 0, 0, 3, 3]]), 2, rule="r_fcn")
    assert pooled[0].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_the_vote_over_constant_maps_of_a_class_is_their_value():
    input, rois = case()
    input[:, 9:] = 2.5
    inside = rois[[0, 3]]
    assert (ps_roi_pool(input, inside, 3, 1 / 8, rule="r_fcn")[:, 1].mean((1, 2)) == 2.5).all()


@pytest.mark.parametrize("rule", ["torchvision", "r_fcn"])
@pytest.mark.parametrize("rows, columns", [(3, 3), (1, 1), (2, 4)])
def test_ps_roi_pool_agrees_with_the_definition(rows, columns, rule):
    """Spec 02, item 2. Differences up to 2e-16, by either rule."""
    input, rois = case(rows=rows, columns=columns)
    expected = ps_roi_pool_by_hand(input, rois, rows, columns, 1 / 8, rule)
    torch.testing.assert_close(ps_roi_pool(input, rois, (rows, columns), 1 / 8, rule=rule), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["torchvision", "r_fcn"])
def test_a_box_that_is_not_finite_covers_nothing(rule):
    input, rois = case()
    expected = ps_roi_pool(input, rois, 3, 1 / 8, rule=rule)
    rois[1, 2], rois[2, 3] = math.nan, math.inf
    pooled = ps_roi_pool(input.requires_grad_(), rois, 3, 1 / 8, rule=rule)
    pooled.sum().backward()
    assert not pooled[1:3].any()
    assert torch.equal(pooled[3:], expected[3:])


@pytest.mark.parametrize("rule", ["torchvision", "r_fcn"])
def test_gradients_are_right_at_the_borders_too(rule):
    input, rois = case(classes=1, rows=2, columns=2, size=(4, 5))
    assert torch.autograd.gradcheck(lambda x: ps_roi_pool(x, rois, 2, 1 / 16, rule=rule), input.requires_grad_())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("order", ["class-major", "bin-major"])
def test_the_order_of_channels_and_memory_changes_nothing(order, memory_format):
    input, rois = case(classes=3, rows=2, columns=3)
    upstream = torch.randn(len(rois), 3, 2, 3, dtype=input.dtype)
    results = []
    for maps, is_bin_major in ((input, False), (bin_major(input, 6) if order == "bin-major" else input, order == "bin-major")):
        maps = maps.detach().contiguous(memory_format=memory_format if results else torch.contiguous_format).requires_grad_()
        pooled = ps_roi_pool(maps, rois, (2, 3), 1 / 8, rule="r_fcn", bin_major=is_bin_major)
        grad = torch.autograd.grad(pooled, maps, upstream)[0]
        assert grad.is_contiguous(memory_format=memory_format if results else torch.contiguous_format)
        results.append((pooled, grad))
    (pooled, grad), (other, other_grad) = results
    assert torch.equal(pooled, other)
    assert torch.equal(bin_major(grad, 6) if order == "bin-major" else grad, other_grad)


def test_blocks_of_rois_give_the_same(monkeypatch):
    import importlib
    input, rois = case()
    input.requires_grad_()
    whole = ps_roi_pool(input, rois, 3, 1 / 8)
    expected = torch.autograd.grad(whole.square().sum(), input)[0]
    monkeypatch.setattr(importlib.import_module("visionkit.ops.ps_roi_pool"), "_ROI_BLOCK", 4)
    cut = ps_roi_pool(input, rois, 3, 1 / 8)
    assert torch.equal(cut, whole)
    torch.testing.assert_close(torch.autograd.grad(cut.square().sum(), input)[0], expected)


def test_ps_roi_pool_keeps_the_contract_of_an_op():
    input, rois = case(rows=2, columns=2, dtype=torch.float32, size=(4, 5))
    input.requires_grad_()
    check_op(lambda input, rois: ps_roi_pool(input, rois, 2, 1 / 16), [input, rois[:3]],
             empty={"no boxes": [input, rois[:0]], "no images": [input[:0], rois[:0]]})
    torch.library.opcheck(torch.ops.visionkit.ps_roi_pool.default, (input, rois, 2, 2, 1 / 16, "r_fcn", False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(dtype):
    input, rois = case(dtype=torch.float32)
    assert torch.equal(ps_roi_pool(input.to(dtype), rois, 3, 1 / 8), ps_roi_pool(input.to(dtype).float(), rois, 3, 1 / 8).to(dtype))


def test_backward_gives_the_same_bits_every_time():
    input = torch.randn(2, 9 * 5, 30, 30, requires_grad=True)
    rois = torch.cat([torch.randint(0, 2, (200, 1)).float(), torch.rand(200, 2) * 100, 100 + torch.rand(200, 2) * 100], 1)
    first, second = (torch.autograd.grad(ps_roi_pool(input, rois, 3, 1 / 8).square().sum(), input)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("change, message", [
    ({"input": torch.zeros(9, 5, 5)}, r"ps_roi_pool needs an input \[B, C, H, W\]"),
    ({"boxes": torch.zeros(2, 4)}, r"ps_roi_pool needs boxes \[R, 5\]"),
    ({"input": torch.zeros(2, 10, 5, 5)}, "3x3 bins needs a multiple of 9 channels, got 10"),
    ({"rule": "caffe"}, "rule must be 'torchvision' or 'r_fcn', got 'caffe'"),
    ({"boxes": torch.tensor([[2.0, 0, 0, 1, 1]])}, "name images 2 to 2 of a batch of 2"),
], ids=["input", "boxes", "channels", "rule", "image index"])
def test_ps_roi_pool_tells_what_is_wrong(change, message):
    arguments = {"input": torch.zeros(2, 9, 5, 5), "boxes": torch.zeros(2, 5), "output_size": 3} | change
    with pytest.raises(ValueError, match=message):
        ps_roi_pool(**arguments)


def test_the_module_calls_the_function_with_its_settings():
    input, rois = case()
    module = PSRoIPool(3, 1 / 8, rule="r_fcn", bin_major=True)
    assert torch.equal(module(input, rois), ps_roi_pool(input, rois, 3, 1 / 8, rule="r_fcn", bin_major=True))
    assert "rule='r_fcn', bin_major=True" in repr(module)


def test_ps_roi_pool_gives_torchvisions_numbers_and_inside_its_gradients():
    """Spec 02, item 2. Differences 0.0, of both."""
    peer = pytest.importorskip("torchvision", reason="the peer to compare with is not installed", exc_type=ImportError).ops.ps_roi_pool
    input, rois = case()
    input.requires_grad_()
    torch.testing.assert_close(ps_roi_pool(input, rois, 3, 1 / 8), peer(input, rois, 3, 1 / 8), rtol=0, atol=1e-12)
    inside = rois[:1]                                                         # at the border torchvision's gradient is another one
    grads = [torch.autograd.grad(pool(input, inside, 3, 1 / 8).square().sum(), input)[0] for pool in (ps_roi_pool, peer)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
