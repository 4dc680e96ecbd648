"""Building blocks that several architectures share."""
from visionkit.models.layers.mlp import MLP
from visionkit.models.layers.position_encoding import LearnedPositionEncoding, SinePositionEncoding, sinusoid
from visionkit.models.layers.transformer import (
    Attention,
    Borders,
    FeedForward,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = ["MLP", "Attention", "Borders", "FeedForward", "LearnedPositionEncoding", "SinePositionEncoding", "Transformer",
           "TransformerDecoder", "TransformerDecoderLayer", "TransformerEncoder", "TransformerEncoderLayer", "sinusoid"]
