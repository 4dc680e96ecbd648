import contextlib
import copy
import functools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError

from visionkit.ops.checkpointing import GROUPS, POLICIES, Checkpointing, recompute, run_blocks
from visionkit.registry import ConfigError

CHANNELS = 16
every_policy = pytest.mark.parametrize("policy", POLICIES[1:])
several_times = pytest.mark.parametrize("policy", ["every", "sqrt"])         # of which a graph may be gone through backwards


class Block(nn.Module):
    """A residual MLP with dropout."""

    def __init__(self, norm=nn.LayerNorm, channels=CHANNELS):
        super().__init__()
        self.norm = norm(channels)
        self.wide, self.narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return x + self.dropout(self.narrow(F.gelu(self.wide(self.norm(x)))))


def chain(length, norm=nn.LayerNorm):
    torch.manual_seed(0)
    return nn.ModuleList(Block(norm) for _ in range(length))


def tokens():
    return torch.randn(8, CHANNELS, generator=torch.Generator().manual_seed(1)).requires_grad_()


def step(blocks, policy, outputs_of=None):
    """Outputs and gradients of one training step."""
    x = tokens()
    torch.manual_seed(2)
    outputs = run_blocks(blocks, x, checkpointing=policy, outputs_of=outputs_of)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    after = torch.rand(1)                                    # the second pass must not have moved the generator either
    sum((output.square().sum() for output in outputs), torch.zeros(())).backward()
    found = [*outputs, after, torch.rand(1), x.grad, *(parameter.grad for parameter in blocks.parameters())]
    blocks.zero_grad()
    return found


def held_by(call, parameters=()):
    """Bytes that the graph of `call()` keeps for the backward pass, parameters left out; and what it gives."""
    sizes, own = {}, {parameter.data_ptr() for parameter in parameters}

    def note(tensor):
        if tensor.data_ptr() not in own:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = call()
    return sum(sizes.values()), result


def count_calls(blocks):
    calls = []
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def assert_equal(ours, expected):
    assert len(ours) == len(expected)
    for number, (value, other) in enumerate(zip(ours, expected, strict=True)):
        assert torch.equal(value, other), f"value {number} differs by {(value - other).abs().max()}"


# ---------------------------------------------------------------------------------------------------------------- the switch

@pytest.mark.parametrize("setting, expected", [
    (None, Checkpointing()), (False, Checkpointing()), ("none", Checkpointing()), (True, Checkpointing("every")),
    ("sqrt", Checkpointing("sqrt")), ({"policy": "every"}, Checkpointing("every")),
    ({"policy": "selective"}, Checkpointing("selective", tuple(GROUPS))),
    ({"policy": "selective", "keep": ["matmul", "aten::_softmax"]}, Checkpointing("selective", ("matmul", "aten::_softmax"))),
    ({"policy": "selective", "keep": "attention"}, Checkpointing("selective", ("attention",))),
])
def test_a_setting_is_a_bool_a_name_or_a_dict(setting, expected):
    found = Checkpointing.of(setting)
    assert found == expected
    assert Checkpointing.of(found) is found
    assert bool(found) == (expected.policy != "none")


