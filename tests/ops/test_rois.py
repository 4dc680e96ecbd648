import pytest
import torch

from visionkit.ops.rois import round_half_away, sound_rois


def test_halves_round_away_from_zero_as_in_c():
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 2.4, -2.6, 7.0, 0.49999997])
    assert round_half_away(values).tolist() == [1, 2, 3, -1, -2, 2, -3, 7, 0]


def test_numbers_without_a_fraction_and_those_that_are_none_stay():
    values = torch.tensor([16777217.0, -3e30, torch.nan])
    torch.testing.assert_close(round_half_away(values), values, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_works_in_half_precision(dtype):
    assert round_half_away(torch.tensor([2.5, -3.5], dtype=dtype)).tolist() == [3, -4]


@pytest.mark.parametrize("image", [-1, 2, float("nan")])
def test_boxes_must_be_of_an_image_of_the_batch(image):
    with pytest.raises(ValueError, match="of a batch of 2"):
        sound_rois(torch.tensor([[1, 0, 0, 4, 4], [image, 0, 0, 4, 4]]), 2)
