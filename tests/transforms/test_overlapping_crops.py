import pytest
import torch

from visionkit.registry import TRANSFORMS
from visionkit.transforms import OverlappingCrops


def images(count=2, size=(14, 17)):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))


def test_crops_are_windows_of_the_image_in_the_order_of_reading():
    crops = TRANSFORMS.build({"type": "OverlappingCrops", "size": 6, "stride": 3})(images())
    assert crops.shape == (2, 3, 4, 3, 6, 6)                 # what begins at rows 0, 3, 6 and columns 0, 3, 6, 9
    for row in range(3):
        for column in range(4):
            assert torch.equal(crops[:, row, column], images()[:, :, 3 * row:3 * row + 6, 3 * column:3 * column + 6])


def test_256_pixels_give_the_papers_grid_of_7_by_7():
    assert OverlappingCrops()(torch.zeros(1, 3, 256, 256)).shape == (1, 7, 7, 3, 64, 64)


def test_a_subcrop_moves_from_crop_to_crop_in_training_and_stays_in_the_middle_of_zeros():
    torch.manual_seed(0)
    puzzle = OverlappingCrops(6, 4, subcrop=4)
    whole = OverlappingCrops(6, 4)(images())
    crops = puzzle(images())
    corners = []
    for crop, source in zip(crops.flatten(0, 2), whole.flatten(0, 2), strict=True):
        assert not crop[:, [0, 5]].any()
        assert not crop[:, :, [0, 5]].any()
        found = [(y, x) for y in range(3) for x in range(3) if torch.equal(crop[:, 1:5, 1:5], source[:, y:y + 4, x:x + 4])]
        assert len(found) == 1
        corners += found
    assert len(set(corners)) > 4                             # of nine
    middle = puzzle.eval()(images())
    assert torch.equal(middle[..., 1:5, 1:5], whole[..., 1:5, 1:5])
    assert middle.count_nonzero() == middle[..., 1:5, 1:5].count_nonzero()


def test_a_gray_image_has_three_equal_channels_in_all_its_crops():
    torch.manual_seed(0)
    crops = OverlappingCrops(6, 4, gray_prob=0.5)(images(40))
    gray = (crops == crops[:, :, :, :1]).flatten(1).all(1)
    assert 10 < gray.sum() < 30
    whole = OverlappingCrops(6, 4)(images(40))
    assert torch.equal(crops[~gray], whole[~gray])
    torch.testing.assert_close(crops[gray][:, :, :, 1], whole[gray].mean(3))
    always = OverlappingCrops(6, 4, gray_prob=1.0).eval()(images(40))                   # the network has never seen a colour
    torch.testing.assert_close(always, whole.mean(3, keepdim=True).expand_as(always))


def test_a_crop_with_dropped_colors_keeps_one_channel_beside_faint_noise():
    torch.manual_seed(0)
    whole = OverlappingCrops(6, 4)(images(40)).flatten(0, 2)
    crops = OverlappingCrops(6, 4, color_drop_prob=0.5)(images(40)).flatten(0, 2)
    same = (crops == whole).flatten(2).all(2)                # [crops, 3]
    dropped = same.sum(1) == 1
    assert (dropped | same.all(1)).all()
    assert 0.35 < dropped.float().mean() < 0.65
    assert same[dropped].any(0).all()                        # each channel is kept now and then
    noise = crops[dropped][~same[dropped]]
    assert noise.std().item() == pytest.approx(0.01, rel=0.1)                               # the images' is 1


def test_in_evaluation_mode_nothing_is_drawn():
    puzzle = OverlappingCrops(6, 4, subcrop=4, gray_prob=0.5, color_drop_prob=0.5).eval()
    state = torch.get_rng_state()
    assert torch.equal(puzzle(images()), puzzle(images()))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("arguments, said", [({"subcrop": 7}, "subcrop within 1 and size"), ({"stride": 0}, "at least 1"),
                                             ({"gray_prob": 2.0}, "within 0 and 1")])
def test_a_grid_that_makes_no_sense_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        OverlappingCrops(**{"size": 6, "stride": 3} | arguments)


def test_images_smaller_than_a_crop_are_refused():
    with pytest.raises(ValueError, match=r"crops of 64 pixels do not fit into images of \(14, 17\)"):
        OverlappingCrops()(images())
