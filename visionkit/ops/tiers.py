"""Which implementation serves an op: the portable one, in stock PyTorch, or kernels on a GPU, Triton's or flash-attn's.

`VISIONKIT_OPS=portable` forces the first; unset or `auto` takes the fastest that can run. Looked up at each call.
"""
from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

TRITON_OPS = ("deform_conv2d", "deform_roi_pool", "flash_attention", "ms_deform_attn", "ps_roi_align", "ps_roi_pool", "roi_align",
              "varlen_attention")                                            # each a module there
_DETERMINISTIC = ("flash_attention", "varlen_attention")                     # their kernels give the same bits every time
_SHARED_KERNELS = {"pyramid_roi_align": "roi_align", "deform_ps_roi_pool": "deform_roi_pool"}
_MIN_CAPABILITY = (7, 0)                                                     # what Triton compiles for
_FLASH_ATTN_CAPABILITY = (8, 0)                                              # Ampere, which flash-attn 2 needs


class Tier(NamedTuple):
    """`name` is portable, triton or flash_attn; `reason` says why, for people."""

    name: str
    reason: str


def tier(op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Tier:
    """The tier that serves `op` for tensors on `device` of `dtype`.

    Raises:
        ValueError: VISIONKIT_OPS is neither auto nor portable.
    """
    wanted = os.environ.get("VISIONKIT_OPS", "auto") or "auto"
    if wanted not in ("auto", "portable"):
        raise ValueError(f"VISIONKIT_OPS must be 'auto' or 'portable', got {wanted!r}")
    if wanted == "portable":
        return Tier("portable", "VISIONKIT_OPS=portable")
    if op == "attention":
        name, reason = tier("flash_attention", device, dtype)
        return Tier(name, f"PyTorch's scaled_dot_product_attention, or flash_attention for what that does not know: {reason}. "
                          f"attention_kernel tells for given tensors")
    if _SHARED_KERNELS.get(op, op) not in TRITON_OPS:
        return Tier("portable", "needs no kernel of its own")
    if device.type != "cuda":
        return Tier("portable", f"the tensors are on {device.type}; Triton kernels are for CUDA")
    if dtype == torch.float64:
        return Tier("portable", "float64 is for checking gradients")
    deterministic = torch.are_deterministic_algorithms_enabled()
    if (op == "varlen_attention" and dtype != torch.float32 and _flash_attn_installed() and not deterministic
            and (torch.version.hip is not None or _capability(device) >= _FLASH_ATTN_CAPABILITY)):
        return Tier("flash_attn", "CUDA, half precision, and flash-attn is installed")
    if not _triton_installed():
        return Tier("portable", "triton is not installed")
    if torch.version.hip is None and _capability(device) < _MIN_CAPABILITY:
        return Tier("portable", f"Triton needs compute capability {_MIN_CAPABILITY[0]}.{_MIN_CAPABILITY[1]}, this GPU has "
                                f"{'.'.join(map(str, _capability(device)))}")
    if deterministic and op not in _DETERMINISTIC:
        return Tier("portable", "torch.use_deterministic_algorithms is on, and the kernels' gradients use atomic additions")
    return Tier("triton", "CUDA, and triton is installed")


def kernels(op: str, tensor: Tensor) -> ModuleType | None:
    """The module of Triton kernels that serves `op` for `tensor`, or None where they do not."""
    chosen = tier(op, tensor.device, tensor.dtype).name
    if chosen == "portable" or (chosen == "flash_attn" and not _triton_installed()):
        return None
    return importlib.import_module(f"visionkit.ops.triton.{op}")


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _flash_attn_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
