"""Sequences of different lengths in one tensor, with no token between them."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

# n sequences of T tokens in all, C channels; an image is a sequence of h * w tokens, row by row


@dataclass(frozen=True, eq=False)
class PackedSequence:
    """Tokens of several sequences one after the other, and where each begins: there is no token that belongs to none.

    Law: `cu_seqlens` is int32 [n + 1] on the device of `tokens`, begins with 0, never falls and ends with T; there is one grid a sequence,
    or none at all, and its h * w is the sequence's length.

    Args:
        tokens: [T, ...], usually [T, C].
        cu_seqlens: where each sequence begins, and where the last one ends.
        grids: the (h, w) of each image, in tokens; None: the sequences are no images.
        lengths: of each sequence. They are read off `cu_seqlens` where they are not given, which waits for the device; where they are, and
            `cu_seqlens` is on another device than the CPU or a program is being compiled, they are believed.

    Raises:
        ValueError: the law is broken.
    """
    tokens: Tensor
    cu_seqlens: Tensor
    grids: tuple[tuple[int, int], ...] | None = None
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.cu_seqlens.dtype != torch.int32 or self.cu_seqlens.ndim != 1 or self.cu_seqlens.device != self.tokens.device:
            raise ValueError(f"cu_seqlens must be one row of int32 on {self.tokens.device}, as the tokens are, got {self.cu_seqlens.dtype} "
                             f"{list(self.cu_seqlens.shape)} on {self.cu_seqlens.device}")
        lengths = tuple(self.lengths)
        readable = self.cu_seqlens.device.type == "cpu" and type(self.cu_seqlens) is Tensor and not torch.compiler.is_compiling()
        if not lengths or readable:
            borders = self.cu_seqlens.tolist()
            if not borders or borders[0] != 0 or borders != sorted(borders):
                raise ValueError(f"cu_seqlens must begin with 0 and never fall, got {borders}")
            read = tuple(end - start for start, end in zip(borders, borders[1:], strict=False))
            if lengths and lengths != read:
                raise ValueError(f"cu_seqlens tell of lengths {list(read)}, and lengths are {list(lengths)}")
            lengths = read
        object.__setattr__(self, "lengths", lengths)
        if len(self.lengths) != len(self.cu_seqlens) - 1 or sum(self.lengths) != len(self.tokens):
            raise ValueError(f"{len(self.cu_seqlens) - 1} sequences that are {sum(self.lengths)} tokens long in all do not fill "
                             f"{len(self.tokens)} tokens")
        if self.grids is not None:
            object.__setattr__(self, "grids", tuple((int(h), int(w)) for h, w in self.grids))
            if tuple(h * w for h, w in self.grids) != self.lengths:
                raise ValueError(f"grids {list(self.grids)} do not have as many tokens as the sequences, {list(self.lengths)}")

    @classmethod
    def pack(cls, sequences: Sequence[Tensor], grids: Sequence[tuple[int, int]] | None = None) -> PackedSequence:
        """Put sequences, each [length, ...], one after the other.

        Raises:
            ValueError: there are none, or the grids do not fit.
        """
        if not sequences:
            raise ValueError("there is nothing to pack: no sequences")
        return cls.of_lengths(torch.cat(list(sequences)), [len(sequence) for sequence in sequences], grids)

    @classmethod
    def of_lengths(cls, tokens: Tensor, lengths: Sequence[int], grids: Sequence[tuple[int, int]] | None = None) -> PackedSequence:
        """`tokens` [T, ...], which are sequences of these lengths one after the other. Does not wait for the device."""
        lengths = tuple(int(length) for length in lengths)
        if min(lengths, default=0) < 0:
            raise ValueError(f"a sequence cannot be shorter than nothing, got lengths {list(lengths)}")
        borders = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
        if tokens.is_cuda:
            borders = borders.pin_memory().to(tokens.device, non_blocking=True)
        return cls(tokens, borders.to(tokens.device), None if grids is None else tuple(grids), lengths)

    @classmethod
    def of_grids(cls, tokens: Tensor, grids: Sequence[tuple[int, int]]) -> PackedSequence:
        """`tokens` [T, ...], which are images of these (h, w) one after the other."""
        return cls.of_lengths(tokens, [h * w for h, w in grids], grids)

    @classmethod
    def from_padded(cls, padded: Tensor, valid: Tensor, grids: Sequence[tuple[int, int]] | None = None) -> PackedSequence:
        """The valid tokens of a batch, wherever its padding lies.

        Args:
            padded: [n, L, ...].
            valid: [n, L] bool, false on padding.
            grids: see the class.

        Raises:
            ValueError: `valid` is of another shape, or not bool: numbers would be taken for places.
        """
        if valid.dtype != torch.bool or valid.shape != padded.shape[:2]:
            raise ValueError(f"valid must be [n, L] bool, true on tokens, beside padded [n, L, ...]; got {valid.dtype} {list(valid.shape)} "
                             f"beside {list(padded.shape)}")
        return cls.of_lengths(padded[valid], valid.sum(1).tolist(), grids)

    def to_padded(self, value: float = 0.0) -> tuple[Tensor, Tensor]:
        """As a batch [n, L, ...], L the longest length, each sequence followed by `value`, and [n, L] bool, false on that padding."""
        padded = (torch.nn.utils.rnn.pad_sequence(list(self.split()), batch_first=True, padding_value=value) if len(self)
                  else self.tokens.new_zeros(0, 0, *self.tokens.shape[1:]))
        places = torch.arange(padded.shape[1], device=padded.device)
        return padded, places < self.cu_seqlens.diff()[:, None]

    def __len__(self) -> int:
        """How many sequences."""
        return len(self.lengths)

    @property
    def max_seqlen(self) -> int:
        """The longest length, 0 where there is no sequence."""
        return max(self.lengths, default=0)

    def replace(self, tokens: Tensor) -> PackedSequence:
        """Other tokens, as many, with the same borders."""
        return replace(self, tokens=tokens)

    def split(self) -> tuple[Tensor, ...]:
        """Each sequence, [length, ...], a view."""
        return self.tokens.split(list(self.lengths))

    def select(self, indices: Sequence[int]) -> PackedSequence:
        """The sequences of these numbers, in this order."""
        sequences = self.split()
        chosen = [sequences[index] for index in indices]
        return PackedSequence.of_lengths(torch.cat(chosen) if chosen else self.tokens[:0], [len(tokens) for tokens in chosen],
                                         None if self.grids is None else [self.grids[index] for index in indices])

    def maps(self) -> list[Tensor]:
        """Each image as a feature map [C, h, w], a view.

        Raises:
            ValueError: the sequences are no images.
        """
        if self.grids is None:
            raise ValueError("these sequences have no grids: they are no images")
        return [tokens.unflatten(0, grid).movedim(-1, 0) for tokens, grid in zip(self.split(), self.grids, strict=True)]

    def index(self) -> Tensor:
        """[T] int64: the number of the sequence that each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self), device=self.tokens.device), self.cu_seqlens.diff().long(),
                                       output_size=len(self.tokens))

    def mean(self) -> Tensor:
        """[n, C]: the mean token of each sequence, 0 where it has none. Sums are made in float32 at least, which half precision is not
        enough for."""
        tokens = self.tokens.to(torch.promote_types(self.tokens.dtype, torch.float32))
        sums = tokens.new_zeros(len(self), *tokens.shape[1:]).index_add_(0, self.index(), tokens)
        means = sums / self.cu_seqlens.diff().clamp(min=1).view(-1, *[1] * (tokens.ndim - 1))
        return means.to(self.tokens.dtype)
