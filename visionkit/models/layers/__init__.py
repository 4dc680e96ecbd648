"""Building blocks that several architectures share."""
from visionkit.models.layers.mlp import MLP
from visionkit.models.layers.pooling import global_mean
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
from visionkit.models.layers.vision_transformer import (
    PackedAttention,
    PatchEmbedding,
    VisionTransformerBlock,
    VisionTransformerEncoder,
    merged_patches,
    patch_coordinates,
    patches_of,
    resized_positions,
    rotated,
    rotation_2d,
)

__all__ = [
    "Attention",
    "Borders",
    "FeedForward",
    "LearnedPositionEncoding",
    "MLP",
    "PackedAttention",
    "PatchEmbedding",
    "SinePositionEncoding",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "VisionTransformerBlock",
    "VisionTransformerEncoder",
    "global_mean",
    "merged_patches",
    "patch_coordinates",
    "patches_of",
    "resized_positions",
    "rotated",
    "rotation_2d",
    "sinusoid",
]
