"""One interface: whichever kernel serves, the answer is the formula's."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from visionkit.ops import (
    Attention,
    FlashAttention,
    attention,
    efficient_attention,
    flash_attention,
    linear_attention,
    tiers,
    varlen_attention,
)
from visionkit.ops.attention import attention_kernel, sdpa

CALLS = {
    "plain": {}, "causal": {"causal": True}, "top left": {"causal": "top_left"}, "window": {"window": (3, 2)},
    "causal window": {"window": (4, -1), "causal": True}, "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.tensor([1.0, 0.5, 0.2, 0.1])},
    "blocks": {"block_mask": torch.tensor([[True, False], [True, True], [False, False]]), "block_size": 10},
}


@pytest.mark.parametrize("queries, keys", [(21, 18), (18, 18), (25, 11), (1, 18), (2, 18), (11, 20)])
@pytest.mark.parametrize("name", CALLS)
def test_every_kernel_gives_what_the_formula_says(reference, name, queries, keys):
    """Values and gradients, at most 4e-15."""
    options = dict(CALLS[name])
    if "block_mask" in options:
        options["block_mask"] = options["block_mask"][:-(-queries // 10)]
    inputs = reference.tokens(queries=queries, keys=keys)
    ours = reference.with_gradients(lambda *tensors: attention(*tensors, scale=0.5, **options), inputs)
    expected = reference.with_gradients(lambda *tensors: reference.dense_attention(*tensors, scale=0.5, **options), inputs)
    assert reference.largest_difference(ours, expected) <= 1e-12


def test_pytorch_serves_what_it_knows_and_flash_attention_the_rest(reference):
    inputs = [tensor.detach() for tensor in reference.tokens(queries=21, keys=18)]
    chosen = {name: attention_kernel(*inputs, **options) for name, options in CALLS.items()}
    assert {name for name, kernel in chosen.items() if kernel.name == "sdpa"} == {"plain", "causal", "top left", "window", "causal window"}
    assert {kernel.name for kernel in chosen.values()} == {"sdpa", "portable"}
    assert chosen["alibi"].reason == "PyTorch's attention knows no alibi_slopes; the tensors are on cpu; Triton kernels are for CUDA"
    assert "mask" in chosen["window"].reason


def test_what_would_keep_a_large_matrix_goes_to_tiles(reference, monkeypatch):
    """A mask of all queries and keys, the scores that PyTorch keeps with dropout or values of another width."""
    query, key, value = (tensor.detach() for tensor in reference.tokens())
    same = torch.zeros(2, 2, 23, 6, dtype=torch.float64)
    asked = {"mask": ((query, key, same), {"window": (3, 3)}), "dropout": ((query, key, same), {"dropout_p": 0.1}),
             "another width": ((query, key, value), {})}
    for inputs, options in asked.values():
        assert attention_kernel(*inputs, **options).name == "sdpa"
    monkeypatch.setattr(sdpa, "LARGEST_MATRIX", 19 * 23 * 9 - 1)             # a mask, in bool and in float64
    for word, (inputs, options) in asked.items():
        kernel = attention_kernel(*inputs, **options)
        assert kernel.name == "portable"
        assert word in kernel.reason
    assert attention_kernel(query, key, same).name == "sdpa"
    assert attention_kernel(query, key, same, window=(3, 3), dropout_p=0.1).reason.startswith(
        "PyTorch's attention keeps a mask for this causal or window and all scores for dropout, 0 MiB")
    tiled = attention(query, key, value, window=(3, 3))
    monkeypatch.undo()
    torch.testing.assert_close(tiled, attention(query, key, value, window=(3, 3)))


@pytest.mark.parametrize("left, right", [(-1, -1), (-1, 0), (2, -1), (3, 1)])
@pytest.mark.parametrize("offset", [-4, 0, 6])
def test_the_mask_of_a_band_is_made_without_a_matrix_of_numbers(left, right, offset):
    """No more than two of bool, where distances in int64 took 8 bytes a pair."""
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            self.bytes = max(self.bytes, result.nbytes)
            return result

    with Largest() as largest:
        mask = sdpa.visible(50, 70, left, right, offset, torch.device("cpu"))
    assert largest.bytes == mask.nbytes
    mask = mask.tolist()
    for i, j in itertools.product(range(50), range(70)):
        assert mask[i][j] == ((left < 0 or j >= i + offset - left) and (right < 0 or j <= i + offset + right))


def test_on_a_gpu_triton_takes_what_pytorch_would_mask(reference, monkeypatch):
    query, key, value = (tensor.detach() for tensor in reference.tokens(dtype=torch.float32))
    monkeypatch.setattr(tiers, "tier", lambda *_: tiers.Tier("triton", "CUDA, and triton is installed"))
    assert attention_kernel(query, key, value, window=(3, 3)).name == "triton"
    assert attention_kernel(query, key, value, softcap=1.0).name == "triton"
    every_head, half = [tensor.repeat_interleave(2, 1) for tensor in (key, value)], [tensor.half() for tensor in (query, key, value)]
    assert attention_kernel(query, *every_head).name == "sdpa"
    assert "know grouped heads only in half precision" in attention_kernel(query, key, value).reason
    assert attention_kernel(*half).name == "triton"                          # values of another width
    assert attention_kernel(half[0], half[1], half[1]).name == "sdpa"
    wide = [F.pad(tensor, (0, 300)) for tensor in (query, key)]
    assert attention_kernel(*wide, value, softcap=1.0) == tiers.Tier(
        "portable", "PyTorch's attention knows no softcap; a row is too long for the Triton kernels, or block_size no multiple of their 16")
    blocks = torch.ones(1, 1, dtype=torch.bool)
    assert attention_kernel(query, key, value, block_mask=blocks, block_size=32).name == "triton"
    assert attention_kernel(query, key, value, block_mask=blocks, block_size=40).name == "portable"


def test_a_mask_of_any_form_goes_to_pytorch_alone(reference):
    query, key, value = (tensor.detach() for tensor in reference.tokens(heads=2))
    mask = torch.randn(2, 1, 19, 23, dtype=torch.float64)
    for form in (mask, mask > 0):
        assert torch.equal(attention(query, key, value, mask=form), F.scaled_dot_product_attention(query, key, value, form))
    with pytest.raises(ValueError, match="mask stands alone.*got softcap, causal or window beside it"):
        attention(query, key, value, mask=mask, causal=True, softcap=1.0)


def test_shapes_are_told_on_the_meta_device(reference):
    """Which has no autocast; borders there hold no numbers, and none are asked for."""
    query, key, value = (tensor.detach().to("meta") for tensor in reference.tokens(key_heads=4, dtype=torch.bfloat16))
    borders = torch.empty(4, dtype=torch.int32, device="meta")
    packed = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    for output in (attention(query, key, value), flash_attention(query, key, value, causal=True, dropout_p=0.1),
                   linear_attention(query, key, value), efficient_attention(query, key, value)):
        assert (output.shape, output.dtype, output.device.type) == ((2, 4, 19, 5), torch.bfloat16, "meta")
    for lengths in (None, (19, 0, 0)):
        output = varlen_attention(*packed, borders, borders.clone(), lengths_q=lengths)
        assert (output.shape, output.dtype, output.device.type) == ((19, 4, 5), torch.bfloat16, "meta")


@pytest.mark.parametrize("softcap", [-1.0, float("nan")])
def test_a_softcap_that_is_not_positive_is_refused_wherever_it_is_given(reference, softcap):
    """It once went to PyTorch's attention, which knows none, and was dropped."""
    inputs = [tensor.detach() for tensor in reference.tokens()]
    calls = (lambda: attention(*inputs, softcap=softcap), lambda: flash_attention(*inputs, softcap=softcap),
             lambda: Attention(softcap=softcap), lambda: FlashAttention(softcap=softcap))
    for call in calls:
        with pytest.raises(ValueError, match=f"softcap must be positive, or 0 for none, got {softcap}"):
            call()


