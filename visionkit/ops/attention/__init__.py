"""Attention: one interface, and the kernels behind it."""
from visionkit.ops.attention.choice import Attention, attention, attention_kernel
from visionkit.ops.attention.flash import FlashAttention, flash_attention
from visionkit.ops.attention.linear import (
    EfficientAttention,
    LinearAttention,
    LinearAttentionState,
    efficient_attention,
    linear_attention,
    linear_attention_step,
    varlen_linear_attention,
)
from visionkit.ops.attention.varlen import varlen_attention

__all__ = [
    "Attention",
    "EfficientAttention",
    "FlashAttention",
    "LinearAttention",
    "LinearAttentionState",
    "attention",
    "attention_kernel",
    "efficient_attention",
    "flash_attention",
    "linear_attention",
    "linear_attention_step",
    "varlen_attention",
    "varlen_linear_attention",
]
