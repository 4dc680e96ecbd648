import torch

from visionkit.models.layers import global_mean
from visionkit.structures import PackedSequence


def test_maps_vectors_tokens_and_groups_of_tokens_are_averaged_over_an_image():
    features = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = features.mean((2, 3))
    assert torch.equal(global_mean(features), expected)
    assert torch.equal(global_mean(expected), expected)
    tokens = PackedSequence.pack([image.flatten(1).T for image in features])
    torch.testing.assert_close(global_mean(tokens), expected)
    groups = PackedSequence.pack([image.flatten(1).T.unflatten(0, (4, 4)) for image in features])
    torch.testing.assert_close(global_mean(groups), expected)


def test_tokens_of_a_long_image_do_not_count_for_a_short_one():
    tokens = PackedSequence.pack([torch.ones(5, 2), torch.full((1, 2), 7.0)])
    assert global_mean(tokens).tolist() == [[1, 1], [7, 7]]
