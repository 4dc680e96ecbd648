"""Gradient checkpointing: keep the inputs of blocks instead of their activations, and compute those again in the backward pass (Chen et al.
2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174).

Outputs, gradients and random numbers stay the same to the bit, and so do the names in a state dict: nothing is wrapped.
"""
from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from visionkit.registry import ConfigError, did_you_mean

POLICIES = ("none", "every", "sqrt", "selective")
# What `keep` may name besides single ops: those whose outputs take long to compute, by their names in torch.ops.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "matmul": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "convolution": ("aten::convolution", "visionkit::deform_conv2d"),
    "attention": ("aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
                  "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
                  "aten::_scaled_dot_product_fused_attention_overrideable", "visionkit::flash_attention", "visionkit::varlen_attention",
                  "visionkit::ms_deform_attn"),
}
# From torch 2.14 on, what is kept selectively can be seen by those who watch what is saved, such as `torch.autograd.graph.save_on_cpu`.
_SEEN = {"respect_saved_tensors_hooks": True} if "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters else {}


@dataclass(frozen=True)
class Checkpointing:
    """Which activations of a chain of n blocks are computed again.

    Attributes:
        policy: `none`: all are kept. `every`: the input of each block is kept, and each block runs twice. `sqrt`: the chain is cut into
            about sqrt(n) segments, the input of each is kept, and all but the last segment run twice: what is kept grows with sqrt(n).
            `selective`: as `every`, but the outputs of some ops are kept too, and those ops run once.
        keep: the ops that `selective` keeps, names of `GROUPS` or of single ops such as `aten::_softmax`; None: those of all groups. Where
            an op drops out at random, it is computed again all the same, so that the random numbers stay in step.

    Raises:
        ConfigError: an unknown policy; what is no op, or one that is made of others, which alone are run.
    """
    policy: str = "none"
    keep: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_policy(self.policy, self.policy)
        keep = (self.keep,) if isinstance(self.keep, str) else self.keep
        if keep is not None and not isinstance(keep, (list, tuple)):
            raise ConfigError(f"keep is a name, or a list of names, of {', '.join(GROUPS)} or of ops; got {keep!r}",
                              ("checkpointing", "keep"))
        if keep and self.policy != "selective":
            raise ConfigError(f"only the policy 'selective' keeps the outputs of chosen ops; with {self.policy!r} leave keep={keep!r} out",
                              ("checkpointing", "keep"))
        if keep is None:
            keep = GROUPS if self.policy == "selective" else ()
        for name in keep:
            _check_kept(name)
        object.__setattr__(self, "keep", tuple(keep))        # frozen otherwise

    @classmethod
    def of(cls, setting: Checkpointing | bool | str | Mapping | None) -> Checkpointing:
        """What stands in a config as `checkpointing`.

        Args:
            setting: False or None for `none`, True for `every`, a policy's name, or `dict(policy=...)`, for `selective` with `keep`.

        Raises:
            ConfigError: names the nearest policy, key or group.
        """
        if isinstance(setting, cls):
            return setting
        if setting is None or isinstance(setting, bool):
            return cls("every" if setting else "none")
        given = {"policy": setting} if isinstance(setting, str) else dict(setting) if isinstance(setting, Mapping) else {}
        for key in given:
            if key not in ("policy", "keep"):
                raise ConfigError(f"checkpointing has no {key!r}.{did_you_mean(key, ('policy', 'keep'))} It takes: policy, keep.",
                                  ("checkpointing", key))
        _check_policy(given.get("policy"), setting)
        return cls(**given)

    def __bool__(self) -> bool:
        return self.policy != "none"


def run_blocks(blocks: Iterable[Callable], x: Any, *others: Any, checkpointing: Checkpointing | bool | str | Mapping | None,
               outputs_of: Collection[int] | None = None, **keywords: Any) -> Any:
    """`x` through a chain of blocks, each called as `block(x, *others, **keywords)` with what the one before gave.

    Args:
        blocks: modules, or functions, see `recompute`. Those at the beginning that are in eval mode, such as frozen ones, always run once.
        x: what the first block takes: a tensor, or several in a tuple, dict or dataclass that every block takes and gives.
        others: what all blocks take besides.
        checkpointing: see `Checkpointing.of`. Without gradients, and in eval mode, it makes no difference.
        outputs_of: numbers of the blocks whose outputs are wanted, from 0; they are kept whatever the policy. None: the last one's.
        keywords: what all blocks take besides, by name.

    Returns:
        what the last block gives; with `outputs_of`, a tuple of what those blocks give, in their order in the chain.

    Raises:
        ValueError: `outputs_of` names a block that is not there.
    """
    checkpointing, blocks = Checkpointing.of(checkpointing), list(blocks)
    if not set(outputs_of or ()) <= set(range(len(blocks))):
        raise ValueError(f"outputs_of takes numbers of blocks, 0 to {len(blocks) - 1}; got {sorted(outputs_of)}")
    outputs: list[Any] = []
    start = 0
    for length, again in _segments(blocks, checkpointing):
        stop = start + length
        wanted = [] if outputs_of is None else sorted({index - start for index in outputs_of if start <= index < stop})
        segment = _Segment(blocks[start:stop], wanted)
        x, found = recompute(segment, x, *others, checkpointing=checkpointing if again else False, **keywords)
        outputs += found
        start = stop
    return x if outputs_of is None else tuple(outputs)


