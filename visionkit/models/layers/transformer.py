"""The transformer (Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762): encoder, decoder, and what they are made of.

Positions may be added to the tokens once before the first layer, as in the paper, or given to the layers, which then add them to queries
and keys, never to values (DETR, arXiv:2005.12872, appendix A.3).
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.ops.attention import varlen_attention
from visionkit.ops.checkpointing import Checkpointing, run_blocks
from visionkit.structures import PackedSequence

# B sequences of T target or S source tokens, D channels; `valid` is [B, S] bool, false on padding, None where nothing is padded.
# Packed sequences stand in one tensor, [B, T, D] is then [T, D] with the tokens of all, and `valid` is the `Borders` between them.

_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


class Borders(NamedTuple):
    """Where packed sequences begin and end: a query reads the keys of its own sequence, all of them."""
    queries: Tensor                     # [B + 1] int32, where those of each sequence begin, and where the last end
    keys: Tensor                        # likewise
    query_lengths: tuple[int, ...]      # of each sequence, known without asking the device
    key_lengths: tuple[int, ...]

    @classmethod
    def between(cls, readers: PackedSequence, read: PackedSequence) -> Borders:
        """For attention of the tokens of `readers` to those of `read`, sequence by sequence."""
        return cls(readers.cu_seqlens, read.cu_seqlens, readers.lengths, read.lengths)

    def reading(self, others: Borders) -> Borders:
        """For attention of these queries to the keys of `others`."""
        return Borders(self.queries, others.keys, self.query_lengths, others.key_lengths)


class Attention(nn.Module):
    """Multi-head attention (sec. 3.2).

    Args:
        channels: D.
        num_heads: heads, each of D / num_heads channels.
        dropout: of the attention weights.
    """

    def __init__(self, channels: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise ValueError(f"heads share the channels equally: {channels} channels cannot be split among {num_heads} heads")
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        for linear in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(linear.weight, gain=2 ** -0.5)              # as one matrix of all three would be
        nn.init.xavier_uniform_(self.output.weight)
        for linear in (self.query, self.key, self.value, self.output):
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | Borders | None = None,
                causal: bool = False) -> Tensor:
        """What each query reads.

        Args:
            query: [B, T, D].
            key: [B, S, D].
            value: [B, S, D].
            valid: [B, S] bool, keys that may be read; or the borders of packed sequences. A query that may read none gets zeros, before
                the output's bias.
            causal: a query reads keys of its own place and before only. Packed, each sequence has as many keys as queries then.

        Returns:
            [B, T, D].
        """
        dropout = self.dropout if self.training else 0.0
        if isinstance(valid, Borders):
            q, k, v = (linear(x).unflatten(-1, (self.num_heads, -1))            # [T or S, heads, D / heads]
                       for linear, x in ((self.query, query), (self.key, key), (self.value, value)))
            if causal and valid.query_lengths != valid.key_lengths:
                raise ValueError(f"causal attention of packed sequences needs a key for each query, got {list(valid.query_lengths)} "
                                 f"queries and {list(valid.key_lengths)} keys")
            read = varlen_attention(q, k, v, valid.queries, valid.keys, dropout_p=dropout, causal=causal, lengths_q=valid.query_lengths,
                                    lengths_k=valid.key_lengths)
            return self.output(read.flatten(1))
        mask = None if valid is None else valid[:, None, None]                  # [B, 1, 1, S]
        if causal and valid is not None:
            mask = mask & torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=key.device).tril()
        q, k, v = (linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                   for linear, x in ((self.query, query), (self.key, key), (self.value, value)))    # [B, heads, T or S, D / heads]
        read = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal and mask is None)
        return self.output(read.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers, on each token by itself (sec. 3.3).

    Args:
        channels: D.
        hidden_channels: between the two.
        dropout: of the hidden units.
        activation: `relu`, `gelu`, or `gelu_tanh`, which approximates it.
    """

    def __init__(self, channels: int, hidden_channels: int, dropout: float = 0.0, activation: str = "relu") -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}; got {activation!r}")
        self.linear1 = nn.Linear(channels, hidden_channels)
        self.linear2 = nn.Linear(hidden_channels, channels)
        self.activation = activation
        self.dropout = dropout
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.linear2(F.dropout(_ACTIVATIONS[self.activation](self.linear1(x)), self.dropout, self.training))