@pytest.mark.parametrize("setting, message", [
    ("sqr", "^checkpointing: .*one of none, every, sqrt, selective; got 'sqr'. Did you mean 'sqrt'"),
    ({"policy": "selectiv"}, "^checkpointing: .* Did you mean 'selective'"),
    ({}, "^checkpointing: .*got {}"), (3, "^checkpointing: .*got 3"),
    ({"policy": "sqrt", "segments": 4}, "^checkpointing.segments: checkpointing has no 'segments'. It takes: policy, keep"),
    ({"policy": "every", "keep": ("matmul",)}, "^checkpointing.keep: only the policy 'selective' keeps"),
    ({"policy": "selective", "keep": ("matmull",)}, "^checkpointing.keep: .* Did you mean 'matmul'"),
    ({"policy": "selective", "keep": ("aten::_sofmax",)}, "^checkpointing.keep: keep takes .*got 'aten::_sofmax'"),
    ({"policy": "selective", "keep": "aten::__name__"}, "^checkpointing.keep: keep takes .*got 'aten::__name__'"),
    ({"policy": "selective", "keep": "aten::conv2d"}, "^checkpointing.keep: 'aten::conv2d' is made of other ops.*the group 'convolution'"),
    ({"policy": "selective", "keep": ["aten::linear"]}, "^checkpointing.keep: 'aten::linear' is made of other ops.*the group 'matmul'"),
    ({"policy": "selective", "keep": "aten::matmul"}, "^checkpointing.keep: 'aten::matmul' is made of other ops.*the group 'matmul'"),
    ({"policy": "selective", "keep": "aten::scaled_dot_product_attention"}, "^checkpointing.keep: .*the group 'attention'"),
    ({"policy": "selective", "keep": "aten::softmax"}, "^checkpointing.keep: 'aten::softmax' is made of other ops.*'aten::_softmax'"),
    ({"policy": "selective", "keep": 3}, "^checkpointing.keep: keep is a name, or a list of names, .*got 3"),
    ({"policy": "selective", "keep": [["matmul"]]}, r"^checkpointing.keep: keep takes .*got \['matmul'\]"),
])
def test_a_wrong_setting_is_refused_and_the_nearest_named(setting, message):
    with pytest.raises(ConfigError, match=message):
        Checkpointing.of(setting)


def test_a_setting_that_is_built_directly_is_the_same_and_checked():
    assert Checkpointing("selective") == Checkpointing.of("selective")
    assert Checkpointing("selective").keep == tuple(GROUPS)
    assert Checkpointing("selective", "matmul").keep == ("matmul",)
    with pytest.raises(ConfigError, match="^checkpointing: .*got 'sqr'. Did you mean 'sqrt'"):
        Checkpointing("sqr")
    with pytest.raises(ConfigError, match="^checkpointing.keep: only the policy 'selective' keeps"):
        Checkpointing("every", ("matmul",))


# ----------------------------------------------------------------------------------------------------------------- exactness

@every_policy
@pytest.mark.parametrize("length", [1, 2, 7])
def test_outputs_gradients_and_random_numbers_are_the_same_to_the_bit(policy, length):
    """Spec 05, test 1 and checklist 1: dropout 0.1, largest difference 0.0."""
    blocks = chain(length)
    assert_equal(step(blocks, policy), step(blocks, "none"))


@every_policy
@pytest.mark.parametrize("wanted", [range(7), (1, 4), (6,)], ids=["all", "two", "last"])
def test_outputs_between_are_there_whatever_the_policy(policy, wanted):
    blocks = chain(7)
    ours, expected = (step(blocks, checkpointing, wanted) for checkpointing in (policy, "none"))
    assert [value is None for value in ours] == [value is None for value in expected]                # after the last one wanted
    assert_equal(*([value for value in values if value is not None] for values in (ours, expected)))
    with torch.no_grad():
        x = tokens()
        outputs = run_blocks(blocks.eval(), x, checkpointing=policy, outputs_of=wanted)
        for index, block in enumerate(blocks):
            x = block(x)
            if index in wanted:
                assert torch.equal(outputs[list(wanted).index(index)], x)


def test_outputs_of_blocks_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"numbers of blocks, 0 to 2; got \[1, 3\]"):
        run_blocks(chain(3), tokens(), checkpointing="sqrt", outputs_of=(1, 3))


def test_a_chain_of_no_blocks_gives_what_it_got():
    x = tokens()
    assert run_blocks([], x, checkpointing="sqrt") is x
    assert run_blocks([], x, checkpointing="every", outputs_of=()) == ()