def recompute(block: Callable, *inputs: Any, checkpointing: Checkpointing | bool | str | Mapping | None = True, **keywords: Any) -> Any:
    """`block(*inputs, **keywords)`, keeping only the inputs for the backward pass, which runs `block` again.

    The same outputs, gradients and random numbers, for one more forward pass. Running statistics of batch normalisation are updated once,
    by the first pass; other side effects, such as those of hooks, happen twice. Without gradients, and in eval mode, it is an ordinary
    call. Gradients reach the block's weights also where no input requires one.

    Args:
        block: a module, or a function that computes the same whenever it is called. Of a function the modules are known that it is a
            method of or that are among the arguments of a `functools.partial`; batch normalisation elsewhere is updated twice.
        inputs: anything; tensors in tuples, lists, dicts and dataclasses are kept as well as those by themselves.
        checkpointing: see `Checkpointing.of`; for a single block `sqrt` is `every`. With `selective` a graph can be gone through backwards
            once only; a second time, as for gradients of gradients, is an error. Under autocast its blocks do without the memory of casts,
            so that gradients of a weight that several blocks share are added up in float32.
        keywords: further inputs, by name.

    Inside `torch.compile` a block with batch normalisation, and any block with `selective`, runs uncompiled.

    Raises:
        RuntimeError: in the backward pass, where an input was changed in place since.
        torch.utils.checkpoint.CheckpointError: in the backward pass, where what the block saves for it differs the second time in number,
            shape, dtype or device; with `selective` a RuntimeError, where other ops run. Other values are not noticed and
            make wrong gradients: only torch's random numbers are repeated, not those of numpy or `random`.
    """
    checkpointing = Checkpointing.of(checkpointing)
    if not checkpointing or not torch.is_grad_enabled() or not _in_training(block):
        return block(*inputs, **keywords)
    leaves, form = tree_flatten((inputs, keywords))          # so that torch sees all tensors: their devices, and changes in place
    inside = [tensor for leaf in leaves if is_dataclass(leaf) and not isinstance(leaf, type)
              for tensor in tree_leaves([getattr(leaf, field.name) for field in fields(leaf)]) if isinstance(tensor, torch.Tensor)]

    def call(*leaves_and_inside: Any) -> Any:
        positional, named = tree_unflatten(list(leaves_and_inside[:len(leaves)]), form)
        return block(*positional, **named)

    norms = [module for module in _modules(block) if isinstance(module, _BatchNorm)]
    if checkpointing.policy == "selective" or norms:
        from visionkit.ops.uncompiled import checkpoint_with
    if checkpointing.policy == "selective":
        devices = {tensor.device.type for tensor in (*leaves, *inside) if isinstance(tensor, torch.Tensor)}
        contexts = functools.partial(_selective_contexts, _keeps(checkpointing.keep), norms, devices)
        return checkpoint_with(contexts, call, *leaves, *inside, **_SEEN)
    if norms:
        return checkpoint_with(lambda: (nullcontext(), _StatisticsKept(norms)), call, *leaves, *inside)
    return checkpoint(call, *leaves, *inside, use_reentrant=False)


class _Segment:
    """Blocks that run one after the other, to the output of the last and those of `wanted`."""

    def __init__(self, blocks: Sequence[Callable], wanted: Sequence[int]) -> None:
        self.blocks = blocks
        self.wanted = wanted

    def __call__(self, x: Any, *others: Any, **keywords: Any) -> tuple[Any, list[Any]]:
        outputs = []
        for index, block in enumerate(self.blocks):
            x = block(x, *others, **keywords)
            if index in self.wanted:
                outputs.append(x)
        return x, outputs


