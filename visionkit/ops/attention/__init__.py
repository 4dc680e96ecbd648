"""Attention: one interface, and the kernels behind it."""
from visionkit.ops.attention.flash import FlashAttention, flash_attention
from visionkit.ops.attention.varlen import varlen_attention

__all__ = ["FlashAttention", "flash_attention", "varlen_attention"]
