import pytest
import torch

from visionkit.ops import PSRoIAlign, ps_roi_align, roi_align
from visionkit.testing import check_op

# inside; far outside; past the right and bottom border; touching them; empty; inside out
ROIS = [[0, 4.3, 2.1, 40.7, 33.3], [1, -30, -20, 100, 90], [1, 60, 40, 80, 72], [0, 0, 0, 71, 63], [0, 10, 10, 10, 10], [1, 30, 20, 24, 12]]


def case(classes=2, rows=3, columns=3, dtype=torch.float64, size=(8, 9)):
    input = torch.randn(2, classes * rows * columns, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return input.to(dtype), torch.tensor(ROIS, dtype=torch.float64).to(dtype)


def ps_roi_align_by_hand(input, rois, rows, columns, scale, sampling_ratio):
    """RoIAlign of all maps, of which bin (i, j) of class c keeps its own: (c P + i) Q + j."""
    pooled = roi_align(input, rois, (rows, columns), scale, sampling_ratio, aligned=True)
    output = pooled.new_zeros(len(rois), input.shape[1] // (rows * columns), rows, columns)
    for _, c, i, j in torch.cartesian_prod(*map(torch.arange, output.shape)).tolist():
        output[:, c, i, j] = pooled[:, (c * rows + i) * columns + j, i, j]
    return output


def bin_major(input, bins):
    """The same score maps with channels in the order (bin, class)."""
    return input.unflatten(1, (-1, bins)).transpose(1, 2).flatten(1, 2)


def test_each_bin_reads_its_own_map():
    input = torch.arange(8.0).view(1, 8, 1, 1).expand(1, 8, 4, 4).contiguous()           # channel k holds k everywhere; 2 classes, 2x2 bins
    pooled = ps_roi_align(input, torch.tensor([[0.0, 0, 0, 4, 4]]), 2, 1.0, 2)
    assert pooled[0].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


@pytest.mark.parametrize("sampling_ratio", [1, 2, -1])
@pytest.mark.parametrize("rows, columns", [(3, 3), (1, 1), (2, 4)])
def test_ps_roi_align_is_roi_align_of_each_bins_own_map(rows, columns, sampling_ratio):
    input, rois = case(rows=rows, columns=columns)
    expected = ps_roi_align_by_hand(input, rois, rows, columns, 1 / 8, sampling_ratio)
    torch.testing.assert_close(ps_roi_align(input, rois, (rows, columns), 1 / 8, sampling_ratio), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampling_ratio", [2, -1])
def test_gradients_are_right_at_the_borders_too(sampling_ratio):
    input, rois = case(classes=1, rows=2, columns=2, size=(4, 5))
    assert torch.autograd.gradcheck(lambda x: ps_roi_align(x, rois, 2, 1 / 16, sampling_ratio), input.requires_grad_())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("is_bin_major", [False, True])
def test_the_order_of_channels_and_memory_changes_nothing(is_bin_major, memory_format):
    input, rois = case(classes=3, rows=2, columns=3)
    upstream = torch.randn(len(rois), 3, 2, 3, dtype=input.dtype)
    maps = (bin_major(input, 6) if is_bin_major else input).contiguous(memory_format=memory_format).requires_grad_()
    other = ps_roi_align(maps, rois, (2, 3), 1 / 8, 2, bin_major=is_bin_major)
    other_grad = torch.autograd.grad(other, maps, upstream)[0]
    assert other_grad.is_contiguous(memory_format=memory_format)
    pooled = ps_roi_align(input.requires_grad_(), rois, (2, 3), 1 / 8, 2)
    grad = torch.autograd.grad(pooled, input, upstream)[0]
    assert torch.equal(pooled, other)
    assert torch.equal(bin_major(grad, 6) if is_bin_major else grad, other_grad)


@pytest.mark.parametrize("sampling_ratio", [2, -1])
def test_ps_roi_align_keeps_the_contract_of_an_op(sampling_ratio):
    input, rois = case(rows=2, columns=2, dtype=torch.float32, size=(4, 5))
    input.requires_grad_()
    check_op(lambda input, rois: ps_roi_align(input, rois, 2, 1 / 16, sampling_ratio), [input, rois[:3]],
             empty={"no boxes": [input, rois[:0]], "no images": [input[:0], rois[:0]]})
    torch.library.opcheck(torch.ops.visionkit.ps_roi_align.default, (input, rois, 2, 2, 1 / 16, sampling_ratio, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(dtype):
    input, rois = case(dtype=torch.float32)
    assert torch.equal(ps_roi_align(input.to(dtype), rois, 3, 1 / 8, 2), ps_roi_align(input.to(dtype).float(), rois, 3, 1 / 8, 2).to(dtype))


def test_backward_gives_the_same_bits_every_time():
    input = torch.randn(2, 9 * 5, 30, 30, requires_grad=True)
    rois = torch.cat([torch.randint(0, 2, (200, 1)).float(), torch.rand(200, 2) * 100, 100 + torch.rand(200, 2) * 100], 1)
    first, second = (torch.autograd.grad(ps_roi_align(input, rois, 3, 1 / 8).square().sum(), input)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("change, message", [
    ({"input": torch.zeros(9, 5, 5)}, r"ps_roi_align needs an input \[B, C, H, W\]"),
    ({"boxes": torch.zeros(2, 4)}, r"ps_roi_align needs boxes \[R, 5\]"),
    ({"input": torch.zeros(2, 10, 5, 5)}, "3x3 bins needs a multiple of 9 channels, got 10"),
    ({"sampling_ratio": 0}, "sampling_ratio must be positive, or -1"),
    ({"boxes": torch.tensor([[-1.0, 0, 0, 1, 1]])}, "name images -1 to -1 of a batch of 2"),
], ids=["input", "boxes", "channels", "sampling", "image index"])
def test_ps_roi_align_tells_what_is_wrong(change, message):
    arguments = {"input": torch.zeros(2, 9, 5, 5), "boxes": torch.zeros(2, 5), "output_size": 3} | change
    with pytest.raises(ValueError, match=message):
        ps_roi_align(**arguments)


def test_the_module_calls_the_function_with_its_settings():
    input, rois = case()
    module = PSRoIAlign(3, 1 / 8, 2, bin_major=True)
    assert torch.equal(module(input, rois), ps_roi_align(input, rois, 3, 1 / 8, 2, bin_major=True))
    assert "sampling_ratio=2, bin_major=True" in repr(module)


@pytest.mark.parametrize("sampling_ratio", [2, -1])
def test_ps_roi_align_gives_torchvisions_numbers_and_gradients(sampling_ratio):
    peer = pytest.importorskip("torchvision", reason="the peer to compare with is not installed", exc_type=ImportError).ops.ps_roi_align
    input, rois = case()
    input.requires_grad_()
    rois = rois[:4]                                                           # of RoIs without samples torchvision divides 0 by 0
    ours, theirs = (align(input, rois, 3, 1 / 8, sampling_ratio) for align in (ps_roi_align, peer))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    grads = [torch.autograd.grad(output.square().sum(), input)[0] for output in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-10)
