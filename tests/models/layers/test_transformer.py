import pytest
import torch
from torch import Tensor, nn

from visionkit.models.layers import Attention, Borders, FeedForward, Transformer
from visionkit.structures import PackedSequence

CHANNELS, HEADS = 16, 4


def transformer(**changes) -> Transformer:
    torch.manual_seed(0)
    settings = {"channels": CHANNELS, "num_heads": HEADS, "hidden_channels": 32, "encoder_layers": 2, "decoder_layers": 3} | changes
    model = Transformer(**settings).eval()
    for parameter in model.parameters():                                    # so that no bias is 0 and no norm the identity
        nn.init.normal_(parameter, std=0.3)
    return model


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, CHANNELS, generator=torch.Generator().manual_seed(seed))


def copy_attention(theirs: nn.MultiheadAttention, ours: Attention) -> None:
    linears = (ours.query, ours.key, ours.value)
    theirs.in_proj_weight.copy_(torch.cat([linear.weight for linear in linears]))
    theirs.in_proj_bias.copy_(torch.cat([linear.bias for linear in linears]))
    theirs.out_proj.load_state_dict(ours.output.state_dict())


@torch.no_grad()
def torch_transformer(ours: Transformer, pre_norm: bool) -> nn.Transformer:
    theirs = nn.Transformer(CHANNELS, HEADS, len(ours.encoder.layers), len(ours.decoder.layers), 32, norm_first=pre_norm, batch_first=True)
    theirs.encoder.use_nested_tensor = False
    for stack, own in ((theirs.encoder, ours.encoder), (theirs.decoder, ours.decoder)):
        if isinstance(own.norm, nn.Identity):
            stack.norm = None
        else:
            stack.norm.load_state_dict(own.norm.state_dict())
        for layer, mine in zip(stack.layers, own.layers, strict=True):
            decodes = own is ours.decoder
            copy_attention(layer.self_attn, mine.self_attention if decodes else mine.attention)
            norms = [mine.self_attention_norm, mine.cross_attention_norm] if decodes else [mine.attention_norm]
            if decodes:
                copy_attention(layer.multihead_attn, mine.cross_attention)
            for index, norm in enumerate([*norms, mine.feed_forward_norm], start=1):
                getattr(layer, f"norm{index}").load_state_dict(norm.state_dict())
            layer.linear1.load_state_dict(mine.feed_forward.linear1.state_dict())
            layer.linear2.load_state_dict(mine.feed_forward.linear2.state_dict())
    return theirs.eval()


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("pre_norm", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("final_norms", [False, True], ids=["as in the paper", "with final norms"])
def test_it_equals_torchs_transformer_with_the_same_weights(pre_norm, final_norms):
    """Spec 07, item 1. Measured: 2e-07 with final norms, 2e-07 as in the paper; 2e-06 pre-norm without, where outputs reach 14."""
    ours = transformer(pre_norm=pre_norm, encoder_norm=final_norms, decoder_norm=final_norms)
    theirs = torch_transformer(ours, pre_norm)
    source, target = tokens(3, 7), tokens(3, 5, seed=2)
    source_valid = torch.arange(7) < torch.tensor([[7], [4], [1]])
    target_valid = torch.arange(5) < torch.tensor([[5], [2], [3]])
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    with torch.no_grad():
        expected = theirs(source, target, tgt_mask=future, src_key_padding_mask=~source_valid, tgt_key_padding_mask=~target_valid,
                          memory_key_padding_mask=~source_valid)
        outputs, memory = ours(source, target, source_valid=source_valid, target_valid=target_valid, causal=True)
    assert len(outputs) == 3
    torch.testing.assert_close(outputs[-1], expected, rtol=1e-6, atol=1e-5)
    with torch.no_grad():
        outputs, _ = ours(source, target)
        torch.testing.assert_close(outputs[-1], theirs(source, target), rtol=1e-6, atol=1e-5)


def test_final_norms_come_with_pre_norm_unless_said_otherwise():
    assert isinstance(transformer().encoder.norm, nn.Identity)
    assert isinstance(transformer().decoder.norm, nn.Identity)
    assert isinstance(transformer(pre_norm=True).encoder.norm, nn.LayerNorm)
    assert isinstance(transformer(pre_norm=True).decoder.norm, nn.LayerNorm)


def test_the_last_norm_is_applied_to_every_decoder_layer():
    model = transformer(decoder_norm=True)
    raw = []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda _, inputs, output: raw.append(output))
    outputs, _ = model(tokens(1, 4), tokens(1, 3, seed=2))
    for output, before in zip(outputs, raw, strict=True):
        assert torch.equal(output, model.decoder.norm(before))


