"""Linear and efficient attention (Spec 12)."""
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from visionkit.ops import EfficientAttention, LinearAttention, efficient_attention, linear_attention, varlen_linear_attention
from visionkit.ops.attention import LinearAttentionState, linear_attention_step
from visionkit.testing import check_op


def tokens(images=2, heads=3, queries=37, keys=37, channels=8, value_channels=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (queries, channels), (keys, channels), (keys, value_channels)
    return [torch.randn(images, heads, *shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def by_the_matrix(query, key, value, causal=False, valid=None):
    """The quadratic form, each weight by itself."""
    weights = torch.einsum("bhnd,bhmd->bhnm", F.elu(query) + 1, F.elu(key) + 1)
    if causal:
        weights = weights.tril()
    if valid is not None:
        weights = weights * valid[:, None, None]
    return weights @ value / (weights.sum(-1, keepdim=True) + 1e-6)


def step_by_step(query, key, value):
    state, outputs = None, []
    for token in zip(query.unbind(2), key.unbind(2), value.unbind(2), strict=True):
        output, state = linear_attention_step(*token, state)
        outputs.append(output)
    return torch.stack(outputs, 2)


def largest_difference(results, expected):
    return max((one - other).abs().max().item() for one, other in zip(results, expected, strict=True))


def with_gradients(function, inputs):
    output = function(*inputs)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def test_two_tokens_by_hand():
    """Features of 0 and 1 are 1 and 2: the second query gives 2/6 to the first value and 4/6 to the second."""
    x = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    output = linear_attention(x, x, torch.tensor([3.0, 6.0]).view(1, 1, 2, 1), causal=True)
    torch.testing.assert_close(output.flatten(), torch.tensor([3 / (1 + 1e-6), 30 / (6 + 1e-6)]))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk", [None, 1, 5, 16, 37, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_parallel_and_chunked_are_the_quadratic_form(causal, chunk, dtype, tolerance):
    """Spec 12, item 1: 1.3e-15 in float64, 5e-7 in float32, output and gradients."""
    inputs = tokens(dtype=dtype)
    ours = with_gradients(lambda *tensors: linear_attention(*tensors, causal=causal, chunk=chunk), inputs)
    assert largest_difference(ours, with_gradients(lambda *tensors: by_the_matrix(*tensors, causal), inputs)) <= tolerance


def test_recurrent_is_chunked_is_parallel():
    """Spec 12, item 1: 4e-16 in float64, gradients 5e-16; in float32 1.8e-7, and 1e-6 is asked."""
    inputs = tokens()
    expected = with_gradients(lambda *tensors: linear_attention(*tensors, causal=True, chunk=8), inputs)
    assert largest_difference(with_gradients(step_by_step, inputs), expected) <= 1e-12
    single = [tensor.detach().float() for tensor in inputs]
    forms = [linear_attention(*single, causal=True), linear_attention(*single, causal=True, chunk=8), step_by_step(*single)]
    assert largest_difference(forms[:2], forms[1:]) <= 1e-6


@pytest.mark.parametrize("cut", [1, 16, 30])
def test_a_stream_goes_on_where_it_stopped(cut):
    """The state is all that the past leaves: the same outputs, and the same state, as in one go."""
    query, key, value = tokens()
    whole, last = linear_attention(query, key, value, causal=True, chunk=8, return_state=True)
    first, state = linear_attention(query[:, :, :cut], key[:, :, :cut], value[:, :, :cut], causal=True, chunk=8, return_state=True)
    second, after = linear_attention(query[:, :, cut:], key[:, :, cut:], value[:, :, cut:], causal=True, chunk=8, state=state,
                                     return_state=True)
    assert largest_difference([torch.cat([first, second], 2), *after], [whole, *last]) <= 1e-12
    everything = linear_attention(query, key[:, :, cut:], value[:, :, cut:], state=state)
    assert largest_difference([everything], [linear_attention(query, key, value)]) <= 1e-12


def test_the_state_is_as_large_after_a_thousand_tokens_as_after_one():
    """Spec 12, item 6; float32 for half precision, item 8."""
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)):
        shapes = set()
        for count in (1, 1000):
            inputs = tokens(1, 2, count, count, dtype=dtype)
            output, state = linear_attention(*inputs, causal=True, return_state=True)
            assert output.dtype == dtype
            assert {tensor.dtype for tensor in state} == {wide}
            shapes.add(tuple(tensor.shape for tensor in state))
        assert shapes == {((1, 2, 8, 5), (1, 2, 8))}


def test_half_precision_sums_in_float32_under_autocast_too():
    """Spec 12, item 8: 5000 ones are 5000, where a sum in bfloat16 stays at 256."""
    ones = torch.zeros(1, 1, 5000, 1)
    with torch.autocast("cpu", torch.bfloat16):
        output, state = linear_attention(ones, ones, ones + 1, causal=True, normalise=False, return_state=True)
    assert output.dtype == torch.bfloat16
    assert state.k.item() == 5000
    assert state.kv.dtype == torch.float32
    assert state.kv.item() == 5000
    assert output[0, 0, -1].item() == torch.tensor(5000.0).bfloat16().item()


def test_no_later_token_is_seen():
    """Spec 12, item 4: the Jacobian above the diagonal is exactly 0, below it nowhere."""
    query, key, value = (tensor.detach() for tensor in tokens(1, 1, 9, 9, 3, 2))
    for index in range(3):
        inputs = [query, key, value]

        def of_one(tensor, index=index, inputs=inputs):
            return linear_attention(*inputs[:index], tensor, *inputs[index + 1:], causal=True, chunk=4)[0, 0].sum(-1)

        jacobian = torch.autograd.functional.jacobian(of_one, inputs[index])[:, 0, 0].abs().sum(-1)      # [output, input]
        assert not jacobian.triu(1).any()
        if index:
            assert (jacobian[1:] + torch.eye(9)[1:] + torch.ones(8, 9).triu(1) > 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_as_if_it_were_cut_off(causal):
    """Spec 12, item 7."""
    query, key, value = tokens(1)
    valid = torch.arange(37)[None] < 20
    key.data[:, :, 20:], value.data[:, :, 20:] = 50.0, 1e6
    ours = linear_attention(query, key, value, causal=causal, valid=valid, chunk=8)
    expected = linear_attention(query[:, :, :20], key[:, :, :20], value[:, :, :20], causal=causal, chunk=8)
    assert largest_difference([ours[:, :, :20]], [expected]) <= 1e-12
    double = efficient_attention(query, key, value, valid)
    assert largest_difference([double], [efficient_attention(query, key[:, :, :20], value[:, :, :20])]) <= 1e-12


def test_keys_without_features_or_without_tokens_give_zero():
    """Spec 12, item 2: epsilon stands in the denominator, so nothing is divided by 0."""
    query, key, value = (tensor.detach().float() for tensor in tokens())
    far = torch.full_like(key, -1e4)                                        # whose features are 0
    for causal in (False, True):
        assert not linear_attention(query, far, value, causal=causal, chunk=8).any()
    nobody = torch.zeros(2, 37, dtype=torch.bool)
    assert not linear_attention(query, key, value, valid=nobody).any()
    assert not efficient_attention(query, key, value, nobody).any()
    large = linear_attention(query * 1e4, key * 1e4, value, causal=True)
    assert large.isfinite().all()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("function", [linear_attention, efficient_attention])
def test_padding_may_hold_any_number(function, number):
    """In keys and values: the others have the results and gradients that they have without it, padding has gradients of 0."""
    query, key, value = tokens()
    valid = torch.arange(37).expand(2, -1) < 30
    padded = [query, *(torch.where(valid[:, None, :, None], tensor, number).detach().requires_grad_() for tensor in (key, value))]
    ours = with_gradients(lambda *tensors: function(*tensors, valid=valid), padded)
    expected = with_gradients(function, [query, *(tensor[:, :, :30].detach().requires_grad_() for tensor in (key, value))])
    assert largest_difference([*ours[:2], *(grad[:, :, :30] for grad in ours[2:])], expected) <= 1e-12
    assert not any(grad[:, :, 30:].any() for grad in ours[2:])


def test_without_normaliser_the_numerator_is_left():
    query, key, value = tokens()
    ones = torch.ones_like(value)
    for causal in (False, True):
        numerator, denominator = (linear_attention(query, key, x, causal=causal, normalise=False, chunk=8) for x in (value, ones))
        assert largest_difference([numerator / (denominator + 1e-6)], [linear_attention(query, key, value, causal=causal)]) <= 1e-12


def test_packed_sequences_start_anew():
    """The sums of one sequence do not reach the next; empty sequences, other numbers of keys."""
    lengths_q, lengths_k = (5, 0, 20, 12), (5, 3, 20, 9)
    query, key, value = tokens(1)
    q, k, v = (tensor.detach()[0].transpose(0, 1).requires_grad_() for tensor in (query, key, value))
    cu_seqlens = [torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32) for lengths in (lengths_q, lengths_k)]
    ours = varlen_linear_attention(q, k, v, *cu_seqlens)
    parts = [tensor.split(lengths, 2) for tensor, lengths in ((query, lengths_q), (key, lengths_k), (value, lengths_k))]
    expected = torch.cat([by_the_matrix(*sequence) for sequence in zip(*parts, strict=True)], 2)[0].transpose(0, 1)
    assert largest_difference([ours], [expected]) <= 1e-12
    causal = varlen_linear_attention(q, k, v, cu_seqlens[0], cu_seqlens[0], causal=True, chunk=4, lengths_q=lengths_q)
    parts = [tensor.split(lengths_q, 2) for tensor in (query, key, value)]
    expected = torch.cat([by_the_matrix(*sequence, True) for sequence in zip(*parts, strict=True)], 2)[0].transpose(0, 1)
    assert largest_difference([causal], [expected]) <= 1e-12


def test_efficient_attention_is_its_formula_and_its_rows_sum_to_one():
    """Spec 12, item 3: a softmax over the channels of a query, one over the tokens of the keys; sums are off 1 by 3e-16."""
    query, key, value = tokens(queries=6, keys=11)
    rows = torch.stack([torch.exp(query[..., i]) for i in range(8)], -1)
    rows = rows / sum(rows.unbind(-1))[..., None]
    columns = torch.exp(key) / torch.exp(key).sum(2, keepdim=True)
    weights = torch.einsum("bhnd,bhmd->bhnm", rows, columns)
    assert (weights.sum(-1) - 1).abs().max() <= 1e-12
    assert largest_difference([efficient_attention(query, key, value)], [weights @ value]) <= 1e-12
    ones = efficient_attention(query, key, torch.ones_like(value))
    assert (ones - 1).abs().max() <= 1e-12
    with pytest.raises(ValueError, match=r"efficient_attention cannot be causal.*use linear_attention\(causal=True\)"):
        efficient_attention(query, key, value, causal=True)


def test_features_are_never_zero_and_have_the_slope_of_elu():
    """e^-20 in float32, which elu(-20) + 1 rounds to 0; at 0 itself the slope is 1, from both sides."""
    def feature(x):                                          # the numerator of a query of one channel and a key of feature 1
        zero = torch.zeros(1, 1, 1, 1)
        return linear_attention(x.view(1, 1, -1, 1), zero, zero + 1, normalise=False).flatten()

    x = torch.tensor([-20.0, -1.0, 0.0, 2.0])
    expected = torch.stack([x[0].exp(), x[1].exp(), torch.tensor(1.0), torch.tensor(3.0)])
    torch.testing.assert_close(feature(x), expected, rtol=1e-6, atol=0)
    features = feature(x.requires_grad_())
    torch.testing.assert_close(features.detach(), expected, rtol=1e-6, atol=0)
    slope, = torch.autograd.grad(features.sum(), x)
    torch.testing.assert_close(slope, torch.tensor([-20.0, -1.0, 0.0, 0.0]).exp(), rtol=1e-6, atol=0)


def test_what_is_kept_grows_with_the_number_of_tokens():
    """Spec 12, item 5: causal, from 512 to 4096 tokens, with a slope of 1.0 in log-log; no tensor has N x N numbers."""
    kept = []
    for count in (512, 4096):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, saved=saved: saved.append(tensor) or tensor, lambda tensor: tensor):
            linear_attention(*tokens(1, 1, count, count, 16, 16, torch.float32), causal=True)
        kept.append(sum(tensor.nbytes for tensor in saved))
        assert max(tensor.numel() for tensor in saved) < count * 128
    assert kept[1] / kept[0] == pytest.approx(8, rel=0.02)