class _Layer(nn.Module):
    """Sublayers, each with a residual connection and a normalisation: of the sum, as in the paper (sec. 3.1), or of the input."""

    def __init__(self, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.dropout = dropout
        self.pre_norm = pre_norm

    def residual(self, x: Tensor, sublayer: Callable[[Tensor], Tensor], norm: nn.LayerNorm) -> Tensor:
        if self.pre_norm:
            return x + F.dropout(sublayer(norm(x)), self.dropout, self.training)
        return norm(x + F.dropout(sublayer(x), self.dropout, self.training))


class TransformerEncoderLayer(_Layer):
    """Self-attention, then the feed-forward network (sec. 3.1). For the arguments see `Transformer`."""

    def __init__(self, channels: int, num_heads: int, hidden_channels: int, dropout: float = 0.1, inner_dropout: float = 0.0,
                 activation: str = "relu", pre_norm: bool = False) -> None:
        super().__init__(dropout, pre_norm)
        self.attention = Attention(channels, num_heads, inner_dropout)
        self.attention_norm = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, hidden_channels, inner_dropout, activation)
        self.feed_forward_norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, position: Tensor | None = None, valid: Tensor | Borders | None = None) -> Tensor:
        """[B, S, D] to [B, S, D]; `position` [B, S, D]."""
        def attend(x: Tensor) -> Tensor:
            query = _at(position, x)
            return self.attention(query, query, x, valid)

        x = self.residual(x, attend, self.attention_norm)
        return self.residual(x, self.feed_forward, self.feed_forward_norm)


class TransformerDecoderLayer(_Layer):
    """Self-attention, attention to what the encoder read, then the feed-forward network (sec. 3.1). For the arguments see `Transformer`."""

    def __init__(self, channels: int, num_heads: int, hidden_channels: int, dropout: float = 0.1, inner_dropout: float = 0.0,
                 activation: str = "relu", pre_norm: bool = False) -> None:
        super().__init__(dropout, pre_norm)
        self.self_attention = Attention(channels, num_heads, inner_dropout)
        self.self_attention_norm = nn.LayerNorm(channels)
        self.cross_attention = Attention(channels, num_heads, inner_dropout)
        self.cross_attention_norm = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, hidden_channels, inner_dropout, activation)
        self.feed_forward_norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, memory: Tensor, memory_keys: Tensor, position: Tensor | None = None,
                valid: Tensor | Borders | None = None, memory_valid: Tensor | Borders | None = None, causal: bool = False) -> Tensor:
        """[B, T, D] to [B, T, D]; `position` [B, T, D]; `memory` [B, S, D], and `memory_keys`, the same with its positions."""
        def attend_to_itself(x: Tensor) -> Tensor:
            query = _at(position, x)
            return self.self_attention(query, query, x, valid, causal)

        def attend_to_memory(x: Tensor) -> Tensor:
            return self.cross_attention(_at(position, x), memory_keys, memory, memory_valid)

        x = self.residual(x, attend_to_itself, self.self_attention_norm)
        x = self.residual(x, attend_to_memory, self.cross_attention_norm)
        return self.residual(x, self.feed_forward, self.feed_forward_norm)


class TransformerEncoder(nn.Module):
    """Layers one after the other, and a last normalisation. For the arguments see `Transformer`."""

    def __init__(self, num_layers: int, channels: int, num_heads: int, hidden_channels: int, dropout: float = 0.1,
                 inner_dropout: float = 0.0, activation: str = "relu", pre_norm: bool = False, final_norm: bool = False,
                 checkpointing: bool | str | Mapping | Checkpointing = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerEncoderLayer(channels, num_heads, hidden_channels, dropout, inner_dropout, activation, pre_norm)
            for _ in range(num_layers))
        self.norm = nn.LayerNorm(channels) if final_norm else nn.Identity()
        self.checkpointing = Checkpointing.of(checkpointing)

    def forward(self, x: Tensor, position: Tensor | None = None, valid: Tensor | Borders | None = None) -> Tensor:
        """[B, S, D] to [B, S, D]; `position` [B, S, D] is added to the queries and keys of every layer."""
        return self.norm(run_blocks(self.layers, x, position, valid, checkpointing=self.checkpointing))


