"""Attention: one interface, and the kernels behind it."""
from visionkit.ops.attention.varlen import varlen_attention

__all__ = ["varlen_attention"]
