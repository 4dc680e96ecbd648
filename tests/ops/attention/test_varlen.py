"""Attention of packed sequences: each as if it were alone (Spec 6, Spec 9)."""
import sys
import types
from itertools import accumulate

import pytest
import torch

from visionkit.ops import flash_attention, tiers, varlen_attention
from visionkit.ops.attention import sdpa, varlen
from visionkit.structures import PackedSequence
from visionkit.testing import check_op

LENGTHS_Q, LENGTHS_K = (5, 0, 13, 4, 1, 3), (7, 3, 13, 2, 9, 0)


def borders(lengths):
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)


def packed(lengths_q=LENGTHS_Q, lengths_k=LENGTHS_K, heads=4, key_heads=2, channels=6, value_channels=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (sum(lengths_q), heads, channels), (sum(lengths_k), key_heads, channels), (sum(lengths_k), key_heads, value_channels)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def one_by_one(reference, q, k, v, lengths_q=LENGTHS_Q, lengths_k=LENGTHS_K, **options):
    """Each sequence alone, by the formula."""
    parts = (tensor.transpose(0, 1)[None].split(lengths, 2) for tensor, lengths in ((q, lengths_q), (k, lengths_k), (v, lengths_k)))
    return torch.cat([reference.dense_attention(*sequence, **options)[0].transpose(0, 1) for sequence in zip(*parts, strict=True)])


def as_one_op(q, k, v, cu_seqlens_q, cu_seqlens_k, *, softmax_scale=None, causal=False, window_size=(-1, -1), seed=None, dropout_p=0.0):
    """What compiled code calls, in its portable form."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    right = 0 if causal else window_size[1]
    return torch.ops.visionkit.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, seed, 13, 13, scale, dropout_p, window_size[0],
                                                right)[0]


@pytest.mark.parametrize("function", [varlen_attention, as_one_op])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (2, 1)}, {"window": (3, -1), "causal": True}, {"scale": 0.7}],
                         ids=["plain", "causal", "window", "causal window", "scale"])
def test_each_sequence_is_as_if_alone(reference, function, options):
    """Spec 9, item 1 and Spec 6, item 3: values and gradients differ by 2.3e-15 at most; empty sequences, grouped heads, keys
    without queries and queries that see nothing among them."""
    inputs = packed()
    named = {{"window": "window_size", "scale": "softmax_scale"}.get(name, name): value for name, value in options.items()}
    cu_seqlens = borders(LENGTHS_Q), borders(LENGTHS_K)
    ours = reference.with_gradients(lambda *tensors: function(*tensors, *cu_seqlens, **named), inputs)
    expected = reference.with_gradients(lambda *tensors: one_by_one(reference, *tensors, **options), inputs)
    assert reference.largest_difference(ours, expected) <= 1e-12
    assert not ours[0][-3:].any()                            # the last sequence has no keys


@pytest.mark.parametrize("options", [{"causal": True}, {"window": (2, 1)}, {"scale": 0.7}], ids=["causal", "window", "another width"])
def test_long_sequences_go_to_tiles_where_pytorch_would_keep_a_large_matrix(reference, monkeypatch, options):
    """The third one only, of 13 x 13; dropout too."""
    tiled = []
    monkeypatch.setattr(sdpa, "LARGEST_MATRIX", 13 * 13 * 9)                 # its mask alone would do
    monkeypatch.setattr(varlen, "flash_attention", lambda q, *rest, **named: tiled.append(q.shape[2]) or flash_attention(q, *rest, **named))
    inputs, cu_seqlens = packed(), (borders(LENGTHS_Q), borders(LENGTHS_K))
    named = {{"window": "window_size", "scale": "softmax_scale"}.get(name, name): value for name, value in options.items()}
    ours = reference.with_gradients(lambda *tensors: varlen_attention(*tensors, *cu_seqlens, **named), inputs)
    expected = reference.with_gradients(lambda *tensors: one_by_one(reference, *tensors, **options), inputs)
    assert reference.largest_difference(ours, expected) <= 1e-12
    assert tiled == [13]
    same = packed(value_channels=6)
    varlen_attention(*same, *cu_seqlens, **named)
    assert len(tiled) == 1
    varlen_attention(*same, *cu_seqlens, dropout_p=0.5, **named)
    assert tiled == [13, 13]


def test_the_packed_layout_is_that_of_flash_attn_and_the_other_is_that_of_pytorch(reference):
    """Spec 9, item 8, with [B, H, N, D] where flash-attn has [B, N, H, D]: its tensors are transposed, or packed as they are."""
    heads_first = [tensor.detach() for tensor in reference.tokens()]
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in heads_first)
    assert (q.shape, k.shape) == ((2 * 19, 4, 6), (2 * 23, 2, 6))
    ours = varlen_attention(q, k, v, borders((19, 19)), borders((23, 23)), 19, 23)
    torch.testing.assert_close(ours.view(2, 19, 4, 5).transpose(1, 2), flash_attention(*heads_first))


def test_lengths_known_to_python_stand_for_the_borders(reference, monkeypatch):
    inputs, cu_seqlens = packed(LENGTHS_Q, LENGTHS_Q), borders(LENGTHS_Q)
    expected = varlen_attention(*inputs, cu_seqlens, cu_seqlens)
    sequence = PackedSequence.of_lengths(inputs[0], LENGTHS_Q)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("the borders are read off the device"))
    assert torch.equal(varlen_attention(*inputs, cu_seqlens, cu_seqlens, lengths_q=sequence.lengths), expected)
    assert torch.equal(varlen_attention(*inputs, cu_seqlens, cu_seqlens.clone(), lengths_q=LENGTHS_Q, lengths_k=LENGTHS_Q), expected)


def test_a_change_in_one_sequence_leaves_the_others_bit_for_bit():
    """Spec 6, item 5."""
    q, k, v = (tensor.detach() for tensor in packed(dtype=torch.float32))
    cu_seqlens = borders(LENGTHS_Q), borders(LENGTHS_K)
    before = varlen_attention(q, k, v, *cu_seqlens)
    k[10:23], v[10:23] = 5.0, -3.0                           # of the third sequence, queries 5 to 17
    after = varlen_attention(q, k, v, *cu_seqlens)
    assert torch.equal(after[:5], before[:5])
    assert torch.equal(after[18:], before[18:])
    assert not torch.equal(after[5:18], before[5:18])


def test_values_and_keys_are_not_copied_for_the_heads_of_a_group():
    """What PyTorch keeps for the backward pass: views of the arguments, the outputs, and a number for each row."""
    q, k, v = packed((64, 64), (64, 64), 4, 4, 16, 16, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        varlen_attention(q, k, v, borders((64, 64)), borders((64, 64)))
    own = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in {x.untyped_storage().data_ptr() for x in (q, k, v)}]
    assert sum(tensor.nbytes for tensor in own) <= q.nbytes + 4 * 4 * 128 + 64


def test_the_one_op_draws_dropout_by_place_not_by_tile(reference, tile):
    inputs, cu_seqlens = packed(), (borders(LENGTHS_Q), borders(LENGTHS_K))

    def call(*tensors):
        return as_one_op(*tensors, *cu_seqlens, seed=torch.tensor(9), dropout_p=0.3)

    expected = reference.with_gradients(call, inputs)
    tile(3, 4)
    assert reference.largest_difference(reference.with_gradients(call, inputs), expected) <= 1e-13
    twice = [torch.cat([tensor.detach()[:7]] * 2) for tensor in inputs]
    first, second = as_one_op(*twice, borders((7, 7)), borders((7, 7)), seed=torch.tensor(9), dropout_p=0.3).split(7)
    assert (first - second).abs().max() > 0.1                # equal sequences do not drop the same
    alone = [tensor.detach().transpose(0, 1)[None] for tensor in inputs]
    assert (call(*inputs) - as_one_op(*inputs, *cu_seqlens)).abs().max() > 0.1
    one = borders((26,)), borders((34,))
    torch.manual_seed(0)
    seed = torch.randint(1 << 62, ())
    torch.manual_seed(0)
    whole = flash_attention(*alone, dropout_p=0.3)[0].transpose(0, 1)
    torch.testing.assert_close(whole, as_one_op(*inputs, *one, seed=seed, dropout_p=0.3))


def test_varlen_attention_keeps_the_contract_of_an_op():
    lengths_q, lengths_k = (2, 0, 3), (3, 1, 2)
    q, k, v = packed(lengths_q, lengths_k, 2, 1, 3, 2, torch.float32)
    inputs = [q, k, v, borders(lengths_q), borders(lengths_k), 3, 3]
    check_op(varlen_attention, inputs, empty={
        "no tokens": [q[:0], k[:0], v[:0], borders((0, 0)), borders((0, 0)), 0, 0],
        "no sequences": [q[:0], k[:0], v[:0], borders(()), borders(()), 0, 0]})
    torch.library.opcheck(torch.ops.visionkit.varlen_attention.default, (*inputs[:5], torch.tensor(3), 3, 3, 0.5, 0.2, 1, 0),
                          test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attn_serves_half_precision_on_a_gpu_where_it_is_installed(monkeypatch, dtype):
    """Its function gets the arguments in its order; float32 and values of another width are ours."""
    calls = []

    def flash_attn_varlen_func(*arguments, **options):
        calls.append((arguments[3:], options))
        return arguments[0]

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    monkeypatch.setattr(tiers, "_flash_attn_installed", lambda: True)
    monkeypatch.setattr(tiers, "_triton_installed", lambda: True)
    monkeypatch.setattr(tiers, "_capability", lambda device: (9, 0))
    real, gpu = tiers.tier, torch.device("cuda")
    monkeypatch.setattr(tiers, "tier", lambda op, device, dtype: real(op, gpu, dtype))
    q, k, v = packed(value_channels=6, dtype=dtype)
    cu_seqlens = borders(LENGTHS_Q), borders(LENGTHS_K)
    assert varlen_attention(q, k, v, *cu_seqlens, causal=True, window_size=(4, -1)) is q
    arguments, options = calls.pop()
    assert torch.equal(arguments[0], cu_seqlens[0])
    assert arguments[2:] == (13, 13, 0.0, 6**-0.5)
    assert options == {"causal": True, "window_size": (4, 0)}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert real("varlen_attention", gpu, dtype).name == "triton"         # which is deterministic
    assert real("varlen_attention", gpu, torch.float32).name == "triton"
    monkeypatch.setattr(tiers, "_triton_installed", lambda: False)
    wider = packed(value_channels=5, dtype=dtype)
    torch.testing.assert_close(varlen_attention(*wider, *cu_seqlens), as_one_op(*wider, *cu_seqlens))
    assert not calls


@pytest.mark.parametrize("change, message", [
    ({"q": torch.zeros(1, 26, 4, 6)}, r"q must be \[T, H, D\], the sequences one after the other, got \[1, 26, 4, 6\]"),
    ({"k": torch.zeros(34, 3, 6), "v": torch.zeros(34, 3, 5)}, "a multiple of the number of key heads, got 4 and 3"),
    ({"v": torch.zeros(33, 2, 5)}, "k and v .* the same tokens and heads"),
    ({"cu_seqlens_q": borders(LENGTHS_Q).long()}, r"cu_seqlens_q must be one row of int32.*got torch.int64 \[7\]"),
    ({"cu_seqlens_q": [0, 26]}, r"cu_seqlens_q must be a tensor of int32, \[0, ..., number of tokens\], got a list"),
    ({"cu_seqlens_k": borders((34,))}, "queries and keys must be as many sequences, got 6 and 1"),
    ({"cu_seqlens_q": borders((5, 0, 13, 4, 1, 2))}, r"of the lengths \[5, 0, 13, 4, 1, 2\] do not fill the 26 tokens of q"),
    ({"lengths_k": (34,)}, "lengths_k and cu_seqlens_k must be as many sequences, got 1 and 6"),
    ({"lengths_q": (4, 1, 13, 4, 1, 3)}, r"cu_seqlens_q must be \[0, 4, 5, 18, .*got \[0, 5, 5, 18"),
    ({"cu_seqlens_k": borders(LENGTHS_K) + 2}, r"cu_seqlens_k must be \[0, 7, 10, 23, .*got \[2, 9, 12, 25"),
    ({"max_seqlen_q": 12}, "max_seqlen_q must be 13, the longest sequence of q, or more, got 12"),
    ({"max_seqlen_k": 12, "lengths_k": LENGTHS_K}, "max_seqlen_k must be 13, the longest sequence of k, or more, got 12"),
    ({"dropout_p": -0.1}, r"dropout_p must lie in \[0, 1\)"),
    ({"causal": "top_left"}, "the last query of a sequence with its last key, got causal='top_left'; pass True"),
])
def test_what_does_not_fit_is_told(change, message):
    arguments = {"q": torch.zeros(26, 4, 6), "k": torch.zeros(34, 2, 6), "v": torch.zeros(34, 2, 5), "cu_seqlens_q": borders(LENGTHS_Q),
                 "cu_seqlens_k": borders(LENGTHS_K)} | change
    with pytest.raises(ValueError, match=message):
        varlen_attention(**arguments)
