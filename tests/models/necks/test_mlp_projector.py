import math

import pytest
import torch

from visionkit.models.necks import MLPProjector
from visionkit.structures import PackedSequence


def test_each_patch_is_normalised_by_itself_before_they_are_put_side_by_side():
    """A patch times a hundred, and an offset, make no difference; one normalisation of all four would be another."""
    torch.manual_seed(0)
    neck = MLPProjector((6,), (28,), 5)
    patches = torch.randn(3, 4, 6)
    other = patches.clone()
    other[:, 1] = other[:, 1] * 100 + 3
    torch.testing.assert_close(neck(PackedSequence.of_lengths(patches, [1, 2])).tokens,
                               neck(PackedSequence.of_lengths(other, [1, 2])).tokens, rtol=1e-4, atol=1e-4)


def test_it_is_worked_out_by_hand():
    """A patch (-1, 1) stays as it is (but for eps 1e-5); gelu(x) = x * (1 + erf(x / sqrt(2))) / 2, not the tanh form, which is 2e-4 off."""
    neck = MLPProjector((2,), (28,), 1, patches_per_token=1)
    with torch.no_grad():
        neck.linear1.weight.copy_(2 * torch.eye(2))
        neck.linear1.bias.zero_()
        neck.linear2.weight.copy_(torch.tensor([[0.0, 1.0]]))
        neck.linear2.bias.fill_(0.5)
    output = neck(PackedSequence.of_lengths(torch.tensor([[-1.0, 1.0]]), [1])).tokens
    x = 2 / math.sqrt(1 + 1e-5)
    assert output.item() == pytest.approx(x * (1 + math.erf(x / math.sqrt(2))) / 2 + 0.5, abs=2e-6)
