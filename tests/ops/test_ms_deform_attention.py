import math

import pytest
import torch
import torch.nn.functional as F

from visionkit.ops import MSDeformAttn, ms_deform_attention, ms_deform_attn
from visionkit.testing import check_op

SHAPES = [(3, 4), (2, 5), (1, 1)]


def case(images=2, queries=5, heads=3, channels=4, points=2, shapes=SHAPES, dtype=torch.float64, spread=0.3):
    """Random (value, spatial_shapes, level_start_index, sampling_locations, attention_weights); some samples lie outside."""
    generator = torch.Generator().manual_seed(0)
    spatial_shapes = torch.tensor(shapes)
    sizes = spatial_shapes.prod(1)
    value = torch.randn(images, int(sizes.sum()), heads, channels, generator=generator, dtype=torch.float64)
    locations = torch.rand(images, queries, heads, len(shapes), points, 2, generator=generator, dtype=torch.float64)
    locations = locations * (1 + 2 * spread) - spread
    weights = torch.rand(images, queries, heads, len(shapes) * points, generator=generator, dtype=torch.float64).softmax(-1)
    weights = weights.unflatten(-1, (len(shapes), points))
    return [value.to(dtype), spatial_shapes, sizes.cumsum(0) - sizes, locations.to(dtype), weights.to(dtype)]


