import math

import pytest
import torch

from visionkit.models.targets import IGNORED, NEGATIVE, AllSampler, AnchorGrid, BalancedSampler, BoxCoder, IoUMatcher

NONE = torch.zeros(0, 4)


def test_anchors_stand_on_the_grid_with_the_asked_sides():
    (first, second) = AnchorGrid(strides=(4, 8), scales=(4,), ratios=(1.0, 4.0))([(2, 3), (1, 1)])
    assert first.shape == (2 * 3 * 2, 4)
    assert first[0].tolist() == [-8, -8, 8, 8]                   # square, side 4 strides of 4 pixels, on the origin
    assert first[1].tolist() == [-4, -16, 4, 16]                 # four times as high as wide, the same area
    assert first[2].tolist() == [-4, -8, 12, 8]                  # the next position: one stride to the right
    assert first[6].tolist() == [-8, -4, 8, 12]                  # the next row: one stride down
    assert second[0].tolist() == [-16, -16, 16, 16]


def test_anchors_want_one_size_a_level():
    with pytest.raises(ValueError, match="2 strides .* got 1 feature levels"):
        AnchorGrid(strides=(4, 8))([(2, 3)])


def test_box_offsets_known_values():
    coder = BoxCoder(stds=(0.1, 0.1, 0.2, 0.2))
    deltas = coder.encode(torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[5.0, 0, 15, 40]]))
    torch.testing.assert_close(deltas, torch.tensor([[5.0, 5.0, 0.0, math.log(2) / 0.2]]))


def test_decoding_undoes_encoding():
    generator = torch.Generator().manual_seed(0)
    boxes, references = (torch.cat([corner, corner + 1 + 50 * torch.rand(20, 2, generator=generator)], 1)
                         for corner in torch.rand(2, 20, 2, generator=generator) * 100)
    coder = BoxCoder((0.1, 0.1, 0.2, 0.2))
    torch.testing.assert_close(coder.decode(references, coder.encode(references, boxes)), boxes)


def test_wild_predictions_decode_to_finite_boxes():
    box = BoxCoder().decode(torch.tensor([[0.0, 0, 16, 16]]), torch.tensor([[0.0, 0, 1e4, 1e4]]))
    assert (box[0, 2] - box[0, 0]).item() == pytest.approx(1000)


def test_boxes_are_positive_negative_or_between():
    objects = torch.tensor([[0.0, 0, 10, 10]])
    boxes = torch.tensor([[0.0, 0, 10, 8], [0, 0, 10, 5], [0, 0, 10, 2]])       # IoU 0.8, 0.5, 0.2
    assert IoUMatcher(0.7, 0.3)(boxes, objects, NONE).tolist() == [0, IGNORED, NEGATIVE]


def test_background_may_be_asked_to_lie_near_an_object():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 3], [0, 0, 10, 1], [0, 0, 10, 0.9], [50, 50, 60, 60]])    # IoU 1, 0.3, 0.1, 0.09, 0
    matched = IoUMatcher(0.5, 0.5, background_from=0.1)(boxes, boxes[:1], NONE)
    assert matched.tolist() == [0, NEGATIVE, NEGATIVE, IGNORED, IGNORED]


def test_all_that_is_not_ignored_may_be_taken():
    positives, negatives = AllSampler()(torch.tensor([NEGATIVE, 3, IGNORED, 0, NEGATIVE, IGNORED]))
    assert positives.tolist() == [1, 3]
    assert negatives.tolist() == [0, 4]


def test_an_object_that_no_box_reaches_keeps_its_best_ones():
    objects = torch.tensor([[0.0, 0, 10, 10], [100, 100, 110, 110]])
    boxes = torch.tensor([[0.0, 0, 10, 5], [0, 5, 10, 10], [0, 0, 10, 2]])      # IoU 0.5, 0.5, 0.2 with the first
    assert IoUMatcher(0.7, 0.3, rescue_from=0.3)(boxes, objects, NONE).tolist() == [0, 0, NEGATIVE]
    assert IoUMatcher(0.7, 0.3, rescue_from=0.6)(boxes, objects, NONE).tolist() == [IGNORED, IGNORED, NEGATIVE]


def test_of_two_objects_that_a_box_overlaps_most_the_last_takes_it():
    objects = torch.tensor([[0.0, 0, 10, 9.5], [0, 0, 10, 7.5]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    assert IoUMatcher(0.7, 0.3, rescue_from=0.3)(boxes, objects, NONE).tolist() == [1, NEGATIVE]


def test_background_within_a_crowd_is_left_out():
    crowd = torch.tensor([[0.0, 0, 100, 100]])
    boxes = torch.tensor([[10.0, 10, 20, 20], [95, 0, 115, 10], [200, 200, 210, 210]])
    assert IoUMatcher()(boxes, NONE, crowd).tolist() == [IGNORED, NEGATIVE, NEGATIVE]


def test_without_objects_all_is_background():
    assert IoUMatcher(rescue_from=0.3)(torch.zeros(3, 4), NONE, NONE).tolist() == [NEGATIVE] * 3


def test_sampling_fills_up_with_negatives():
    matched = torch.tensor([0] * 10 + [NEGATIVE] * 100 + [IGNORED] * 10)
    positives, negatives = BalancedSampler(num=16, positive_fraction=0.25)(matched)
    assert len(positives) == 4
    assert len(negatives) == 12
    assert (matched[positives] == 0).all()
    assert (matched[negatives] == NEGATIVE).all()
    positives, negatives = BalancedSampler(num=64, positive_fraction=0.5)(matched)
    assert (len(positives), len(negatives)) == (10, 54)


def test_sampling_is_random_unless_told_otherwise():
    matched = torch.full((1000,), NEGATIVE)
    random = BalancedSampler(num=10, positive_fraction=0.5)
    assert not torch.equal(random(matched)[1], random(matched)[1])
    assert BalancedSampler(num=4, positive_fraction=0.5, shuffle=False)(matched)[1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("build, message", [
    (lambda: IoUMatcher(0.3, 0.7), "negative=0.7, positive=0.3"),
    (lambda: IoUMatcher(rescue_from=0), "no box overlaps would take every box"),
    (lambda: BalancedSampler(0, 0.5), "num >= 1"),
    (lambda: BoxCoder((1, 1, 1)), "stds must be four positive numbers"),
    (lambda: AnchorGrid((4,), scales=()), "not empty"),
], ids=["matcher", "rescue", "sampler", "coder", "anchors"])
def test_wrong_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
