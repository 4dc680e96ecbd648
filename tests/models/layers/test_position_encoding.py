import math

import pytest
import torch

from visionkit.models.layers import LearnedPositionEncoding, SinePositionEncoding, sinusoid


def test_the_sinusoid_in_closed_form():
    """Spec 07, item 2. Measured: 6e-08 at positions 0 and 1, 2e-05 at 511, whose angle has no more digits in float32."""
    positions = torch.tensor([0, 1, 511])
    encoded = sinusoid(positions, 512)
    expected = [[trig(p / 10000 ** (2 * i / 512)) for i in range(256) for trig in (math.sin, math.cos)] for p in positions.tolist()]
    torch.testing.assert_close(encoded, torch.tensor(expected), rtol=0, atol=1e-4)
    torch.testing.assert_close(encoded[:2], torch.tensor(expected)[:2], rtol=0, atol=1e-6)


def test_a_step_further_is_a_rotation_of_each_pair_by_its_frequency():
    """PE[p + k] = R_k PE[p]. Measured: 7e-07."""
    here, there = sinusoid(torch.tensor([7, 12]), 64).unflatten(-1, (-1, 2))
    angle = 5 / 10000 ** (torch.arange(0, 64, 2) / 64)
    rotated = torch.stack([here[:, 0] * angle.cos() + here[:, 1] * angle.sin(), here[:, 1] * angle.cos() - here[:, 0] * angle.sin()], -1)
    torch.testing.assert_close(there, rotated, rtol=0, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, -0.5])
def test_sines_of_an_image_by_hand(offset):
    """Spec 11, item 5. Measured: 5e-07."""
    valid = torch.zeros(1, 4, 6, dtype=torch.bool)
    valid[:, :3, :5] = True
    encoded = SinePositionEncoding(8, offset=offset)(valid)
    assert encoded.shape == (1, 4, 6, 8)
    for row, column in [(0, 0), (2, 4), (1, 3)]:
        y, x = 2 * math.pi * (row + 1 + offset) / (3 + 1e-6), 2 * math.pi * (column + 1 + offset) / (5 + 1e-6)
        expected = [math.sin(y), math.cos(y), math.sin(y / 100), math.cos(y / 100),         # y first, pairs interleaved
                    math.sin(x), math.cos(x), math.sin(x / 100), math.cos(x / 100)]
        torch.testing.assert_close(encoded[0, row, column], torch.tensor(expected), rtol=0, atol=1e-5)


def test_sines_do_not_depend_on_the_padding_nor_on_the_other_images():
    """Spec 11, item 5: exactly."""
    alone = SinePositionEncoding(16)(torch.ones(1, 3, 5, dtype=torch.bool))[0]
    valid = torch.zeros(2, 7, 9, dtype=torch.bool)
    valid[0, :3, :5] = True
    valid[1] = True
    assert torch.equal(SinePositionEncoding(16)(valid)[0, :3, :5], alone)


def test_learned_positions_are_columns_then_rows():
    encoding = LearnedPositionEncoding(6, size=10)
    encoded = encoding(torch.ones(2, 4, 5, dtype=torch.bool))
    assert encoded.shape == (2, 4, 5, 6)
    assert torch.equal(encoded[1, 2, 4], torch.cat([encoding.columns.weight[4], encoding.rows.weight[2]]))
    assert 0 <= encoding.rows.weight.min() < encoding.rows.weight.max() <= 1


@pytest.mark.parametrize("build, message", [
    (lambda: sinusoid(torch.zeros(1), 5), "even number of channels, got 5"),
    (lambda: SinePositionEncoding(6), "multiple of 4 channels, got 6"),
    (lambda: LearnedPositionEncoding(5), "even number, got 5"),
    (lambda: LearnedPositionEncoding(4, size=3)(torch.ones(1, 2, 4, dtype=torch.bool)), "3 rows and columns at most, got .* of 2x4"),
], ids=["sinusoid", "sine", "learned", "too large"])
def test_wrong_sizes_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
