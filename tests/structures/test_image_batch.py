import pytest
import torch

from visionkit.structures import ImageBatch


def test_images_are_padded_at_the_right_and_bottom_to_the_divisor():
    batch = ImageBatch.stack([torch.ones(3, 5, 7), torch.ones(3, 9, 4)], divisor=8)
    assert batch.tensor.shape == (2, 3, 16, 8)
    assert batch.sizes == ((5, 7), (9, 4))
    assert batch.tensor[0].sum() == 3 * 5 * 7
    assert batch.tensor[0, :, :5, :7].min() == 1


def test_valid_marks_the_image_and_not_its_padding():
    batch = ImageBatch.stack([torch.zeros(3, 2, 3), torch.zeros(3, 4, 1)])
    assert batch.valid().sum((1, 2)).tolist() == [6, 4]
    assert batch.valid()[1, :, 0].all()
    assert batch.padded
    assert not ImageBatch.stack([torch.zeros(3, 2, 3)] * 2).padded
    assert ImageBatch.stack([torch.zeros(3, 2, 3)] * 2, divisor=4).padded


def test_some_images_and_another_dtype():
    batch = ImageBatch.stack([torch.zeros(3, 2, 3), torch.ones(3, 4, 1)]).to(torch.float64)
    assert batch[1:].sizes == ((4, 1),)
    assert torch.equal(batch[1:].tensor, batch.tensor[1:])
    assert batch.tensor.dtype == torch.float64


@pytest.mark.parametrize("sizes, message", [([(4, 4)], "1 sizes for 2 images"), ([(4, 4), (5, 4)], "image 1 is said to be 5x4")])
def test_a_batch_that_breaks_its_law_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        ImageBatch(torch.zeros(2, 3, 4, 4), sizes)


def test_an_empty_list_is_no_batch():
    with pytest.raises(ValueError, match="at least one image"):
        ImageBatch.stack([])
