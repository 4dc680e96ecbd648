"""Packed batches: what is in them, on how many processes, and after a resume."""
from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest
from mmengine.dataset import DefaultSampler
from torch.utils.data import DataLoader

from visionkit.datasets import DrawSampler, InfiniteDrawSampler, PackedBatchSampler, sampler
from visionkit.engine.loops import same_images
from visionkit.registry import PACKERS, SAMPLERS, ConfigError

LIMIT = 100


@PACKERS.register_module()
class NoPacker:
    def __init__(self, max_tokens):
        pass


class Texts:
    """Samples of 5 to 60 tokens that may be asked for only by number."""

    def __init__(self, number=50, seed=0):
        self.of_sample = np.random.default_rng(seed).integers(5, 61, number).tolist()
        self.asked = 0

    def __len__(self):
        return len(self.of_sample)

    def sample_length(self, index):
        self.asked += 1
        return self.of_sample[index]

    def __getitem__(self, draw):
        return int(draw)


class GrowingTexts(Texts):
    """Their length depends on the draw."""

    def sample_length(self, draw):
        return self.of_sample[draw] + draw.seed % 20


def batches_of(dataset, kind=DrawSampler, **settings):
    return PackedBatchSampler(kind(dataset, seed=3), max_tokens=LIMIT, **settings)


def ranks(monkeypatch, world_size, build):
    """The batch sampler of each process."""
    built = []
    for rank in range(world_size):
        monkeypatch.setattr(sampler, "get_dist_info", lambda rank=rank: (rank, world_size))
        built.append(build())
    return built


def told(batches):
    """Batches as plain numbers."""
    return [[(int(draw), draw.seed) for draw in batch] for batch in batches]


@pytest.mark.parametrize("packer", ["next_fit", "best_fit", "balanced"])
def test_an_epoch_has_every_sample_once_and_no_batch_above_the_limit(packer):
    data = Texts()
    batches = batches_of(data, packer=packer)
    drawn = told(batches)
    assert len(drawn) == len(batches)
    assert Counter(index for batch in drawn for index, _ in batch) == Counter(range(50))
    assert max(sum(data.of_sample[index] for index, _ in batch) for batch in drawn) <= LIMIT
    assert len({len(batch) for batch in drawn}) > 1          # samples a batch differ


def test_draws_carry_the_seeds_that_they_have_without_packing():
    data = Texts()
    assert dict(chain(*told(batches_of(data)))) == {int(draw): draw.seed for draw in DrawSampler(data, seed=3)}