@pytest.mark.parametrize("change, message", [
    ({"mask": torch.ones(2, 23, dtype=torch.bool)}, r"broadcast to \[B, H, N, M\] = \[2, 4, 19, 23\].*got \[2, 23\]; a mask of keys"),
    ({"mask": torch.ones(23, dtype=torch.bool)}, r"N and M at least, got \[23\]"),
    ({"mask": torch.ones(19, 23, dtype=torch.int64)}, "mask must be bool.*got torch.int64 beside torch.float32"),
    ({"mask": torch.ones(19, 23, dtype=torch.bool, device="meta")}, "query is on cpu, mask on meta"),
    ({"window": 3}, r"window is \(keys to the left, keys to the right\), -1 for all, got 3; \(3, 3\) is three on either side"),
    ({"window": (3,)}, r"window is .* got \(3,\)"),
    ({"window": (2.0, 1)}, r"window is .* got \(2.0, 1\)"),
    ({"query": torch.zeros(2, 4, 19, 0), "key": torch.zeros(2, 2, 23, 0)}, "at least one channel, got"),
])
def test_what_does_not_fit_is_told(change, message):
    arguments = {"query": torch.zeros(2, 4, 19, 6), "key": torch.zeros(2, 2, 23, 6), "value": torch.zeros(2, 2, 23, 5)} | change
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


def test_dropout_is_of_the_weights(reference):
    inputs = [tensor.detach() for tensor in reference.tokens(heads=2, value_channels=6)]
    torch.manual_seed(0)
    for options in ({}, {"softcap": 5.0}):
        mean = torch.stack([attention(*inputs, dropout_p=0.2, **options) for _ in range(300)]).mean(0)
        assert (mean - attention(*inputs, **options)).abs().max() < 0.15


def test_the_module_calls_the_function_and_drops_nothing_in_evaluation(reference):
    inputs = [tensor.detach() for tensor in reference.tokens()]
    module = Attention(causal=True, scale=0.3, window=(5, -1), dropout_p=0.5, softcap=3.0).eval()
    assert torch.equal(module(*inputs), attention(*inputs, causal=True, scale=0.3, window=(5, -1), softcap=3.0))
    mask = torch.ones(19, 23, dtype=torch.bool)
    assert torch.equal(Attention()(*inputs, mask), attention(*inputs, mask=mask))
    with pytest.raises(ValueError, match="causal must be"):
        Attention(causal="left")
