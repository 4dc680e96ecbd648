import pytest
import torch
import torch.distributed as dist

from visionkit.models.losses import mean_over_ranks

CPU = torch.device("cpu")


def test_alone_the_mean_is_the_count_and_at_least_one():
    assert mean_over_ranks(7, CPU) == 7
    assert mean_over_ranks(0, CPU) == 1


@pytest.mark.parametrize("here, elsewhere, mean", [(4, 6, 5), (0, 1, 1)])
def test_over_two_ranks_it_is_the_mean_of_both(monkeypatch, here, elsewhere, mean):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda total: total.add_(elsewhere))
    assert mean_over_ranks(here, CPU) == mean