def test_batch_size_counts_packs():
    one, three = batches_of(Texts(), packer="next_fit"), batches_of(Texts(), packer="next_fit", batch_size=3)
    assert len(three) == -(-len(one) // 3)
    packs = list(one)
    assert list(three)[0] == packs[0] + packs[1] + packs[2]


def test_epochs_are_equally_long_and_together_have_each_sample_equally_often():
    """Passes over the data differ by a pack or so, epochs do not: what a pass has more comes in the next epoch."""
    batches = batches_of(Texts())
    drawn, sizes = [], set()
    for epoch in range(20):
        batches.sampler.set_epoch(epoch)
        epoch_batches = told(batches)
        sizes.add(len(epoch_batches))
        drawn += epoch_batches
    assert sizes == {len(batches)}
    passes = [sum(1 for _ in batches.packs(epoch)) for epoch in range(20)]
    assert len(set(passes)) > 1                              # else this test would show nothing
    whole = list(islice(batches.packs(epochs=None), len(drawn)))
    assert [[place.index for place in pack.items] for pack in whole] == [[index for index, _ in batch] for batch in drawn]
    times = Counter(index for batch in drawn for index, _ in batch)
    assert max(times.values()) - min(times.values()) <= 1    # a pass is under way at the end


def test_without_shuffling_every_epoch_is_one_pass():
    batches = PackedBatchSampler(DrawSampler(Texts(), shuffle=False, seed=0), LIMIT)
    for epoch in (0, 3, 1):
        batches.sampler.set_epoch(epoch)
        assert sorted(int(draw) for draw in chain(*batches)) == list(range(50))


@pytest.mark.parametrize("kind", [DrawSampler, InfiniteDrawSampler])
@pytest.mark.parametrize("data", [Texts, GrowingTexts], ids=["lengths of samples", "lengths of draws"])
@pytest.mark.parametrize("packer", ["next_fit", "best_fit", "balanced"])
def test_resuming_goes_on_with_the_very_next_pack(kind, data, packer):
    """Nothing is lost that was in an open pack, nothing comes twice."""
    settings = dict(kind=kind, packer=packer, batch_size=2, length=dict(type="OwnLength", varies=data is GrowingTexts))
    whole = told(islice(batches_of(data(), **settings), 12))
    for stop in range(1, 12):
        resumed = batches_of(data(), **settings)
        resumed.resume_at(stop)
        assert told(islice(resumed, 12 - stop)) == whole[stop:]


@pytest.mark.parametrize("epochs, first_pack", [(0, 3), (1, 16 + 3), (10, 10 * 16 + 3)], ids=["first", "second", "eleventh"])
def test_with_other_packs_a_batch_the_first_epoch_goes_on_at_the_same_pack_and_later_ones_nearby(epochs, first_pack):
    """A pass of 16 packs is 6 batches of 3 packs, so each epoch had 2 packs more than with one pack a batch."""
    then, now = batches_of(Texts(), batch_size=3), batches_of(Texts())
    assert (len(then), len(now)) == (6, 16)
    now.sampler.set_epoch(epochs)
    now.resume_at(same_images(1, *({"images_per_iter": some.batch_size, "iters_per_epoch": len(some)} for some in (then, now))))
    expected = next(islice(now.packs(epochs=None), first_pack, None))
    assert [int(draw) for draw in next(iter(now))] == [place.index for place in expected.items]
    assert 0 <= epochs * 6 * 3 + 3 - first_pack < max(1, epochs * 3)       # what docs/data.md says: fewer an epoch than the larger step has


def test_resuming_in_a_later_epoch_loads_nothing_and_holds_for_one_iteration():
    uninterrupted, resumed = batches_of(Texts()), batches_of(Texts())
    for epoch in range(4):
        uninterrupted.sampler.set_epoch(epoch)
        whole = told(uninterrupted)
    resumed.sampler.set_epoch(3)
    resumed.resume_at(5)
    assert told(resumed) == whole[5:]
    assert told(resumed) == whole
    assert resumed.sampler.dataset.asked == 50               # once a sample, whatever was packed again
    with pytest.raises(ValueError, match="from 0 on, got -1"):
        resumed.resume_at(-1)


def test_resuming_behind_the_end_of_an_epoch_gives_nothing_and_the_next_is_whole():
    batches = batches_of(Texts())
    batches.resume_at(len(batches) + 2)
    assert told(batches) == []
    batches.sampler.set_epoch(1)
    expected = batches_of(Texts())
    expected.sampler.set_epoch(1)
    assert told(batches) == told(expected)


def test_epochs_in_a_row_are_not_packed_from_the_start(monkeypatch):
    batches = batches_of(Texts())
    len(batches)
    order, asked = batches.sampler.order, []
    monkeypatch.setattr(batches.sampler, "order", lambda epoch: asked.append(epoch) or order(epoch))
    for epoch in range(6):
        batches.sampler.set_epoch(epoch)
        list(batches)
    assert asked == sorted(set(asked))                       # each pass once


def test_an_iteration_that_is_given_up_does_not_disturb_the_next():
    batches = batches_of(Texts())
    whole = told(batches)
    abandoned = iter(batches)
    next(abandoned)
    assert told(batches) == whole
    next(abandoned)
    batches.sampler.set_epoch(1)
    second = told(batches)
    assert second == told(batches)
    assert second != whole


@pytest.mark.parametrize("kind", [DrawSampler, InfiniteDrawSampler])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_together_take_the_packs_of_one_process_in_equally_many_batches(monkeypatch, world_size, kind):
    alone = told(islice(batches_of(Texts(), kind), 12))
    both = ranks(monkeypatch, world_size, lambda: batches_of(Texts(), kind))
    together = [told(islice(one, 12 // world_size)) for one in both]
    assert [batch for step in zip(*together, strict=True) for batch in step] == alone
    assert len({len(one) for one in both}) == 1


def test_the_last_step_of_a_pass_is_filled_from_the_next(monkeypatch):
    """7 packs for 4 processes: 2 steps, and the epoch begins the next pass with its last pack. No process waits for one that has none."""
    data = Texts(7)
    data.of_sample = [60] * 7
    built = ranks(monkeypatch, 4, lambda: PackedBatchSampler(DrawSampler(data, seed=0), LIMIT))
    assert [len(one) for one in built] == [2] * 4
    drawn = [told(one) for one in built]
    order = [batch[0][0] for step in zip(*drawn, strict=True) for batch in step]
    assert sorted(order[:7]) == list(range(7))
    assert order[7] == built[0].sampler.order(1)[0]


def test_tokens_of_a_batch_are_told_to_whoever_asks():
    data = Texts()
    batches = batches_of(data, batch_size=2)
    for batch in batches:
        planned = batches.handed_out.popleft()
        assert planned == (len(batch), sum(data.of_sample[draw] for draw in batch), 2)
    assert not batches.handed_out


@pytest.mark.parametrize("filtered", [True, False])
def test_overlong_samples_are_alone_or_left_out_and_told(filtered, monkeypatch):
    lines = []
    monkeypatch.setattr("visionkit.datasets.packed_batches.print_log", lambda message, **_: lines.append(message))
    data = Texts(20)
    data.of_sample[4] = data.of_sample[9] = 150
    drawn = [[index for index, _ in batch] for batch in told(batches_of(data, filter_overlong=filtered))]
    assert sorted(chain(*drawn)) == [index for index in range(20) if not filtered or index not in (4, 9)]
    assert ([4] in drawn, [9] in drawn) == (not filtered, not filtered)
    assert lines == ["2 of 20 samples are above max_tokens=100: " + ("they are left out" if filtered else
                                                                     "each is a pack of its own, above the limit, of up to 150")]


@pytest.mark.parametrize("kind", [DrawSampler, InfiniteDrawSampler])
def test_a_data_set_of_which_nothing_fits_is_an_error_and_not_an_endless_search(kind):
    data = Texts(5)
    data.of_sample = [101] * 5
    with pytest.raises(ConfigError, match=r"max_tokens: no sample has 100 tokens or less"):
        next(iter(batches_of(data, kind, filter_overlong=True)))


def test_a_loader_gives_the_batches_whatever_the_number_of_workers():
    loaders = [DataLoader(Texts(), batch_sampler=batches_of(Texts()), num_workers=workers, collate_fn=list) for workers in (0, 2)]
    first, second = (list(loader) for loader in loaders)
    assert first == second == [[index for index, _ in batch] for batch in told(batches_of(Texts()))]


@pytest.mark.parametrize("change, message", [
    (dict(packer="bestfit!"), r"^packer\.type: no packer named"),
    (dict(packer=dict(type="BestFit", buckets=4)), r"^packer\.buckets: BestFit has no argument 'buckets'"),
    (dict(length=dict(type="ImageToken")), r"^length\.type: no length named 'ImageToken'\. Did you mean 'ImageTokens'"),
    (dict(length="ImageToken"), r"^length\.type: no length named 'ImageToken'\. Did you mean 'ImageTokens'"),
    (dict(packer=dict(type="NoPacker")), r"^packer: a packer derives from visionkit.datasets.Packer, and NoPacker does not"),
    (dict(filter_overlong="yes"), r"^filter_overlong: filter_overlong is True or False, got 'yes'"),
    (dict(packer=None), r"^packer: a packer is the name of one, .*; got None"),
    (dict(packer=dict(type="BestFit", max_tokens=20)), r"^packer\.max_tokens: the limit stands once"),
    (dict(max_tokens="4096"), r"^max_tokens: .* a whole number; got '4096'"),
    (dict(max_tokens=99.5), r"^max_tokens: .* a whole number; got 99\.5"),
    (dict(batch_size=0), "^the loader's batch_size is how many packs"),
    (dict(sampler=DefaultSampler(range(3))), "^packs are made .* the loader's sampler is a DefaultSampler"),
    (dict(sampler=DrawSampler(Texts(0), seed=0)), "^the data set is empty"),
    (dict(max_tokens=0), "packer: BestFit: max_tokens is how many tokens"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_wrong_settings_are_told_with_their_place(change, message):
    config = dict(type="PackedBatchSampler", sampler=DrawSampler(Texts(), seed=0), max_tokens=LIMIT)
    with pytest.raises(ConfigError, match=message):
        SAMPLERS.build({**config, **change})


def test_a_length_may_be_a_name_as_a_packer_may():
    assert told(batches_of(Texts(), length="OwnLength")) == told(batches_of(Texts()))


def test_uneven_processes_are_refused(monkeypatch):
    monkeypatch.setattr(sampler, "get_dist_info", lambda: (0, 2))
    with pytest.raises(ConfigError, match="^packs are dealt out evenly, and round_up=False of the loader's sampler"):
        PackedBatchSampler(DrawSampler(Texts(), round_up=False, seed=0), LIMIT)


def test_a_length_of_nothing_and_a_data_set_without_lengths_are_told():
    data = Texts(3)
    data.of_sample[1] = 0
    with pytest.raises(ValueError, match="OwnLength gives sample 1 a length of 0"):
        len(batches_of(data))
    data.of_sample[1] = 20.5
    with pytest.raises(ValueError, match="OwnLength gives sample 1 a length of 20.5; a sample has 1 token or more, a whole number"):
        len(batches_of(data))
    with pytest.raises(ConfigError, match=r"range has no method sample_length\(index\); for images choose dict\(type='ImageTokens'\)"):
        len(batches_of(range(5)))


def test_any_callable_is_a_length_and_is_asked_for_every_draw():
    asked = []
    batches = batches_of(range(10), length=lambda data, draw: asked.append(draw.seed) or 30)
    assert [len(batch) for batch in batches] == [3, 3, 3, 1]
    assert len(set(asked)) == 10