def ms_deform_attn_by_hand(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    images, queries, heads, levels, points, _ = sampling_locations.shape
    output = torch.zeros(images, queries, heads, value.shape[3], dtype=value.dtype)
    for n, q, m, level, p in torch.cartesian_prod(*map(torch.arange, (images, queries, heads, levels, points))).tolist():
        height, width = spatial_shapes[level].tolist()
        x, y = (sampling_locations[n, q, m, level, p] * torch.tensor([width, height]) - 0.5).tolist()
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < height and 0 <= column < width:
                    pixel = value[n, level_start_index[level] + row * width + column, m]
                    output[n, q, m] += attention_weights[n, q, m, level, p] * (1 - abs(y - row)) * (1 - abs(x - column)) * pixel
    return output.flatten(2)


def ms_deform_attn_by_grid_sample(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    images, _, heads, channels = value.shape
    samples = []
    for level, (height, width) in enumerate(spatial_shapes.tolist()):
        start = level_start_index[level]
        maps = value[:, start:start + height * width].permute(0, 2, 3, 1).reshape(images * heads, channels, height, width)
        grid = 2 * sampling_locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        samples.append(F.grid_sample(maps, grid, align_corners=False))        # [N * M, D, Q, P]
    weights = attention_weights.transpose(1, 2).flatten(0, 1).flatten(2)      # [N * M, Q, L * P]
    output = torch.einsum("bdqk,bqk->bqd", torch.cat(samples, -1), weights)
    return output.unflatten(0, (images, heads)).transpose(1, 2).flatten(2)


def test_half_way_between_four_pixels_is_their_mean():
    value = torch.tensor([1.0, 2, 3, 6]).view(1, 4, 1, 1)
    centre = torch.full((1, 1, 1, 1, 1, 2), 0.5)
    output = ms_deform_attn(value, torch.tensor([[2, 2]]), torch.tensor([0]), centre, torch.ones(1, 1, 1, 1, 1))
    assert output.item() == 3


def test_the_first_coordinate_is_x_and_the_border_fades():
    value = torch.tensor([[1.0, 2, 4], [10, 20, 40]]).view(1, 6, 1, 1)
    locations = torch.tensor([[5 / 6, 0.25], [1.0, 0.25], [7 / 6, 0.25], [0.5, 0.75]]).view(1, 4, 1, 1, 1, 2)
    output = ms_deform_attn(value, torch.tensor([[2, 3]]), torch.tensor([0]), locations, torch.ones(1, 4, 1, 1, 1))
    torch.testing.assert_close(output.flatten(), torch.tensor([4.0, 2, 0, 20]))


def test_ms_deform_attn_agrees_with_the_definition():
    arguments = case()
    torch.testing.assert_close(ms_deform_attn(*arguments), ms_deform_attn_by_hand(*arguments), rtol=0, atol=1e-12)


def test_values_and_gradients_agree_with_grid_sample():
    arguments = case(queries=40)
    variables = [arguments[index].requires_grad_() for index in (0, 3, 4)]
    ours, theirs = ms_deform_attn(*arguments), ms_deform_attn_by_grid_sample(*arguments)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    upstream = torch.randn_like(ours)
    for mine, other in zip(*(torch.autograd.grad(output, variables, upstream) for output in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)


def test_levels_may_lie_in_any_order_and_leave_gaps():
    value, spatial_shapes, _, locations, weights = case(shapes=[(3, 4), (2, 5)])
    first, second = value.split([12, 10], 1)
    gap = torch.full_like(value[:, :3], math.nan)
    moved = torch.cat([second, gap, first], 1).requires_grad_()
    output = ms_deform_attn(moved, spatial_shapes, torch.tensor([13, 0]), locations, weights)
    torch.testing.assert_close(output, ms_deform_attn(value, spatial_shapes, torch.tensor([0, 12]), locations, weights))
    output.sum().backward()
    assert not moved.grad[:, 10:13].any()
    assert moved.grad[:, :10].any()


@pytest.mark.parametrize("block_bytes", [1, 5000])
def test_blocks_of_queries_give_the_same(block_bytes, monkeypatch):
    arguments = case(queries=7)
    variables = [arguments[index].requires_grad_() for index in (0, 3, 4)]
    whole = ms_deform_attn(*arguments)
    expected = torch.autograd.grad(whole.square().sum(), variables)
    monkeypatch.setattr(ms_deform_attention, "_BLOCK_BYTES", block_bytes)
    cut = ms_deform_attn(*arguments)
    torch.testing.assert_close(cut, whole)
    torch.testing.assert_close(torch.autograd.grad(cut.square().sum(), variables), expected)


def test_ms_deform_attn_keeps_the_contract_of_an_op():
    arguments = case(images=1, queries=3, heads=2, channels=2, shapes=[(3, 4), (2, 3)], dtype=torch.float32)
    variables = [value.requires_grad_() if value.is_floating_point() else value for value in arguments]
    value, spatial_shapes, level_start_index, locations, weights = variables
    check_op(ms_deform_attn, variables, custom_op=torch.ops.visionkit.ms_deform_attn.default, empty={
        "no images": [value[:0], spatial_shapes, level_start_index, locations[:0], weights[:0]],
        "no queries": [value, spatial_shapes, level_start_index, locations[:, :0], weights[:, :0]],
    })


def test_half_precision_accumulates_in_float32():
    for dtype in (torch.bfloat16, torch.float16):
        arguments = case(dtype=dtype)
        exact = [value.float() if value.is_floating_point() else value for value in arguments]
        assert torch.equal(ms_deform_attn(*arguments), ms_deform_attn(*exact).to(dtype))


def test_backward_gives_the_same_bits_every_time():
    arguments = case(queries=300, heads=4, channels=16, shapes=[(20, 20), (10, 10)], dtype=torch.float32)
    variables = [arguments[index].requires_grad_() for index in (0, 3, 4)]
    first, second = (torch.autograd.grad(ms_deform_attn(*arguments).square().sum(), variables) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_location_that_is_not_a_number_shows_in_its_query_alone():
    arguments = case()
    arguments[3][1, 2, 0, 1, 1, 0] = math.nan
    variables = [arguments[index].requires_grad_() for index in (0, 3, 4)]
    output = ms_deform_attn(*arguments)
    assert output[1, 2, :4].isnan().all()
    assert output.isnan().sum() == 4
    torch.autograd.grad(output.nan_to_num().sum(), variables)


@pytest.mark.parametrize("index, value, message", [
    (0, torch.zeros(2, 23, 12), r"value must be \[N, S, M, D\], got \[2, 23, 12\]"),
    (1, torch.tensor([[3, 4], [2, 5], [2, 2]]), "a level of 2x2 pixels that starts at 22 does not lie in the 23 pixels of value"),
    (1, torch.tensor([[3.0, 4], [2, 5], [1, 1]]), "spatial_shapes must be integers, got torch.float32"),
    (2, torch.tensor([0, 12]), r"level_start_index must be \[3\].*got \[2\]"),
    (3, torch.zeros(2, 5, 3, 2, 2, 2), r"\[2, 5, 3, 3, 2, 2\] for value \[2, 23, 3, 4\] and 3 levels, got \[2, 5, 3, 2, 2, 2\]"),
    (4, torch.zeros(2, 5, 3, 3, 1), r"attention_weights must be \[2, 5, 3, 3, 2\].*got \[2, 5, 3, 3, 1\]"),
    (3, torch.zeros(2, 5, 3, 3, 2, 2, device="meta"), "value is on cpu, sampling_locations on meta"),
], ids=["value", "level size", "float sizes", "starts", "locations", "weights", "device"])
def test_ms_deform_attn_tells_what_is_wrong(index, value, message):
    arguments = case(dtype=torch.float32)
    arguments[index] = value
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(*arguments)


def test_the_module_calls_the_function():
    arguments = case()
    assert torch.equal(MSDeformAttn()(*arguments), ms_deform_attn(*arguments))
