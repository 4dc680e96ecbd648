"""Contrastive predictive coding of images (van den Oord et al. 2018, arXiv:1807.03748, sec. 3.3)."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.models.base import Model
from visionkit.models.losses import info_nce
from visionkit.models.self_supervised.answers import whole_images
from visionkit.registry import BACKBONES, MODELS, TRANSFORMS, ConfigError
from visionkit.structures import ImageBatch, InstanceData, Sample

# B images, R x C crops of each, D channels of a crop's code z, E of the context c


class Codes(NamedTuple):
    """What is known of every crop, and of every crop with all that is above it."""
    z: Tensor       # [B, D, R, C]
    context: Tensor  # [B, E, R, C]


@MODELS.register_module()
class CPC(Model):
    """From the upper rows of an image's crops, tell what the rows below look like, among all that it could be.

    Each crop is encoded by itself. A network that reads rows from the top gives each place a context of what it has seen, and one linear
    map a step predicts from it the codes so many rows further down. A prediction is right if it is closer to the code of its place than to
    the codes of all other places, see `loss`. Batch norm in the encoder lets crops of an image see each other through the batch's
    statistics; the paper has none, so take a backbone with norm="GN" where the answer shall not leak. Of several processes, each has the
    negatives of its own batch.

    Args:
        backbone: a crop to feature maps; the mean of the last one over its positions is z.
        puzzle: images to crops; by default the paper's 64 pixels at a stride of 32.
        context: `masked_convs`, a PixelCNN whose filters reach upwards and to both sides; or `gru`, a recurrent network down each column.
        context_channels: E.
        context_layers: how many convolutions, or recurrent layers.
        rows_ahead: which rows below are predicted. Crops that overlap by half share pixels with those one row below.
        data_preprocessor: raw images to a batch.
    """

    def __init__(self, backbone: dict | nn.Module, puzzle: dict | nn.Module | None = None, context: str = "masked_convs",
                 context_channels: int = 256, context_layers: int = 5, rows_ahead: Sequence[int] = (1, 2, 3, 4, 5),
                 data_preprocessor: dict | nn.Module | None = None) -> None:
        super().__init__(data_preprocessor)
        if context not in ("masked_convs", "gru"):
            raise ValueError(f"context must be 'masked_convs' or 'gru', got {context!r}")
        if not rows_ahead or min(rows_ahead) < 1 or len(set(rows_ahead)) < len(rows_ahead):
            raise ValueError(f"rows_ahead needs different numbers of at least 1, got {tuple(rows_ahead)}")
        self.rows_ahead = tuple(rows_ahead)
        self.puzzle = TRANSFORMS.make(puzzle or {"type": "OverlappingCrops"}, at="puzzle")
        self.backbone = BACKBONES.make(backbone, at="backbone")
        channels = self.backbone.out_channels[-1]
        network = MaskedConvContext if context == "masked_convs" else RecurrentContext
        self.read_rows = network(channels, context_channels, context_layers)
        self.predictors = nn.ModuleList(nn.Conv2d(context_channels, channels, 1, bias=False) for _ in self.rows_ahead)   # W_k

    def forward(self, images: ImageBatch) -> Codes:
        """Codes and contexts of all crops.

        Raises:
            ConfigError: padded images, a puzzle that makes no crops, or too few rows of them for the farthest prediction.
        """
        crops = self.puzzle(whole_images(images))                                                           # [B, R, C, 3, P, P]
        if not isinstance(crops, Tensor) or crops.ndim != 6:
            raise ConfigError(f"this model wants crops [B, R, C, 3, P, P] of its puzzle, and {type(self.puzzle).__name__} makes something "
                              f"else; it is a puzzle for another model", ("model", "puzzle"))
        count, rows, columns = crops.shape[:3]
        if rows <= max(self.rows_ahead):
            raise ConfigError(f"predicting {max(self.rows_ahead)} rows ahead needs more rows than the {rows} that the puzzle makes of "
                              f"images of {tuple(images.tensor.shape[2:])}; lower rows_ahead, or take larger images or a smaller stride",
                              ("model", "rows_ahead"))
        z = self.backbone(crops.flatten(0, 2))[-1].mean((2, 3))                                             # [B * R * C, D]
        z = z.unflatten(0, (count, rows, columns)).permute(0, 3, 1, 2)                                      # [B, D, R, C]
        return Codes(z, self.read_rows(z))

    def loss(self, images: ImageBatch, samples: list[Sample]) -> dict[str, Tensor]:
        """InfoNCE (eq. 4) of each step, divided by the number of steps.

        For k rows ahead the candidates of a prediction are the codes of all B (R - k) C places that something is predicted for: its own
        place, the others of its image, and those of all other images.
        """
        losses = {}
        for ahead, predicted, code in self.predictions(self(images)):
            predicted, code = (part.movedim(1, -1).flatten(0, 2) for part in (predicted, code))            # [B * (R - k) * C, D]
            places = torch.arange(len(code), device=code.device)
            losses[f"loss_{ahead}_ahead"] = info_nce(predicted @ code.T, places) / len(self.rows_ahead)
        return losses

    def predictions(self, codes: Codes) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each step k: k, what is predicted from above [B, D, R - k, C], and what is there."""
        for ahead, predictor in zip(self.rows_ahead, self.predictors, strict=True):
            yield ahead, predictor(codes.context[:, :, :-ahead]), codes.z[:, :, ahead:]

    def predict(self, images: ImageBatch, samples: list[Sample]) -> list[Sample]:
        """Which image goes on like this? `pretext` has a row for each prediction of an image, of all steps: its scores with the codes at
        the predicted place in the B images of the batch. The label is the image's own place in the batch. By chance 1 / B is right, so
        compare batches of one size."""
        scores = torch.cat([torch.einsum("idrc,jdrc->ircj", predicted, code).flatten(1, 2)
                            for _, predicted, code in self.predictions(self(images))], 1)                   # [B, T, B]
        for index, (sample, of_image) in enumerate(zip(samples, scores, strict=True)):
            sample.pretext = InstanceData(scores=of_image, labels=torch.full((len(of_image),), index, device=of_image.device))
        return samples

    def extract_features(self, images: ImageBatch) -> dict[str, Tensor]:
        """The backbone's maps of the whole image, `map0`, ...; the codes of its crops, `grid` [B, D, R, C]; and their mean, `z` [B, D]."""
        grid = self(images).z
        return super().extract_features(images) | {"grid": grid, "z": grid.mean((2, 3))}