def test_the_ops_keep_their_contract():
    inputs = tokens(1, 2, 7, 7, 3, 2, torch.float32)
    query, key, value = inputs
    empty = {"no images": [query[:0], key[:0], value[:0]], "no tokens": [tensor[:, :, :0] for tensor in inputs]}

    def causal(*tensors):
        return linear_attention(*tensors, causal=True, chunk=3)

    for function in (linear_attention, causal, efficient_attention):         # one is enough to see that plain PyTorch compiles
        check_op(function, inputs, empty=empty, compiles=function is causal)


@pytest.mark.parametrize("change, message", [
    ({"key": torch.zeros(2, 1, 7, 4), "value": torch.zeros(2, 1, 7, 5)}, "as many heads, got 3 and 1; repeat_interleave"),
    ({"causal": True, "query": torch.zeros(2, 3, 6, 4)}, "a key for each query, got 6 queries and 7 keys"),
    ({"valid": torch.ones(2, 7, 7, dtype=torch.bool)}, r"valid must be bool \[B, S\] = \[2, 7\].*got torch.bool \[2, 7, 7\]"),
    ({"chunk": 0}, "chunk is a number of tokens, got 0"),
    ({"state": LinearAttentionState(torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 4))}, r"\[2, 3, 4, 5\] and \[2, 3, 4\], got \[2, 3, 5, 4\]"),
])
def test_what_does_not_fit_is_told(change, message):
    arguments = {"query": torch.zeros(2, 3, 7, 4), "key": torch.zeros(2, 3, 7, 4), "value": torch.zeros(2, 3, 7, 5)} | change
    with pytest.raises(ValueError, match=message):
        linear_attention(**arguments)
    with pytest.raises(ValueError, match=r"query must be one token, \[B, H, channels\], got \[2, 3, 7, 4\]"):
        linear_attention_step(*(torch.zeros(2, 3, 7, 4),) * 3)


def test_the_modules_call_the_functions():
    inputs, valid = tokens(), torch.arange(37).expand(2, -1) < 30
    assert torch.equal(LinearAttention(causal=True, normalise=False, chunk=5)(*inputs, valid),
                       linear_attention(*inputs, causal=True, normalise=False, chunk=5, valid=valid))
    assert torch.equal(EfficientAttention()(*inputs, valid), efficient_attention(*inputs, valid))
