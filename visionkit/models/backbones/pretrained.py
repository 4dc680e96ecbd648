"""Weights of a trained network for one part of a model, whatever the model was in which that part was trained."""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from visionkit.registry import ConfigError, did_you_mean

_COUNT = "num_batches_tracked"                               # of a batch normalisation; many checkpoints do without


class Pretrained(NamedTuple):
    """Where a part's first weights are."""
    checkpoint: str                 # a file or an address
    prefix: str | None = None       # what stands before the part's names there; None: it is found


def pretrained_from(pretrained: str | None, init_cfg: Mapping | None = None) -> Pretrained | None:
    """What a backbone's arguments `pretrained` and `init_cfg` say; None where both are.

    Args:
        pretrained: a file or an address.
        init_cfg: the same in mmengine's form, `dict(type="Pretrained", checkpoint=..., prefix="backbone.")`; `prefix` may be left out.

    Raises:
        ConfigError: both are given, or `init_cfg` asks for something else than a checkpoint.
    """
    if init_cfg is None:
        return None if pretrained is None else Pretrained(pretrained)
    if pretrained is not None:
        raise ConfigError(f"pretrained={pretrained!r} and init_cfg say the same; leave one out", ("init_cfg",))
    given = dict(init_cfg)
    if given.pop("type", None) != "Pretrained" or not isinstance(given.get("checkpoint"), str):
        raise ConfigError(f"a backbone takes init_cfg=dict(type='Pretrained', checkpoint=...), got {dict(init_cfg)}; other ways to begin "
                          f"are arguments of the backbone", ("init_cfg",))
    for key in given:
        if key not in Pretrained._fields:
            raise ConfigError(f"Pretrained has no argument {key!r}.{did_you_mean(key, Pretrained._fields)}", ("init_cfg", key))
    return Pretrained(**given)


class Trunk(nn.Module):
    """A backbone that may start from a checkpoint.

    Args:
        pretrained: a checkpoint that `init_weights` loads before training, of this network alone or of any model with one: a file, or an
            address such as `torchvision://resnet50`. It must hold every weight, see `load_part`.
        init_cfg: the same as `dict(type="Pretrained", checkpoint=..., prefix=...)`, for a checkpoint that holds several such networks.
    """

    def __init__(self, pretrained: str | None = None, init_cfg: Mapping | None = None) -> None:
        super().__init__()
        self.pretrained = pretrained_from(pretrained, init_cfg)

    def init_weights(self) -> None:
        """Load `pretrained`; the runner calls this once before training.

        Raises:
            ConfigError: the checkpoint is of another network.
        """
        if self.pretrained is not None:
            checkpoint = CheckpointLoader.load_checkpoint(self.pretrained.checkpoint, map_location="cpu")
            load_part(self, checkpoint.get("state_dict", checkpoint), self.pretrained.checkpoint, self.pretrained.prefix)


def load_part(part: nn.Module, state_dict: Mapping[str, Tensor], source: str, prefix: str | None = None) -> str:
    """Fill the whole of `part` from a checkpoint of any model that has such a part, and log what was loaded and left out.

    The part's names stand in the checkpoint under a prefix, such as none at all, `backbone.` or `module.student.backbone.`: the only one
    under which all of them stand. What stands beside the part is left out, and so is what stands under the prefix and begins with a
    name that the part does not have, such as `fc` or a stage that is not built. But a deeper network of the same kind is an error.

    Args:
        part: a module; what its names contain of its class's `optional_weights`, if it has that attribute, a checkpoint may lack.
        state_dict: the checkpoint's tensors.
        source: what errors and the log call the checkpoint.
        prefix: given, no other is looked for.

    Returns:
        the prefix.

    Raises:
        ConfigError: no prefix fits, or several do, or a tensor has another shape. Nothing is loaded then.
    """
    kind, own = type(part).__name__, part.state_dict()
    optional = getattr(part, "optional_weights", ())
    needed = {name for name in own if not any(piece in name for piece in (*optional, _COUNT))}
    prefix = _find_prefix(needed, state_dict, source, kind, prefix)
    children = {name.partition(".")[0] for name in own}
    below = {key[len(prefix):]: value for key, value in state_dict.items() if key.startswith(prefix)}
    mine = {name: value for name, value in below.items() if name.partition(".")[0] in children}
    if any(piece in name for piece in optional for name in mine):
        needed = {name for name in own if not name.endswith(_COUNT)}                         # all of it, or nothing
    misshapen = [name for name in own if name in mine and mine[name].shape != own[name].shape]
    problems = (
        _listing("missing in the checkpoint", sorted(needed - mine.keys()))
        + _listing(f"of another shape ({kind} <- checkpoint)",
                   [f"{name} {tuple(own[name].shape)} <- {tuple(mine[name].shape)}" for name in misshapen])
        + _listing(f"not in this {kind}", [name for name in mine if name not in own]))
    if problems:
        raise ConfigError(f"{source} does not hold the weights of this {kind}. Of what is there under the prefix {prefix!r}:\n{problems}"
                          f"Is it of another depth or width?")
    part.load_state_dict(mine)
    print_log(f"{kind}: loaded {len(mine)} tensors of {source}, whose names there have the prefix {prefix!r}; "
              f"left out {len(state_dict) - len(mine)}", logger="current")
    return prefix


def _find_prefix(needed: set[str], state_dict: Mapping[str, Tensor], source: str, kind: str, wanted: str | None) -> str:
    """The prefix that is `wanted`, or the only one under which all names stand."""
    found: Counter[str] = Counter()
    for key in state_dict:
        pieces = key.split(".")
        for cut in range(len(pieces)):
            if ".".join(pieces[cut:]) in needed:
                found["".join(f"{piece}." for piece in pieces[:cut])] += 1
    if wanted is not None:
        wanted = f"{wanted}." if wanted and not wanted.endswith(".") else wanted
        if wanted not in found:
            raise ConfigError(f"{source} holds nothing of a {kind} under the prefix {wanted!r}.{did_you_mean(wanted, found)}")
        return wanted
    whole = sorted(prefix for prefix, count in found.items() if count == len(needed))
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise ConfigError(f"{source} holds the weights of a {kind} {len(whole)} times, under {', '.join(map(repr, whole))}; say which "
                          f"with the backbone's init_cfg=dict(type='Pretrained', checkpoint=..., prefix=...)")
    nearest = [f"under {prefix!r} {count} of {len(needed)}, without {min(name for name in needed if prefix + name not in state_dict)}"
               for prefix, count in found.most_common(3)]
    raise ConfigError(f"{source} does not hold the weights of this {kind}: under no prefix are all of its names. Nearest: "
                      f"{'; '.join(nearest) or 'none'}. The first names there: {', '.join(list(state_dict)[:4]) or 'none'}")


def _listing(title: str, lines: list[str], most: int = 6) -> str:
    if not lines:
        return ""
    more = f", and {len(lines) - most} more" if len(lines) > most else ""
    return f"  {title} ({len(lines)}): {', '.join(lines[:most])}{more}\n"