@every_policy
def test_two_forward_passes_may_come_before_one_backward_pass(policy):
    """Spec 05, test 2."""
    blocks, found = chain(4), []
    for checkpointing in (policy, "none"):
        torch.manual_seed(0)
        x = tokens()
        outputs = [run_blocks(blocks, scale * x, checkpointing=checkpointing) for scale in (1, 2)]
        found.append(torch.autograd.grad(outputs[0].square().sum() + outputs[1].sum(), [x, *blocks.parameters()]))
    assert_equal(*found)


@pytest.mark.parametrize("inner", POLICIES[1:])
@pytest.mark.parametrize("outer", POLICIES[1:])
def test_checkpoints_may_be_nested(outer, inner):
    """Spec 05, test 3."""
    blocks, found = chain(8, nn.BatchNorm1d), []
    before = copy.deepcopy(blocks.state_dict())
    halves = [functools.partial(run_half, half, checkpointing=inner) for half in (blocks[:4], blocks[4:])]
    for outer_policy, steps in ((outer, halves), ("none", blocks)):
        blocks.load_state_dict(before)
        torch.manual_seed(0)
        x = tokens()
        loss = run_blocks(steps, x, checkpointing=outer_policy).square().sum()
        gradients = torch.autograd.grad(loss, [x, *blocks.parameters()])
        found.append([loss, *gradients, *(buffer.clone() for buffer in blocks.buffers())])
    assert_equal(*found)


def run_half(blocks, x, checkpointing):
    return run_blocks(blocks, x, checkpointing=checkpointing)


