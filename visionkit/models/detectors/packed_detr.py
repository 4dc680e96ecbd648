"""DETR on packed tokens: images of their own sizes, and no padding anywhere."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from visionkit.models.detectors.detr import DETR, SetPrediction
from visionkit.models.layers import Borders, sinusoid
from visionkit.registry import MODELS, NECKS, ConfigError
from visionkit.structures import ImageList, PackedSequence

# B images, T tokens of all of them, Q queries, D channels of the transformer


@MODELS.register_module()
class PackedDETR(DETR):
    """`DETR` fed from a backbone that returns a packed sequence, such as `MoonViT`: tokens of one image attend to each other, and its
    queries to them, whatever else is in the batch.

    Args:
        backbone: `ImageList` to `PackedSequence`, with the attributes `returns_tokens`, `out_channels` and `strides`, and
            `patches_per_token` where it puts several patches side by side.
        neck: what the backbone gives to other tokens, such as `MLPProjector`, before the linear layer to D channels; by default there is
            none.
        num_classes and the arguments after neck: of `DETR`.

    Raises:
        ConfigError: the backbone gives no tokens, or, in the forward pass, tokens without grids.
    """
    reads_tokens = True

    def __init__(self, backbone: dict | nn.Module, num_classes: int, neck: dict | nn.Module | None = None, num_queries: int = 100,
                 channels: int = 256, num_heads: int = 8, hidden_channels: int = 2048, encoder_layers: int = 6, decoder_layers: int = 6,
                 dropout: float = 0.1, inner_dropout: float = 0.0, pre_norm: bool = False, auxiliary_losses: bool = True,
                 matcher: dict | nn.Module | None = None, set_loss: dict | nn.Module | None = None, score_threshold: float = 0.0,
                 checkpointing: bool | str | Mapping = False, data_preprocessor: dict | nn.Module | None = None) -> None:
        super().__init__(backbone, num_classes, num_queries=num_queries, channels=channels, num_heads=num_heads, dropout=dropout,
                         hidden_channels=hidden_channels, encoder_layers=encoder_layers, decoder_layers=decoder_layers,
                         inner_dropout=inner_dropout, pre_norm=pre_norm, auxiliary_losses=auxiliary_losses, matcher=matcher,
                         set_loss=set_loss, score_threshold=score_threshold, checkpointing=checkpointing,
                         data_preprocessor=data_preprocessor or {"type": "NativeResolutionPreprocessor"})
        if not getattr(self.backbone, "returns_tokens", False):
            raise ConfigError(f"PackedDETR reads tokens, and {type(self.backbone).__name__} gives maps; take MoonViT or ViT, or DETR",
                              ("backbone",))
        self.channels = channels
        width, strides = self.backbone.out_channels, self.backbone.strides
        self.neck = nn.Identity() if neck is None else NECKS.make(neck, at="neck", in_channels=width, strides=strides)
        width = width[-1] * getattr(self.backbone, "patches_per_token", 1) if neck is None else self.neck.out_channels[-1]
        self.stride = (strides if neck is None else self.neck.strides)[-1]                                  # pixels, each way
        self.project = nn.Linear(width, channels)

    def forward(self, images: ImageList) -> list[SetPrediction]:
        """One prediction a decoder layer, the last one last."""
        tokens = self.neck(self.backbone(images))
        tokens = tokens.replace(self.project(tokens.tokens.flatten(1)))                                     # [T, D]
        positions = self.positions(tokens, images.sizes).to(tokens.tokens.dtype)
        queries = self.queries.weight.repeat(len(images), 1)                                                # [B * Q, D]
        of_queries = PackedSequence.of_lengths(queries, [len(self.queries.weight)] * len(images))
        hidden, _ = self.transformer(tokens.tokens, torch.zeros_like(queries), positions, queries,
                                     Borders.between(tokens, tokens), Borders.between(of_queries, of_queries))
        return self.read_out(torch.stack(hidden).unflatten(1, (len(images), -1)))

    def positions(self, tokens: PackedSequence, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """[T, D]: sinusoids of where the middle of each token lies, as fractions of the height and width of its image, whose (h, w) in
        pixels are `sizes`: once around the circle from one border to the other."""
        if tokens.grids is None:
            raise ConfigError("PackedDETR needs to know where a token lies, and these have no grids; let the backbone return patches alone",
                              ("model", "backbone"))
        stride, device = self.stride, tokens.tokens.device
        encoded = []
        for (rows, columns), (height, width) in zip(tokens.grids, sizes, strict=True):
            y, x = (sinusoid((torch.arange(count, device=device) + 0.5) * (2 * math.pi * stride / size), self.channels // 2)
                    for count, size in ((rows, height), (columns, width)))
            encoded.append(torch.cat([y[:, None].expand(-1, columns, -1), x[None].expand(rows, -1, -1)], -1).flatten(0, 1))
        return torch.cat(encoded)
