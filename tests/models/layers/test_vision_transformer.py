import math

import pytest
import torch
import torch.nn.functional as F

from visionkit.models.layers import (
    PatchEmbedding,
    VisionTransformerBlock,
    VisionTransformerEncoder,
    merged_patches,
    patch_coordinates,
    patches_of,
    resized_positions,
    rotated,
    rotation_2d,
)
from visionkit.registry import ConfigError
from visionkit.structures import ImageBatch, ImageList, PackedSequence


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_patches_are_what_a_convolution_of_their_size_sees():
    """Measured: 2.4e-7 of values up to 1.3."""
    images = [random(3, 8, 12), random(3, 4, 8, seed=1)]
    embed = PatchEmbedding(4, 5)
    patches = patches_of(ImageList(images), 4)
    assert patches.grids == ((2, 3), (1, 2))
    expected = torch.cat([embed.proj(image[None])[0].flatten(1).T for image in images])
    torch.testing.assert_close(embed(patches.tokens), expected, rtol=0, atol=2e-6)


def test_images_of_a_batch_keep_the_padding_that_fills_their_patches_and_no_more():
    images = [random(3, 8, 12), random(3, 5, 7, seed=1)]
    batch = ImageBatch.stack(images, divisor=8)
    assert patches_of(batch, 4).grids == ((2, 3), (2, 2))
    assert patches_of(batch, 4, divisor=8).grids == ((2, 4), (2, 2))
    second = F.pad(images[1], (0, 1, 0, 3))
    assert torch.equal(patches_of(batch, 4).split()[1], patches_of(ImageList((second,)), 4).tokens)
    assert torch.equal(patches_of(batch.tensor, 4).tokens, patches_of(ImageList(batch.tensor.unbind()), 4).tokens)


@pytest.mark.parametrize("images", [ImageList((torch.zeros(3, 8, 8), torch.zeros(3, 8, 6))), torch.zeros(1, 3, 6, 8),
                                    ImageBatch(torch.zeros(2, 3, 6, 8), ((4, 4), (5, 8)))], ids=["list", "tensor", "batch"])
def test_an_image_that_patches_do_not_fill_is_an_error(images):
    with pytest.raises(ConfigError, match=r"image \d has \d+x\d+ (in a canvas of \d+x\d+ )?pixels.*multiples of 4 only; take.*multiple=4"):
        patches_of(images, 4)


def test_positions_at_the_tables_size_are_the_table_and_bicubic_between_centres_at_others():
    """The weights of a cubic with a = -0.75 half-way between two cells are -0.09375, 0.59375, 0.59375, -0.09375 (Keys 1981)."""
    table = random(4, 4, 2)
    assert torch.equal(resized_positions(table, [(4, 4)]), table.flatten(0, 1))
    half = resized_positions(table, [(2, 4), (4, 4)])        # rows half-way between 0 and 1, and between 2 and 3; the border repeats
    weights = torch.tensor([-0.09375, 0.59375, 0.59375, -0.09375])
    expected = torch.einsum("r,rcd->cd", weights, table[[0, 0, 1, 2]])
    torch.testing.assert_close(half[:4], expected)
    assert torch.equal(half[8:], table.flatten(0, 1))


def test_positions_are_interpolated_in_float32_under_autocast_too():
    table = random(4, 4, 2)
    expected = resized_positions(table, [(5, 3)])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resized_positions(table, [(5, 3)]), expected)


def test_rows_and_columns_of_patches():
    images = PackedSequence.of_grids(torch.zeros(8, 1), [(2, 3), (2, 1)])
    rows, columns = patch_coordinates(images)
    assert rows.tolist() == [0, 0, 0, 1, 1, 1, 0, 1]
    assert columns.tolist() == [0, 1, 2, 0, 1, 2, 0, 0]


