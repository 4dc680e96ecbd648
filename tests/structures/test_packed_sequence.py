import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionkit.structures import PackedSequence

LENGTHS = st.lists(st.integers(0, 7), min_size=1, max_size=6)


def sequences(lengths, channels=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, channels, generator=generator) for length in lengths]


@given(LENGTHS)
@settings(deadline=None)
def test_unpacked_is_what_was_packed(lengths):
    given_ = sequences(lengths)
    packed = PackedSequence.pack(given_)
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens[0] == 0
    assert packed.cu_seqlens[-1] == len(packed.tokens)
    assert packed.lengths == tuple(lengths)
    assert len(packed) == len(lengths)
    assert packed.max_seqlen == max(lengths)
    assert all(map(torch.equal, packed.split(), given_))


@given(LENGTHS, st.sampled_from(["right", "left"]))
@settings(deadline=None)
def test_wherever_the_padding_lies_the_packed_sequences_are_the_same(lengths, side):
    given_ = sequences(lengths)
    padded, valid = PackedSequence.pack(given_).to_padded(value=9.0)
    assert valid.sum(1).tolist() == lengths
    assert (padded[~valid] == 9).all()
    if side == "left":
        padded, valid = padded.flip(1), valid.flip(1)
        again = [tokens.flip(0) for tokens in PackedSequence.from_padded(padded, valid).split()]
    else:
        again = PackedSequence.from_padded(padded, valid).split()
    assert all(map(torch.equal, again, given_))


@pytest.mark.parametrize("valid", [torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 2).bool(), torch.ones(3).bool()], ids=str)
def test_a_mask_of_numbers_or_of_another_shape_is_refused(valid):
    """Numbers would be taken for places, without an error."""
    with pytest.raises(ValueError, match=r"valid must be \[n, L\] bool, true on tokens, beside padded \[n, L, ...\]; got torch"):
        PackedSequence.from_padded(torch.randn(2, 3, 4), valid)


def test_chosen_sequences_keep_their_grids_and_gradients():
    tokens = [torch.randn(6, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)]
    packed = PackedSequence.pack(tokens, [(2, 3), (4, 1)])
    chosen = packed.select([1, 0, 1])
    assert chosen.grids == ((4, 1), (2, 3), (4, 1))
    assert chosen.cu_seqlens.tolist() == [0, 4, 10, 14]
    chosen.tokens.sum().backward()
    assert (tokens[0].grad == 1).all()
    assert (tokens[1].grad == 2).all()
    assert len(packed.select([])) == 0


def test_a_map_has_the_tokens_row_by_row():
    packed = PackedSequence.of_grids(torch.arange(10.0)[:, None], [(2, 3), (1, 4)])
    first, second = packed.maps()
    assert first.tolist() == [[[0, 1, 2], [3, 4, 5]]]
    assert second.tolist() == [[[6, 7, 8, 9]]]
    with pytest.raises(ValueError, match="no grids"):
        PackedSequence.of_lengths(torch.zeros(3, 1), [3]).maps()


def test_the_mean_is_of_each_sequence_alone_and_0_of_none():
    packed = PackedSequence.pack([torch.tensor([[1.0], [3.0]]), torch.zeros(0, 1), torch.tensor([[5.0]])])
    assert packed.mean().tolist() == [[2], [0], [5]]
    assert packed.index().tolist() == [0, 0, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_of_many_tokens_in_half_precision_is_their_mean(dtype):
    assert PackedSequence.pack([torch.full((4096, 1), 30.0, dtype=dtype)]).mean().item() == 30


def test_of_no_sequences_there_is_an_empty_batch():
    padded, valid = PackedSequence.of_lengths(torch.zeros(0, 3), []).to_padded()
    assert padded.shape == (0, 0, 3)
    assert valid.shape == (0, 0)


def test_lengths_that_are_not_those_of_the_borders_are_refused():
    borders = torch.tensor([0, 1, 4], dtype=torch.int32)
    assert PackedSequence(torch.zeros(4, 2), borders, lengths=(1, 3)).lengths == (1, 3)
    for lengths in ((3, 1), (5, -1), (4,)):
        with pytest.raises(ValueError, match="cu_seqlens tell of lengths"):
            PackedSequence(torch.zeros(4, 2), borders, lengths=lengths)


def test_other_tokens_have_the_same_borders():
    packed = PackedSequence.of_grids(torch.zeros(6, 2), [(2, 3)])
    assert packed.replace(torch.ones(6, 5)).grids == ((2, 3),)
    with pytest.raises(ValueError, match="6 tokens long in all do not fill 5 tokens"):
        packed.replace(torch.ones(5, 2))


@pytest.mark.parametrize("borders, grids, message", [
    (torch.tensor([0, 4]), None, "int32"),
    (torch.tensor([1, 4], dtype=torch.int32), None, "begin with 0"),
    (torch.tensor([], dtype=torch.int32), None, "begin with 0"),
    (torch.tensor([0, 3, 2, 4], dtype=torch.int32), None, "never fall"),
    (torch.tensor([0, 3], dtype=torch.int32), None, "do not fill 4 tokens"),
    (torch.tensor([0, 4], dtype=torch.int32), [(2, 3)], "do not have as many tokens"),
    (torch.tensor([0, 4], dtype=torch.int32), [(2, 2), (1, 1)], "do not have as many tokens"),
])
def test_a_sequence_that_breaks_its_law_is_refused(borders, grids, message):
    with pytest.raises(ValueError, match=message):
        PackedSequence(torch.zeros(4, 2), borders, grids)


@pytest.mark.parametrize("make, message", [
    (lambda: PackedSequence.pack([]), "nothing to pack"),
    (lambda: PackedSequence.of_lengths(torch.zeros(2, 1), [3, -1]), "shorter than nothing"),
])
def test_what_cannot_be_packed_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()
