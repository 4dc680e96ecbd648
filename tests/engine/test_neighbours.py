import torch
import torch.nn.functional as F

from visionkit.engine.neighbours import nearest


def test_the_nearest_are_those_of_the_largest_cosine_without_the_query_itself():
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    features[7] = 3 * features[2]                            # the same direction
    found = nearest(features, torch.tensor([2, 9]), 4)
    for query, row in zip((2, 9), found.tolist(), strict=True):
        likeness = F.cosine_similarity(features[query][None], features)
        assert row == [index for index in likeness.argsort(descending=True).tolist() if index != query][:4]
    assert found[0, 0] == 7