def test_rotations_are_worked_out_by_hand():
    """D = 8: frequencies 1 and 10000^(-1/2) = 0.01; pairs turn by x, y, 0.01 x, 0.01 y."""
    rows, columns = torch.tensor([3]), torch.tensor([2])
    angles = [2.0, 3.0, 0.02, 0.03]
    turned = rotated(torch.tensor([[1.0, 0, 1, 0, 1, 0, 0, 1]]), rotation_2d(rows, columns, 8))
    expected = [value for angle in angles[:3] for value in (math.cos(angle), math.sin(angle))] + [-math.sin(0.03), math.cos(0.03)]
    assert turned[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_rotating_both_grids_by_the_same_offset_leaves_the_products_unchanged():
    """Spec 10, item 4. Measured: 1.3e-5 of products up to 27; with another offset for the keys they change by 21."""
    q, k = random(12, 2, 72), random(12, 2, 72, seed=1)
    rows, columns = (place.flatten() for place in torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij"))

    def products(offset_q, offset_k):
        turned = [rotated(x, rotation_2d(rows + dy, columns + dx, 72)) for x, (dy, dx) in ((q, offset_q), (k, offset_k))]
        return torch.einsum("thd,shd->hts", *turned)

    here = products((0, 0), (0, 0))
    assert (products((5, 11), (5, 11)) - here).abs().max() < 5e-5
    assert (products((5, 11), (11, 5)) - here).abs().max() > 1


def test_rotation_keeps_the_dtype_and_needs_heads_of_four_channels():
    rotation = rotation_2d(torch.arange(3), torch.arange(3), 8)
    assert rotated(torch.zeros(3, 2, 8, dtype=torch.bfloat16), rotation).dtype == torch.bfloat16
    assert rotated(torch.zeros(3, 2, 8, dtype=torch.float64), rotation).dtype == torch.float64
    with pytest.raises(ValueError, match="multiple of 4 channels, got 6"):
        rotation_2d(torch.arange(3), torch.arange(3), 6)


def test_a_block_is_the_one_of_the_paper_on_each_sequence_by_itself():
    """Beside torch's layer, which is given one sequence at a time. Measured: 6.6e-7 of values up to 3.7."""
    block, theirs = VisionTransformerBlock(16, 4, 24), torch.nn.TransformerEncoderLayer(16, 4, 24, 0.0, "gelu", 1e-6, True, True)
    names = {"attention.qkv.weight": "self_attn.in_proj_weight", "attention.qkv.bias": "self_attn.in_proj_bias",
             "attention.output": "self_attn.out_proj", "attention_norm": "norm1", "feed_forward_norm": "norm2",
             "feed_forward.linear1": "linear1", "feed_forward.linear2": "linear2"}
    state = {}
    for name, value in block.state_dict().items():
        value.add_(random(*value.shape) * 0.1)
        ours = max((key for key in names if name.startswith(key)), key=len)
        state[name.replace(ours, names[ours])] = value
    theirs.load_state_dict(state)
    tokens = PackedSequence.pack([random(5, 16, seed=3), random(1, 16, seed=4), random(7, 16, seed=5)])
    expected = torch.cat([theirs(sequence[None])[0] for sequence in tokens.split()])
    torch.testing.assert_close(block(tokens.tokens, tokens.cu_seqlens, tokens.lengths), expected, rtol=0, atol=3e-6)


def test_checkpointing_gives_the_same_output_and_gradients_and_keeps_less():
    tokens = PackedSequence.of_grids(random(13, 16), [(2, 5), (3, 1)])
    rotation = rotation_2d(*patch_coordinates(tokens), 8)
    plain, checkpointing = (VisionTransformerEncoder(3, 16, 2, 24, checkpointing=switch) for switch in (False, True))
    checkpointing.load_state_dict(plain.state_dict())
    kept, outcomes = [], []
    for encoder in (plain, checkpointing):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            output = encoder(tokens, rotation).tokens
        output.square().sum().backward()
        kept.append(sum(sizes))
        outcomes.append([output, *(parameter.grad for parameter in encoder.parameters())])
    assert kept[1] < 0.5 * kept[0]
    for ours, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, expected)


def test_patches_are_merged_row_by_row_within_a_group_and_groups_row_by_row():
    """Spec 10, item 5: a map whose values are its coordinates, row * 10 + column."""
    first = torch.tensor([[row * 10 + column] for row in range(4) for column in range(6)])
    second = first[:4] + 500                                 # 2 x 2, whatever its numbers
    merged = merged_patches(PackedSequence.pack([first, second], [(4, 6), (2, 2)]), (2, 2))
    assert merged.grids == ((2, 3), (1, 1))
    assert merged.tokens.squeeze(-1).tolist() == [[0, 1, 10, 11], [2, 3, 12, 13], [4, 5, 14, 15], [20, 21, 30, 31], [22, 23, 32, 33],
                                                  [24, 25, 34, 35], [500, 501, 502, 503]]


def test_heads_that_do_not_share_the_channels_are_refused():
    with pytest.raises(ValueError, match="16 channels cannot be split among 3 heads"):
        VisionTransformerBlock(16, 3, 24)