class MaskedConvContext(nn.Module):
    """A PixelCNN over rows (van den Oord et al. 2016, arXiv:1606.05328): residual 2x3 convolutions that see a row and the one above it.

    The paper's masks also hide what is to the right; predictions here go down only, so a row may be seen whole. There is no norm: one over
    positions would tell of the rows below.

    Args:
        in_channels: D.
        channels: E.
        num_layers: each lets a place see one row further up and one column further to both sides.
    """

    def __init__(self, in_channels: int, channels: int, num_layers: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(in_channels, channels, 1)
        self.layers = nn.ModuleList(nn.Conv2d(channels, channels, (2, 3)) for _ in range(num_layers))

    def forward(self, z: Tensor) -> Tensor:
        """[B, D, R, C] to [B, E, R, C], of which row r depends on rows 0 to r."""
        context = self.project(z)
        for layer in self.layers:
            context = context + layer(F.pad(F.relu(context), (1, 1, 1, 0)))             # zeros left, right and above
        return F.relu(context)


class RecurrentContext(nn.Module):
    """A gated recurrent network from the top down each column.

    Args:
        in_channels: D.
        channels: E.
        num_layers: of the network.
    """

    def __init__(self, in_channels: int, channels: int, num_layers: int) -> None:
        super().__init__()
        self.network = nn.GRU(in_channels, channels, num_layers, batch_first=True)

    def forward(self, z: Tensor) -> Tensor:
        """[B, D, R, C] to [B, E, R, C], of which row r depends on rows 0 to r of the same column."""
        count, _, _, columns = z.shape
        context, _ = self.network(z.permute(0, 3, 2, 1).flatten(0, 1))                  # [B * C, R, E]
        return context.unflatten(0, (count, columns)).permute(0, 3, 2, 1)