def _segments(blocks: Sequence[Callable], checkpointing: Checkpointing) -> Iterator[tuple[int, bool]]:
    """The lengths of the segments of a chain, and whether each is computed again."""
    if not checkpointing or not torch.is_grad_enabled():
        yield len(blocks), False
        return
    frozen = next((index for index, block in enumerate(blocks) if _in_training(block)), len(blocks))
    left = len(blocks) - frozen
    yield frozen, False
    if checkpointing.policy != "sqrt":
        yield from [(1, True)] * left
        return
    segments = math.ceil(math.sqrt(left))
    for index in range(segments):                            # the longer ones first: the last one's activations are there from the start
        yield -(-(left - index) // segments), index < segments - 1


def _in_training(block: Callable) -> bool:
    modules = _owners(block)
    return not modules or any(module.training for module in modules)


def _modules(block: Callable) -> Iterator[nn.Module]:
    return (module for owner in _owners(block) for module in owner.modules())


def _owners(block: Any) -> list[nn.Module]:
    """The modules that a block is or runs, as far as it shows."""
    if isinstance(block, nn.Module):
        return [block]
    if isinstance(block, _Segment):
        parts: Iterable[Any] = block.blocks
    elif isinstance(block, functools.partial):
        parts = (block.func, *block.args, *block.keywords.values())
    else:
        owner = getattr(block, "__self__", None)
        parts = [owner] if isinstance(owner, nn.Module) else []
    return [owner for part in parts for owner in _owners(part)]


class _StatisticsKept(AbstractContextManager):
    """Leaves running statistics as the first pass made them: what runs inside adds nothing to them. May be entered again after it ended."""

    def __init__(self, norms: Sequence[_BatchNorm]) -> None:
        self.norms = norms
        self.kept: list[tuple[_BatchNorm, float | None, torch.Tensor | None]] = []

    def __enter__(self) -> None:
        active = [norm for norm in self.norms if norm.training and norm.track_running_stats]
        self.kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in active]
        for norm in active:
            count = norm.num_batches_tracked
            norm.momentum, norm.num_batches_tracked = 0.0, None if count is None else count.clone()

    def __exit__(self, *_: object) -> None:
        for norm, momentum, count in self.kept:
            norm.momentum, norm.num_batches_tracked = momentum, count


class _Both(AbstractContextManager):
    """Two contexts as one, which may be entered again after it ended."""

    def __init__(self, *contexts: AbstractContextManager) -> None:
        self.contexts = contexts

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context)
            self.leave = stack.pop_all().__exit__

    def __exit__(self, *error: Any) -> None:
        self.leave(*error)


def _selective_contexts(keep: Callable, norms: Sequence[_BatchNorm], devices: Collection[str],
                        ) -> tuple[AbstractContextManager, AbstractContextManager]:
    """The contexts of the first pass and of the second, which are to run the same ops. Autocast remembers casts of weights, so that a
    weight used before would be cast in the second pass alone; here it does not."""
    first, again = create_selective_checkpoint_contexts(keep)
    casts = [torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False) for device in sorted(devices)
             if torch.is_autocast_enabled(device)]
    statistics = [_StatisticsKept(norms)] if norms else []
    return _Both(*casts, first) if casts else first, _Both(*casts, *statistics, again) if casts or statistics else again


def _keeps(keep: Sequence[str]) -> Callable[..., CheckpointPolicy]:
    """The policy, as torch asks for it at every op."""
    names = frozenset(op for name in keep for op in GROUPS.get(name, (name,)))

    def policy(_: Any, op: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
        if not hasattr(op, "_schema") or op._schema.name not in names or _draws(op, arguments, keywords):
            return CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE
    return policy


def _draws(op: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> bool:
    """Whether an op draws random numbers; left out of the second pass, it would leave the others to those who draw after it."""
    given = dict(zip((argument.name for argument in op._schema.arguments), arguments, strict=False)) | dict(keywords)
    if any(argument.name == "dropout_p" for argument in op._schema.arguments):
        return given.get("dropout_p", 0.0) > 0
    return torch.Tag.nondeterministic_seeded in op.tags


def _check_policy(policy: Any, setting: Any) -> None:
    if not isinstance(policy, str) or policy not in POLICIES:
        raise ConfigError(f"checkpointing is True, False or dict(policy=...) with one of {', '.join(POLICIES)}; got {setting!r}."
                          f"{did_you_mean(policy, POLICIES) if isinstance(policy, str) else ''}", ("checkpointing",))


def _check_kept(name: Any) -> None:
    """Refuse what the policy would never see: it is asked for the ops that have a kernel, not for those that are made of them."""
    if isinstance(name, str) and name in GROUPS:
        return
    space, colons, short = name.partition("::") if isinstance(name, str) else ("", "", "")
    op = getattr(getattr(torch.ops, space), short, None) if colons and short else None
    if not isinstance(op, torch._ops.OpOverloadPacket):
        raise ConfigError(f"keep takes {', '.join(GROUPS)}, or ops by their full names such as 'aten::_softmax'; got {name!r}."
                          f"{did_you_mean(str(name), GROUPS)}", ("checkpointing", "keep"))
    overloads = [f"{name}.{overload}" if overload != "default" else name for overload in op.overloads() if "out" not in overload]
    if all(torch._C._dispatch_has_kernel_for_dispatch_key(overload, "CompositeImplicitAutograd") for overload in overloads):
        group = next((group for part, group in (("conv", "convolution"), ("attention", "attention"), ("linear", "matmul"),
                                                ("matmul", "matmul"), ("einsum", "matmul")) if part in short), None)
        raise ConfigError(f"{name!r} is made of other ops, and only those can be kept; "
                          + (f"take the group {group!r}" if group else "name them, such as 'aten::_softmax' for a softmax"),
                          ("checkpointing", "keep"))