class Mixed(nn.Module):
    """Takes and gives what is no tensor, too."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, parts, nothing, power, *, mask=None):
        assert nothing is None
        out = F.dropout(torch.tanh(self.linear(parts["x"] + parts["more"][0])), 0.3) ** power
        return {"x": out if mask is None else out * mask, "more": (parts["x"],), "name": "mixed"}


@pytest.mark.parametrize("needs_gradient", [True, False])
@every_policy
def test_inputs_and_outputs_may_be_nested_named_or_no_tensors_and_need_no_gradient(policy, needs_gradient):
    """Spec 05, tests 4 and 5, checklist 4: where no input requires a gradient, the weights get theirs all the same."""
    torch.manual_seed(0)
    blocks, found = nn.ModuleList(Mixed() for _ in range(3)), []
    for checkpointing in (policy, False):
        torch.manual_seed(1)
        x, more, mask = torch.randn(3, 5, 4)
        x.requires_grad_(needs_gradient)
        result = run_blocks(blocks, {"x": x, "more": (more,), "name": "first"}, None, 2, checkpointing=checkpointing, mask=mask)
        assert result["name"] == "mixed"
        (result["x"].sum() + result["more"][0].sum()).backward()
        found.append([result["x"], *result["more"], *([x.grad] if needs_gradient else []), *(value.grad for value in blocks.parameters())])
        blocks.zero_grad()
    assert_equal(*found)


@dataclass
class Pack:
    tokens: torch.Tensor
    lengths: tuple = (3, 5)


@dataclass(slots=True)
class SlottedPack:
    tokens: torch.Tensor
    lengths: tuple = (3, 5)


@pytest.mark.parametrize("kind", [Pack, SlottedPack])
def test_tensors_of_a_dataclass_are_kept_and_watched_as_others_are(kind):
    block = Block()

    def on_pack(pack):
        return kind(block(pack.tokens), pack.lengths)

    pack = kind(tokens() * 1)
    run = functools.partial(run_blocks, [on_pack, on_pack], pack, checkpointing="every")
    held, output = held_by(run, block.parameters())
    assert held == 2 * pack.tokens.nbytes
    assert torch.autograd.grad(output.tokens.sum(), pack.tokens)[0].any()
    output = run()
    with torch.no_grad():
        pack.tokens.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.tokens.sum().backward()


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
@every_policy
def test_autocast_holds_for_the_second_pass(policy, inside):
    """Spec 05, test 6."""
    blocks, found, types = chain(4), [], []

    def in_bfloat16(x, block):
        with torch.autocast("cpu", torch.bfloat16):
            return block(x)

    chained = [functools.partial(in_bfloat16, block=block) for block in blocks] if inside else blocks
    blocks[0].wide.register_forward_hook(lambda _module, _inputs, output: types.append(output.dtype))
    for checkpointing in (policy, "none"):
        torch.manual_seed(0)
        x = tokens()
        with contextlib.nullcontext() if inside else torch.autocast("cpu", torch.bfloat16):
            output = run_blocks(chained, x, checkpointing=checkpointing)
        found.append([output, *torch.autograd.grad(output.float().square().sum(), [x, *blocks.parameters()])])
    assert types == [torch.bfloat16] * 3
    assert_equal(*found)


@every_policy
def test_autocast_and_a_block_that_is_used_twice(policy):
    """Autocast casts a weight once and remembers it; a second pass, of one block, casts it anew. `selective` does without that memory."""
    blocks, found = chain(3), []
    for checkpointing in (policy, "none"):
        blocks.zero_grad()
        torch.manual_seed(0)
        x = tokens()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=policy != "selective" or checkpointing == policy):
            output = run_blocks([*blocks, blocks[0]], run_blocks(blocks, x, checkpointing=checkpointing), checkpointing=checkpointing)
        found.append([output, *torch.autograd.grad(output.float().square().sum(), [x, *blocks.parameters()])])
    assert_equal(*found)


@every_policy
def test_an_exception_in_the_second_pass_leaves_generator_and_statistics_as_they_were(policy):
    """Spec 05, test 7."""
    blocks = chain(4, nn.BatchNorm1d)
    output = run_blocks(blocks, tokens(), checkpointing=policy)

    def fail(*_):
        raise KeyError("a block that fails")

    blocks[0].narrow.register_forward_pre_hook(fail)
    state, buffers = torch.get_rng_state(), copy.deepcopy(dict(blocks.named_buffers()))
    with pytest.raises(KeyError, match="a block that fails"):
        output.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(list(blocks.buffers()), list(buffers.values()))
    assert [block.norm.momentum for block in blocks] == [0.1] * 4


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
@several_times
def test_a_graph_may_be_gone_through_backwards_twice(policy, norm):
    """Spec 05, test 8."""
    blocks, x = chain(4, norm), tokens()
    output = run_blocks(blocks, x, checkpointing=policy).square().sum()
    first = torch.autograd.grad(output, [x, *blocks.parameters()], retain_graph=True)
    assert_equal(torch.autograd.grad(output, [x, *blocks.parameters()]), first)
    assert norm is nn.LayerNorm or [block.norm.num_batches_tracked.item() for block in blocks] == [1] * 4


@several_times
def test_gradients_of_gradients_are_the_same(policy):
    """Spec 05, test 13: largest difference 0.0."""
    blocks, found = chain(3), []
    for checkpointing in (policy, "none"):
        torch.manual_seed(0)
        x = tokens()
        (slope,) = torch.autograd.grad(run_blocks(blocks, x, checkpointing=checkpointing).square().sum(), x, create_graph=True)
        found.append([slope, *torch.autograd.grad(slope.square().sum(), [x, *(block.wide.weight for block in blocks)])])
    assert_equal(*found)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
@pytest.mark.parametrize("create_graph", [False, True], ids=["again", "of gradients"])
def test_with_a_selective_policy_a_second_time_backwards_is_an_error(create_graph, norm):
    """torch lets go of what was kept as soon as it was used."""
    x = tokens()
    output = run_blocks(chain(2, norm), x, checkpointing="selective").square().sum()
    (slope,) = torch.autograd.grad(output, x, retain_graph=True, create_graph=create_graph)
    with pytest.raises(RuntimeError, match="backward an extra time"):
        (slope.square().sum() if create_graph else output).backward()


# ----------------------------------------------------------------------------------------------------- batch normalisation

def convolutions(momentum=0.1, kind=nn.BatchNorm2d):
    torch.manual_seed(0)
    norm = kind(8, momentum=momentum)
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Conv2d(8, 3, 3))


class Method(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def run(self, x):
        return self.block(x)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving average", "mean of all batches"])
@pytest.mark.parametrize("form", ["module", "partial", "method"])
@every_policy
def test_running_statistics_are_updated_once(policy, form, momentum, kind):
    """Spec 05, test 9 and checklist 6: by the first pass alone; `num_batches_tracked` is 2 after two steps, not 4."""
    plain = nn.ModuleList(convolutions(momentum, kind) for _ in range(2))
    ours = copy.deepcopy(plain)
    forms = {"module": lambda block: block, "partial": lambda block: functools.partial(lambda block, x: block(x), block),
             "method": lambda block: Method(block).run}
    for seed in range(2):
        results = []
        for blocks, checkpointing in ((ours, policy), (plain, False)):
            images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
            torch.manual_seed(1)
            output = run_blocks(list(map(forms[form], blocks)), images, checkpointing=checkpointing)
            gradients = torch.autograd.grad(output.square().sum(), list(blocks.parameters()))
            results.append([output, *gradients, *blocks.buffers()])
        assert_equal(*results)
    assert [block[1].num_batches_tracked.item() for block in ours] == [2, 2]
    assert [block[1].momentum for block in ours] == [momentum] * 2
    assert ours.state_dict().keys() == plain.state_dict().keys()


# -------------------------------------------------------------------------------------------------------- what is kept, and run

@pytest.mark.parametrize("policy, again", [("none", 0), ("every", 16), ("sqrt", 16 - 16 // 4), ("selective", 16)])
def test_blocks_run_again_as_often_as_the_policy_says(policy, again):
    """Spec 05, test 14 and checklist 2: of n = 16, 4 segments: 16 calls for none, 32 for every, 28 for sqrt (2 n - n / k)."""
    blocks = chain(16)
    calls = count_calls(blocks)
    output = run_blocks(blocks, tokens(), checkpointing=policy)
    assert len(calls) == 16
    output.sum().backward()
    assert len(calls) == 16 + again


@pytest.mark.parametrize("length", [4, 16, 64])
def test_sqrt_keeps_no_more_than_segments_and_one_of_them(length):
    """Spec 05, test 10: blocks that keep one activation each; 3, 7 and 15 of them where the bound is 5, 9 and 17."""
    x, segments = tokens(), math.isqrt(length)
    unit = x.untyped_storage().nbytes()
    held, _ = held_by(lambda: run_blocks([nn.Tanh()] * length, x, checkpointing="sqrt"))
    assert held == (segments - 1 + length // segments) * unit
    assert held <= (segments + length / segments + 1) * unit
    assert held_by(lambda: run_blocks([nn.Tanh()] * length, x, checkpointing="none"))[0] == length * unit


@pytest.mark.parametrize("policy, exponent", [("none", 1.0), ("every", 1.0), ("sqrt", 0.5)])
def test_what_is_kept_grows_as_it_should(policy, exponent):
    """Spec 05, checklist 3: residual blocks with dropout, n = 4, 16, 64: fitted exponents 1.000 for none and every, which keeps n inputs
    and nothing else, 0.511 for sqrt."""
    lengths, sizes = (4, 16, 64), []
    for length in lengths:
        blocks, x = chain(length), tokens()
        sizes.append(held_by(functools.partial(run_blocks, blocks, x, checkpointing=policy), blocks.parameters())[0])
        if policy == "every":
            assert sizes[-1] == length * x.untyped_storage().nbytes()
    x, y = torch.tensor(lengths).double().log(), torch.tensor(sizes).double().log()
    fitted = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert fitted.item() == pytest.approx(exponent, abs=0.1 if policy == "sqrt" else 0.001)


@pytest.mark.parametrize("policy, megabytes", [("none", 68.95), ("every", 6.25), ("sqrt", 18.41), ("selective", 37.5)])
def test_a_chain_keeps_what_others_measured(policy, megabytes):
    """Spec 05 (b), in MiB: 16 residual blocks of 64 channels, 32 x 50 tokens; torch's own checkpoints keep 6.25, its checkpoint_sequential
    in 4 segments 18.41. With torch before 2.14, what is kept selectively does not show."""
    if policy == "selective" and torch.__version__ < "2.14":
        pytest.skip("not to be seen")
    blocks, x = nn.ModuleList(Block(channels=64) for _ in range(16)), torch.randn(32, 50, 64, requires_grad=True)
    held, _ = held_by(lambda: run_blocks(blocks, x, checkpointing=policy), blocks.parameters())
    assert held / 2**20 == pytest.approx(megabytes, abs=0.01)


def test_nothing_but_the_inputs_is_kept_until_the_backward_pass():
    module, images = convolutions(), torch.randn(2, 3, 8, 8, requires_grad=True)
    assert held_by(lambda: recompute(module, images))[0] == images.nbytes
    assert held_by(lambda: module(images), module.parameters())[0] > 2 * images.nbytes


@every_policy
@pytest.mark.parametrize("mode", ["no_grad", "eval"])
def test_without_gradients_and_in_eval_mode_it_is_an_ordinary_call(policy, mode):
    """Spec 05, test 11 and checklist 7: no hooks on what is saved, and no second run."""
    blocks = chain(4)
    calls = count_calls(blocks)
    if mode == "eval":
        blocks.eval()
    with torch.no_grad() if mode == "no_grad" else contextlib.nullcontext():
        outputs = run_blocks(blocks, tokens(), checkpointing=policy), recompute(blocks[0], tokens(), checkpointing=policy)
    if mode == "eval":
        sum(output.sum() for output in outputs).backward()
    assert [output.requires_grad for output in outputs] == [mode == "eval"] * 2
    assert len(calls) == 5


def test_frozen_blocks_at_the_beginning_run_once_and_are_no_part_of_the_chain():
    blocks = chain(7)
    for block in blocks[:2]:
        block.eval().requires_grad_(False)
    calls = [count_calls([block]) for block in blocks]
    run_blocks(blocks, tokens(), checkpointing="sqrt").sum().backward()
    assert [len(call) for call in calls] == [1, 1, 2, 2, 2, 2, 1]       # segments of 2, 2 and 1


class OpCount(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep, again", [(("matmul",), {"aten::addmm": 0, "aten::gelu": 3}),
                                         (("convolution",), {"aten::addmm": 6, "aten::gelu": 3}),
                                         (("aten::gelu",), {"aten::addmm": 6, "aten::gelu": 0})])
def test_kept_ops_run_once_and_the_others_again(keep, again):
    blocks = chain(3)
    for block in blocks:                                     # else the second pass ends before its last layer, whose output is not needed
        block.dropout = nn.Tanh()
    output = run_blocks(blocks, tokens(), checkpointing={"policy": "selective", "keep": keep})
    with OpCount() as ops:
        output.sum().backward()
    assert {name: ops.names.count(name) for name in again} == again


def test_an_op_that_drops_out_is_never_kept():
    """Kept, it would not draw in the second pass, and the dropout after it would draw its numbers."""
    @torch.library.custom_op("visionkit_tests::noisy", mutates_args=())
    def noisy(x: torch.Tensor, dropout_p: float) -> torch.Tensor:
        return torch.dropout(x, dropout_p, True) if dropout_p else x.clone()

    noisy.register_autograd(lambda _ctx, gradient: (gradient, None))

    class Noisy(Block):
        def forward(self, x):
            return super().forward(noisy(x, self.dropout_p))

    for dropout_p, kept in ((0.5, False), (0.0, True)):
        torch.manual_seed(0)
        blocks = nn.ModuleList([Noisy(), Noisy()])
        for block in blocks:
            block.dropout_p = dropout_p
        assert_equal(step(blocks, {"policy": "selective", "keep": "visionkit_tests::noisy"}), step(blocks, "none"))
        output = run_blocks(blocks, tokens(), checkpointing={"policy": "selective", "keep": "visionkit_tests::noisy"})
        with OpCount() as ops:
            output.sum().backward()
        assert ops.names.count("visionkit_tests::noisy") == (0 if kept else 2)


# ------------------------------------------------------------------------------------------------------------------ misuse

@every_policy
def test_an_input_changed_in_place_afterwards_is_an_error(policy):
    blocks = chain(4)
    features = run_blocks(blocks, tokens() * 1, checkpointing=policy, outputs_of=(1, 3))
    with torch.no_grad():
        features[0].mul_(2)                                  # the third block's input
    with pytest.raises(RuntimeError, match="modified by an inplace operation|mutated"):
        features[1].sum().backward()


@several_times
def test_a_block_that_computes_something_else_the_second_time_is_an_error(policy):
    """Spec 05, checklist 5: another number of saved tensors."""
    class Fickle(Block):
        runs = 0

        def forward(self, x):
            self.runs += 1
            return super().forward(x) if self.runs == 1 else x * 2

    blocks = nn.ModuleList([Fickle(), Block()])
    output = run_blocks(blocks, tokens(), checkpointing=policy)
    with pytest.raises(CheckpointError, match="different number of tensors"):
        output.sum().backward()


class Shifting(nn.Module):
    """Its second run is on twice as many tokens, or has other numbers."""

    def __init__(self, second):
        super().__init__()
        self.linear, self.second, self.runs = nn.Linear(CHANNELS, CHANNELS), second, 0

    def forward(self, x):
        self.runs += 1
        return torch.tanh(self.linear(x if self.runs == 1 else self.second(x))).sum(0, keepdim=True)


@pytest.mark.parametrize("policy, error, message", [("every", CheckpointError, "have different metadata"),
                                                    ("selective", RuntimeError, "not found in storage")])
def test_other_shapes_or_ops_the_second_time_are_an_error(policy, error, message):
    """Spec 05, checklist 5: another shape of saved tensors; with a selective policy, other ops."""
    output = run_blocks([Shifting(lambda x: torch.cat([x, x]))], tokens(), checkpointing=policy)
    with pytest.raises(error, match=message):
        output.sum().backward()


def test_other_values_the_second_time_are_not_noticed():
    """As `recompute` says: a block has to compute the same twice."""
    x, found = tokens(), []
    for policy in ("every", "none"):
        torch.manual_seed(0)
        found.append(torch.autograd.grad(run_blocks([Shifting(lambda x: x + 1)], x, checkpointing=policy).sum(), x)[0])
    assert not torch.allclose(*found)


def test_what_is_kept_must_not_be_changed_in_place():
    block = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.ReLU(inplace=True))
    run_blocks([block], tokens(), checkpointing="every").sum().backward()
    output = run_blocks([block], tokens(), checkpointing="selective")
    with pytest.raises(RuntimeError, match="has been mutated"):
        output.sum().backward()


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
@pytest.mark.parametrize("policy", ["every", "selective"])
def test_a_compiled_chain_gives_the_same_and_updates_statistics_once(policy, norm):
    found, expected = step_of_compiled(policy, norm, backend="aot_eager"), step_of_compiled(policy, norm, backend=None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def step_of_compiled(policy, norm, backend):
    """Output, gradients and buffers of a step of two blocks without dropout, compiled or, without a backend, as they are."""
    blocks = chain(2, norm)
    for block in blocks:
        block.dropout.p = 0.0
    run = functools.partial(run_blocks, blocks, checkpointing=policy)
    torch._dynamo.reset()
    x = tokens()
    output = torch.compile(run, backend=backend)(x) if backend else run(x)
    output.square().sum().backward()
    return [output, x.grad, *(parameter.grad for parameter in blocks.parameters()), *blocks.buffers()]
