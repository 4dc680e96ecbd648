"""Attention: one interface, and the kernels behind it."""
from visionkit.ops.attention.choice import Attention, attention, attention_kernel
from visionkit.ops.attention.flash import FlashAttention, flash_attention
from visionkit.ops.attention.varlen import varlen_attention

__all__ = [
    "Attention",
    "FlashAttention",
    "attention",
    "attention_kernel",
    "flash_attention",
    "varlen_attention",
]
