"""One call for softmax attention, and which kernel serves it."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionkit.ops import tiers
from visionkit.ops.attention import sdpa
from visionkit.ops.attention.flash import FlashAttention, fits_kernels, flash_attention
from visionkit.ops.attention.inputs import band, check_dropout, check_heads_first, check_softcap, in_autocast_type
from visionkit.ops.attention.sdpa import as_sdpa_knows, banded_sdpa, kept_by_sdpa
from visionkit.ops.tiers import Tier
from visionkit.registry import OPS


def attention(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, causal: bool | str = False,
              scale: float | None = None, window: tuple[int, int] | None = None, dropout_p: float = 0.0, softcap: float = 0.0,
              alibi_slopes: Tensor | None = None, block_mask: Tensor | None = None, block_size: int = 64) -> Tensor:
    """softmax(scale * query key^T) value by the kernel that is best for these arguments; `attention_kernel` tells which, and why.

    Args:
        query: [B, H, N, D].
        key: [B, H_kv, M, D]; H is a multiple of H_kv.
        value: [B, H_kv, M, D_v].
        mask: broadcasts to [B, H, N, M]; bool, true where a query sees a key, or floating, added to the scores. Alone: a mask holds
            what `causal`, `window` and the others would say.
        causal: True or "bottom_right", or "top_left"; this and the others as in `flash_attention`.

    Returns:
        [B, H, N, D_v] in the type of the inputs; 0 for queries that see no key.

    Raises:
        ValueError: arguments that do not fit together.
    """
    options = {"causal": causal, "window": window, "softcap": softcap, "alibi_slopes": alibi_slopes, "block_mask": block_mask,
               "block_size": block_size}
    query, key, value = in_autocast_type(query, key, value)
    chosen = attention_kernel(query, key, value, mask=mask, dropout_p=dropout_p, **options)
    if chosen.name != "sdpa":
        return flash_attention(query, key, value, scale=scale, dropout_p=dropout_p, **options)
    if mask is not None:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    left, right, top_left = band(causal, window)
    return banded_sdpa(query, key, value, left, right, top_left=top_left, dropout_p=dropout_p, scale=scale)


def attention_kernel(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, causal: bool | str = False,
                     window: tuple[int, int] | None = None, dropout_p: float = 0.0, softcap: float = 0.0,
                     alibi_slopes: Tensor | None = None, block_mask: Tensor | None = None, block_size: int = 64) -> Tier:
    """Which kernel `attention` takes for these arguments, and why: sdpa (PyTorch's own), triton or portable (of `flash_attention`).

    Raises:
        ValueError: arguments that do not fit together.
    """
    check_heads_first(query, key, value)
    check_dropout(dropout_p)
    check_softcap(softcap)
    left, right, top_left = band(causal, window)
    unknown = [name for name, given in (("softcap", softcap > 0), ("alibi_slopes", alibi_slopes is not None),
                                        ("block_mask", block_mask is not None)) if given]
    if mask is not None:
        if unknown or left >= 0 or right >= 0:
            raise ValueError("mask stands alone: write into it what causal, window, alibi_slopes or block_mask would say, and leave them "
                             f"out; got {', '.join([*unknown, *(['causal or window'] if max(left, right) >= 0 else [])])} beside it")
        _check_mask(mask, query, key)
        return Tier("sdpa", "only PyTorch's attention takes a mask of any form")
    flash = tiers.tier("flash_attention", query.device, query.dtype)
    if flash.name != "portable" and not fits_kernels(query, value, block_mask, block_size):
        flash = Tier("portable", "a row is too long for the Triton kernels, or block_size no multiple of their 16")
    if unknown:
        return Tier(flash.name, f"PyTorch's attention knows no {' and no '.join(unknown)}; {flash.reason}")
    masked = not as_sdpa_knows(query.shape[2], key.shape[2], left, right, top_left)
    if masked and flash.name == "triton":
        return Tier("triton", f"PyTorch's attention needs a mask for this causal or window; {flash.reason}")
    grouped = query.shape[1] != key.shape[1]
    if grouped and flash.name == "triton" and (query.dtype == torch.float32 or query.shape[3] != value.shape[3]):
        return Tier("triton", f"PyTorch's kernels for CUDA know grouped heads only in half precision with values as wide as keys, and else "
                              f"all scores are kept; {flash.reason}")
    size, what = kept_by_sdpa(query, key, value, left, right, top_left=top_left, dropout_p=dropout_p)
    if size > sdpa.LARGEST_MATRIX:
        return Tier(flash.name, f"PyTorch's attention keeps {what}, {size / 2**20:.0f} MiB; {flash.reason}")
    if masked:
        return Tier("sdpa", "with a mask for this causal or window, faster than tiles on a CPU")
    return Tier("sdpa", "PyTorch's own is the fastest where it knows all that is asked")


def _check_mask(mask: Tensor, query: Tensor, key: Tensor) -> None:
    scores = (*query.shape[:3], key.shape[2])
    if not 2 <= mask.ndim <= 4 or any(size not in (1, wanted) for size, wanted in zip(mask.shape, scores[-mask.ndim:], strict=True)):
        raise ValueError(f"mask must broadcast to [B, H, N, M] = {list(scores)} and have N and M at least, got {list(mask.shape)}; a mask "
                         f"of keys [B, M] is mask[:, None, None]")
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise ValueError(f"mask must be bool, true where a query sees a key, or numbers to add in float32 or the type of the queries, got "
                         f"{mask.dtype} beside {query.dtype}")
    if mask.device != query.device:
        raise ValueError(f"query is on {query.device}, mask on {mask.device}; move one")


@OPS.register_module()
class Attention(FlashAttention):
    """`attention` as a module without weights; projections belong to the layer that uses it. No dropout in evaluation."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return attention(query, key, value, mask=mask, causal=self.causal, scale=self.scale, window=self.window,
                         dropout_p=self.dropout_p if self.training else 0.0, softcap=self.softcap)