class TransformerDecoder(nn.Module):
    """Layers one after the other, and a last normalisation of each one's output. For the arguments see `Transformer`."""

    def __init__(self, num_layers: int, channels: int, num_heads: int, hidden_channels: int, dropout: float = 0.1,
                 inner_dropout: float = 0.0, activation: str = "relu", pre_norm: bool = False, final_norm: bool = False,
                 checkpointing: bool | str | Mapping | Checkpointing = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerDecoderLayer(channels, num_heads, hidden_channels, dropout, inner_dropout, activation, pre_norm)
            for _ in range(num_layers))
        self.norm = nn.LayerNorm(channels) if final_norm else nn.Identity()
        self.checkpointing = Checkpointing.of(checkpointing)

    def forward(self, x: Tensor, memory: Tensor, position: Tensor | None = None, memory_position: Tensor | None = None,
                valid: Tensor | Borders | None = None, memory_valid: Tensor | Borders | None = None, causal: bool = False) -> list[Tensor]:
        """[B, T, D] and what the encoder read, [B, S, D], to the output [B, T, D] of every layer, normalised, the last one last."""
        others = (memory, _at(memory_position, memory), position, valid, memory_valid, causal)
        outputs = run_blocks(self.layers, x, *others, checkpointing=self.checkpointing, outputs_of=range(len(self.layers)))
        return [self.norm(output) for output in outputs]


class Transformer(nn.Module):
    """Encoder and decoder.

    Args:
        channels: D.
        num_heads: of each attention.
        hidden_channels: of the feed-forward networks.
        encoder_layers: how many.
        decoder_layers: how many.
        dropout: of what each sublayer adds, as in the paper.
        inner_dropout: of attention weights and of the hidden units of the feed-forward networks; `torch.nn.Transformer` takes the same
            as `dropout`.
        activation: `relu` or `gelu`.
        pre_norm: normalise the input of each sublayer instead of the sum.
        encoder_norm: normalise what the encoder gives, once more. The paper does not, `torch.nn.Transformer` does. None: where `pre_norm`
            makes it necessary.
        decoder_norm: likewise.
        checkpointing: which activations are computed again in the backward pass, less memory for more time: True, `dict(policy="sqrt")`,
            `dict(policy="selective")`, see `visionkit.ops.checkpointing.Checkpointing`. Encoder and decoder are a chain of layers each.
    """

    def __init__(self, channels: int = 512, num_heads: int = 8, hidden_channels: int = 2048, encoder_layers: int = 6,
                 decoder_layers: int = 6, dropout: float = 0.1, inner_dropout: float = 0.0, activation: str = "relu",
                 pre_norm: bool = False, encoder_norm: bool | None = None, decoder_norm: bool | None = None,
                 checkpointing: bool | str | Mapping | Checkpointing = False) -> None:
        super().__init__()
        checkpointing = Checkpointing.of(checkpointing)
        layer = (channels, num_heads, hidden_channels, dropout, inner_dropout, activation, pre_norm)
        self.encoder = TransformerEncoder(encoder_layers, *layer, pre_norm if encoder_norm is None else encoder_norm, checkpointing)
        self.decoder = TransformerDecoder(decoder_layers, *layer, pre_norm if decoder_norm is None else decoder_norm, checkpointing)

    def forward(self, source: Tensor, target: Tensor, source_position: Tensor | None = None, target_position: Tensor | None = None,
                source_valid: Tensor | Borders | None = None, target_valid: Tensor | Borders | None = None,
                causal: bool = False) -> tuple[list[Tensor], Tensor]:
        """Encode `source`, decode `target`.

        Args:
            source: [B, S, D].
            target: [B, T, D].
            source_position: [B, S, D], added to queries and keys in every layer.
            target_position: [B, T, D], likewise.
            source_valid: [B, S] bool, false on padding; or the borders of packed sequences.
            target_valid: [B, T] bool, likewise; packed if the source is.
            causal: the target attends to its own place and what is before.

        Returns:
            the output [B, T, D] of every decoder layer, the last one last, and what the encoder read, [B, S, D].
        """
        if isinstance(source_valid, Borders) != isinstance(target_valid, Borders):
            raise ValueError(f"source and target are packed both or neither; got source_valid {type(source_valid).__name__} and "
                             f"target_valid {type(target_valid).__name__}")
        memory = self.encoder(source, source_position, source_valid)
        memory_valid = target_valid.reading(source_valid) if isinstance(source_valid, Borders) else source_valid
        return self.decoder(target, memory, target_position, source_position, target_valid, memory_valid, causal), memory


def _at(position: Tensor | None, x: Tensor) -> Tensor:
    """Tokens with their positions."""
    return x if position is None else x + position