def test_a_token_never_learns_of_later_ones():
    """Spec 07, item 3: exactly, as a gradient and as a value."""
    model = transformer()
    target = tokens(1, 6, seed=2).requires_grad_()
    output = model(tokens(1, 4), target, causal=True)[0][-1]
    (gradient,) = torch.autograd.grad(output[0, 2].sum(), target)
    assert gradient[0, :3].any(1).all()
    assert not gradient[0, 3:].any()


def test_padding_changes_nothing():
    """Spec 07, item 3. Measured: 1e-07 against no padding at all; 0 whatever the padding holds."""
    model = transformer()
    source, target = tokens(2, 5), tokens(2, 3, seed=2)
    alone = model(source, target)[0][-1]
    padded_source = torch.cat([source, 100 * tokens(2, 4, seed=3)], 1)
    padded_target = torch.cat([target, 100 * tokens(2, 2, seed=4)], 1)
    outputs, memory = model(padded_source, padded_target, source_valid=(torch.arange(9) < 5).expand(2, -1),
                            target_valid=(torch.arange(5) < 3).expand(2, -1))
    torch.testing.assert_close(outputs[-1][:, :3], alone, rtol=0, atol=2e-6)                # another summation order, no more
    other = torch.cat([source, -7 * tokens(2, 4, seed=5)], 1)
    again = model(other, padded_target, source_valid=(torch.arange(9) < 5).expand(2, -1), target_valid=(torch.arange(5) < 3).expand(2, -1))
    assert torch.equal(again[0][-1][:, :3], outputs[-1][:, :3])                             # what the padding holds: exactly nothing


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post-norm", "pre-norm"])
def test_packed_sequences_give_what_each_gives_alone(pre_norm):
    """Measured: 2e-07 of the outputs, 2e-07 of what the encoder read."""
    model = transformer(pre_norm=pre_norm)
    sources = [tokens(length, seed=length) for length in (7, 1, 4)]
    targets = [tokens(length, seed=10 + length) for length in (5, 5, 2)]
    source, target = PackedSequence.pack(sources), PackedSequence.pack(targets)
    outputs, memory = model(source.tokens, target.tokens, source.tokens, target.tokens, Borders.between(source, source),
                            Borders.between(target, target))
    for index, (own_source, own_target) in enumerate(zip(sources, targets, strict=True)):
        alone, alone_memory = model(own_source[None], own_target[None], own_source[None], own_target[None])
        torch.testing.assert_close(source.replace(memory).split()[index], alone_memory[0], rtol=0, atol=1e-5)
        for output, own in zip(outputs, alone, strict=True):
            torch.testing.assert_close(target.replace(output).split()[index], own[0], rtol=0, atol=1e-5)


def test_packed_tokens_never_learn_of_later_ones_of_their_sequence():
    attention = Attention(CHANNELS, HEADS)
    packed = PackedSequence.pack([tokens(3), tokens(4, seed=2)])
    output = attention(*[packed.tokens] * 3, Borders.between(packed, packed), causal=True)
    for own, alone in zip(packed.replace(output).split(), packed.split(), strict=True):
        torch.testing.assert_close(own, attention(*[alone[None]] * 3, causal=True)[0], rtol=0, atol=1e-6)


def test_packed_sequences_that_do_not_fit_are_refused():
    few, many = (PackedSequence.pack([tokens(length)]) for length in (3, 5))
    with pytest.raises(ValueError, match=r"a key for each query, got \[3\] queries and \[5\] keys"):
        Attention(CHANNELS, HEADS)(few.tokens, many.tokens, many.tokens, Borders.between(few, many), causal=True)
    with pytest.raises(ValueError, match="packed both or neither; got source_valid Borders and target_valid NoneType"):
        transformer()(many.tokens, few.tokens, source_valid=Borders.between(many, many))


