"""From the tokens of a vision encoder to those of a language model (Kimi Team 2025, Kimi-VL, arXiv:2504.07491, sec. 2.1)."""
from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import nn

from visionkit.registry import NECKS
from visionkit.structures import PackedSequence


@NECKS.register_module()
class MLPProjector(nn.Module):
    """Each patch is normalised by itself, the patches of a token are put side by side, and two linear layers follow.

    Args:
        in_channels: C, of a patch; the last where there are several.
        strides: image pixels a token, each way; handed on.
        out_channels: of the language model's tokens.
        patches_per_token: m.

    Attributes:
        out_channels, strides: as a backbone has.
    """

    def __init__(self, in_channels: Sequence[int], strides: Sequence[int], out_channels: int = 2048, patches_per_token: int = 4) -> None:
        super().__init__()
        hidden_channels = in_channels[-1] * patches_per_token
        self.patches_per_token = patches_per_token
        self.norm = nn.LayerNorm(in_channels[-1], eps=1e-5)
        self.linear1 = nn.Linear(hidden_channels, hidden_channels)
        self.linear2 = nn.Linear(hidden_channels, out_channels)
        self.out_channels = (out_channels,)
        self.strides = tuple(strides)

    def forward(self, images: PackedSequence) -> PackedSequence:
        """Tokens [T, m, C] to tokens [T, out_channels], with the same grids; [T, C] are tokens of one patch.

        Raises:
            ValueError: these are no tokens, or a token has another number of patches.
        """
        if not isinstance(images, PackedSequence):
            raise ValueError(f"the projector takes a packed sequence of tokens, got {type(images).__name__}; take a backbone of tokens, "
                             f"such as MoonViT")
        patches = images.tokens[:, None] if images.tokens.ndim == 2 else images.tokens
        if patches.shape[1] != self.patches_per_token:
            raise ValueError(f"the projector takes tokens of {self.patches_per_token} patches, and the backbone gives tokens of "
                             f"{patches.shape[1]}; set patches_per_token to the backbone's merge, rows times columns")
        hidden = F.gelu(self.linear1(self.norm(patches).flatten(1)))                                          # the exact one, by erf
        return images.replace(self.linear2(hidden))
