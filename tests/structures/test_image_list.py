import pytest
import torch

from visionkit.structures import ImageList


def test_each_image_is_padded_by_itself():
    images = ImageList.pad([torch.ones(3, 28, 30), torch.ones(3, 5, 56)], divisor=28, value=-1.0)
    assert [tuple(image.shape) for image in images.images] == [(3, 28, 56), (3, 28, 56)]
    assert images.sizes == ((28, 30), (5, 56))
    assert (images.images[0][:, :, 30:] == -1).all()
    assert (images.images[0][:, :, :30] == 1).all()
    assert (images.images[1][:, 5:] == -1).all()
    assert (images.images[1][:, :5] == 1).all()


def test_a_size_is_all_of_the_image_unless_it_is_said():
    images = ImageList((torch.zeros(3, 4, 5), torch.zeros(3, 2, 9)))
    assert images.sizes == ((4, 5), (2, 9))
    assert len(images) == 2
    assert images.device == torch.device("cpu")


def test_some_images_and_another_dtype():
    images = ImageList((torch.zeros(3, 4, 5), torch.ones(3, 2, 9)), ((4, 5), (2, 7))).to(torch.float64)
    assert images.sizes == ((4, 5), (2, 7))
    assert images[1:].sizes == ((2, 7),)
    assert torch.equal(images[1:].images[0], torch.ones(3, 2, 9, dtype=torch.float64))


@pytest.mark.parametrize("images, sizes, message", [
    ([], (), "at least one image"),
    ([torch.zeros(3, 4, 4)], ((4, 4), (4, 4)), "2 sizes for 1 images"),
    ([torch.zeros(1, 4, 4)], (), r"image 0 must be \[3, h, w\]"),
    ([torch.zeros(1, 3, 4, 4)], (), r"image 0 must be \[3, h, w\]"),
    ([torch.zeros(3, 4, 4), torch.zeros(3, 4, 4).double()], (), "image 1 is torch.float64"),
    ([torch.zeros(3, 4, 4)], ((5, 4),), "said to be 5x4 in a tensor of 4x4"),
])
def test_a_list_that_breaks_its_law_is_refused(images, sizes, message):
    with pytest.raises(ValueError, match=message):
        ImageList(images, sizes)