def test_positions_go_to_queries_and_keys_of_every_layer_but_not_to_values():
    model = transformer()
    seen = []
    for module in model.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(lambda _, inputs, output: seen.append(inputs[:3]))
    source_position, target_position = tokens(1, 4, seed=3), tokens(1, 3, seed=4)
    _, memory = model(tokens(1, 4), tokens(1, 3, seed=2), source_position, target_position)
    assert len(seen) == 2 + 2 * 3
    for query, key, value in seen[:2]:
        torch.testing.assert_close(query - value, source_position)
        torch.testing.assert_close(key - value, source_position)
    for itself, cross in zip(seen[2::2], seen[3::2], strict=True):
        torch.testing.assert_close(itself[0] - itself[2], target_position)
        torch.testing.assert_close(itself[1] - itself[2], target_position)
        assert torch.equal(cross[2], memory)
        torch.testing.assert_close(cross[1] - memory, source_position)


def test_without_positions_tokens_are_a_set():
    """Measured: 1e-07 of the encoder, 2e-07 of the decoder."""
    model = transformer()
    source, order = tokens(2, 6), torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(model.encoder(source[:, order]), model.encoder(source)[:, order], rtol=0, atol=1e-5)
    queries = tokens(2, 6, seed=2)
    one, other = model(source, queries)[0][-1], model(source[:, order], queries[:, order])[0][-1]
    torch.testing.assert_close(other, one[:, order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_a_query_that_may_read_nothing_gets_zeros(causal):
    """Spec 07, item 7: exactly."""
    attention = Attention(CHANNELS, HEADS)
    x = tokens(2, 5).requires_grad_()
    valid = torch.tensor([[True] * 5, [False] * 5])
    read = attention(x, x, x, valid, causal)
    assert not read[1].any()
    assert read[0].any()
    read.sum().backward()
    assert x.grad.isfinite().all()


def test_attention_is_a_mean_of_the_values_by_weight():
    """Spec 07, item 7. Measured: no difference."""
    attention = Attention(CHANNELS, HEADS)
    for linear in (attention.value, attention.output):
        nn.init.eye_(linear.weight)
    constant = torch.ones(1, 4, CHANNELS)                                                   # weights that sum to 1 leave it as it is
    torch.testing.assert_close(attention(tokens(1, 3), tokens(1, 4, seed=2), constant, torch.tensor([[True, False, True, True]])),
                               constant[:, :3])


def test_dropout_is_where_it_should_be():
    x = tokens(1, 50)
    for settings, expected in [({"dropout": 1.0}, True), ({"dropout": 0.0, "inner_dropout": 0.5}, False)]:
        encoder = transformer(**settings).encoder.train()
        encoder.layers = encoder.layers[:1]
        layer = encoder.layers[0]
        plain = layer.feed_forward_norm(layer.attention_norm(x))                            # all sublayers dropped
        assert torch.allclose(encoder(x), plain) == expected
        assert torch.equal(encoder(x), encoder(x)) == expected
        assert torch.equal(encoder.eval()(x), encoder(x))


@pytest.mark.parametrize("policy", ["every", "sqrt", "selective"])
def test_checkpointing_changes_neither_outputs_nor_gradients(policy):
    """Difference 0.0, with dropout, and the outputs of all decoder layers."""
    results = []
    for checkpointing in (False, {"policy": policy}):
        model = transformer(checkpointing=checkpointing, dropout=0.3, inner_dropout=0.2).train()
        torch.manual_seed(3)
        source = tokens(2, 5).requires_grad_()
        outputs, _ = model(source, tokens(2, 3, seed=2), source_valid=torch.arange(5).expand(2, -1) < 4)
        sum(output.square().sum() for output in outputs).backward()
        results.append([*outputs, source.grad, *(parameter.grad for parameter in model.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(recomputed, plain)


def test_the_paper_counts_63_million_parameters_besides_the_embedding():
    """Section 3: 6 + 6 layers of 512 channels; 44.1 million and the 37000 x 512 of the shared embedding are 63.1 million."""
    with torch.device("meta"):
        model = Transformer()
    assert sum(parameter.numel() for parameter in model.parameters()) + 37000 * 512 == pytest.approx(63.08e6, rel=1e-3)


def test_wrong_settings_are_refused():
    for heads in (4, 0):
        with pytest.raises(ValueError, match=f"10 channels cannot be split among {heads} heads"):
            Attention(10, heads)
    with pytest.raises(ValueError, match="relu, gelu, gelu_tanh; got 'swish'"):
        FeedForward(8, 8, activation="swish")
