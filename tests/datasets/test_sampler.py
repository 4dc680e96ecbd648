import pickle
import random

import numpy as np
import pytest
import torch
from mmengine.dataset import BaseDataset, ConcatDataset, RepeatDataset

from visionkit.datasets import Draw, DrawSampler, InfiniteDrawSampler, sampler, seeded


def draws(sampler):
    return [(int(draw), draw.seed) for draw in sampler]


def ranks(monkeypatch, world_size, build):
    """The sampler of each process."""
    samplers = []
    for rank in range(world_size):
        monkeypatch.setattr(sampler, "get_dist_info", lambda rank=rank: (rank, world_size))
        samplers.append(build())
    return samplers


def test_draw_is_an_index_that_keeps_its_seed_through_pickle_and_dataset_wrappers():
    draw = pickle.loads(pickle.dumps(Draw(7, seed=11)))
    assert draw == 7
    assert list(range(10))[draw] == 7
    assert draw.seed == (draw - 3).seed == (draw % 5).seed == 11
    assert (draw - 3, draw % 5) == (4, 2)


def test_concatenated_and_repeated_datasets_still_see_the_seed():
    class Seeds(BaseDataset):
        def load_data_list(self):
            return [{}, {}, {}]

        def __getitem__(self, index):
            return int(index), index.seed

    both = ConcatDataset([Seeds(), Seeds()])
    assert both[Draw(4, 99)] == (1, 99)
    assert RepeatDataset(Seeds(), 2)[Draw(5, 98)] == (2, 98)


def test_order_is_a_function_of_seed_and_epoch():
    first, again, other = DrawSampler(range(50), seed=3), DrawSampler(range(50), seed=3), DrawSampler(range(50), seed=4)
    assert draws(first) == draws(again) == draws(first)
    assert draws(first) != draws(other)
    again.set_epoch(1)
    assert sorted(int(draw) for draw in again) == list(range(50))
    assert [int(draw) for draw in again] != [int(draw) for draw in first]
    assert not {seed for _, seed in draws(first)} & {seed for _, seed in draws(again)}


def test_without_shuffling_the_order_stays_and_augmentation_still_changes_with_the_epoch():
    sampler = DrawSampler(range(5), shuffle=False, seed=0)
    before = draws(sampler)
    sampler.set_epoch(1)
    assert [index for index, _ in before] == [index for index, _ in draws(sampler)] == list(range(5))
    assert before != draws(sampler)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_together_draw_what_one_process_draws(monkeypatch, world_size):
    alone = draws(DrawSampler(range(12), seed=5))
    together = [draws(one) for one in ranks(monkeypatch, world_size, lambda: DrawSampler(range(12), seed=5))]
    assert [draw for step in zip(*together, strict=True) for draw in step] == alone


def test_rounding_up_repeats_the_first_images_and_not_rounding_leaves_processes_unequal(monkeypatch):
    rounded = [list(map(int, one)) for one in ranks(monkeypatch, 3, lambda: DrawSampler(range(4), shuffle=False, seed=0))]
    assert rounded == [[0, 3], [1, 0], [2, 1]]
    samplers = ranks(monkeypatch, 3, lambda: DrawSampler(range(4), shuffle=False, seed=0, round_up=False))
    assert [list(map(int, one)) for one in samplers] == [[0, 3], [1], [2]]
    assert [len(one) for one in samplers] == [2, 1, 1]


def test_more_processes_than_images_still_give_each_a_draw(monkeypatch):
    assert [list(map(int, one)) for one in ranks(monkeypatch, 5, lambda: DrawSampler(range(2), shuffle=False, seed=0))] == [
        [0], [1], [0], [1], [0]]


def test_resuming_leaves_out_the_first_draws_once_and_keeps_the_length():
    sampler = DrawSampler(range(10), seed=1)
    whole = draws(sampler)
    sampler.resume_at(4)
    assert len(sampler) == 10
    assert draws(sampler) == whole[4:]
    assert draws(sampler) == whole
    with pytest.raises(ValueError, match="from 0 on, got -1"):
        sampler.resume_at(-1)


@pytest.mark.parametrize("world_size", [1, 3])
def test_infinite_draws_go_through_every_epoch_and_resume_anywhere(monkeypatch, world_size):
    samplers = ranks(monkeypatch, world_size, lambda: InfiniteDrawSampler(range(7), seed=2))
    streams = [iter(one) for one in samplers]
    merged = [next(stream) for _ in range(14) for stream in streams][:14]
    assert sorted(map(int, merged[:7])) == sorted(map(int, merged[7:14])) == list(range(7))
    rank = samplers[-1]
    whole = [(int(draw), draw.seed) for draw, _ in zip(rank, range(40), strict=False)]
    rank.resume_at(17)
    resumed = [(int(draw), draw.seed) for draw, _ in zip(rank, range(23), strict=False)]
    assert resumed == whole[17:]


def test_seeded_sets_three_generators_and_restores_them():
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with seeded(5):
        inside = random.random(), np.random.rand(), torch.rand(()).item()
    with seeded(5):
        assert inside == (random.random(), np.random.rand(), torch.rand(()).item())
    with seeded(6):
        assert all(a != b for a, b in zip(inside, (random.random(), np.random.rand(), torch.rand(()).item()), strict=True))
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert (torch.get_rng_state() == states[2]).all()


def test_seeded_within_seeded_is_undone_one_by_one():
    with seeded(5):
        expected = [np.random.rand(), np.random.rand()]
    with seeded(5):
        first = np.random.rand()
        with seeded(6), seeded(7):
            np.random.rand(3)
        assert [first, np.random.rand()] == expected


def test_seeded_restores_after_an_error():
    state = random.getstate()
    with pytest.raises(KeyError), seeded(1):
        raise KeyError
    assert random.getstate() == state
