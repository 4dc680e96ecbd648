"""Deep InfoMax: representations by mutual information (Hjelm et al. 2019, arXiv:1808.06670)."""
from __future__ import annotations

import inspect
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from visionkit.models.base import Model
from visionkit.models.losses import InfoNCELoss
from visionkit.registry import BACKBONES, LOSSES, MODELS, ConfigError
from visionkit.structures import ImageBatch, InstanceData, Sample

# N images, L = h * w locations of the map that gives local features, C its channels, D of the global vector, U of the space of scores


class Encoded(NamedTuple):
    """What the encoder makes of the images."""
    maps: tuple[Tensor, ...]    # of the backbone
    fc: Tensor                  # [N, fc_channels]
    y: Tensor                   # [N, D] the global vector


@MODELS.register_module()
class DeepInfoMax(Model):
    """The global vector of an image shall tell as much as possible about the image, and about every place in it.

    The networks that score pairs, the discriminator and the coordinate predictor are there for training; what is kept is the encoder. Terms
    of weight 0 are not built. Negatives are the other images of the batch; of several processes, each has those of its own batch only.
    Batch norm counts over the batch, in pretraining as anywhere in training.

    Args:
        backbone: images to feature maps; the last one is flattened into the global vector.
        image_size: (h, w) of the images in pixels, on which the size of the flattened map depends.
        fc_channels: of the fully connected layer between map and global vector.
        global_channels: D.
        local_map: which of the backbone's maps gives local features, from 0.
        score_channels: U, in which global and local features meet; 2048 in the paper.
        alpha: weight of global mutual information, of the whole local map with the global vector (eq. 8).
        beta: weight of local mutual information, the mean over all locations.
        gamma: weight of the prior that the global vector is to match, uniform on [0, 1]^D after a sigmoid (eq. 7).
        coordinate_weight: of the task to tell from a local feature and the global vector where the location is (sec. 4.3).
        mi_loss: how pairs are told apart; by default InfoNCE, the best in the paper's tables.
        data_preprocessor: raw images to a batch.

    Raises:
        ValueError: no mutual information is maximised, the map does not exist, the loss does not take scores, the images are too small, or
            with alpha the backbone cannot copy its layers.
    """
    least_images = 2

    def __init__(self, backbone: dict | nn.Module, image_size: tuple[int, int] = (32, 32), fc_channels: int = 1024,
                 global_channels: int = 64, local_map: int = 1, score_channels: int = 2048, alpha: float = 0.0, beta: float = 1.0,
                 gamma: float = 0.1, coordinate_weight: float = 0.0, mi_loss: dict | nn.Module | None = None,
                 data_preprocessor: dict | nn.Module | None = None) -> None:
        super().__init__(data_preprocessor)
        if min(alpha, beta, gamma, coordinate_weight) < 0 or alpha + beta == 0:
            raise ValueError(f"alpha, beta, gamma and coordinate_weight are at least 0, and alpha or beta more; got {alpha}, {beta}, "
                             f"{gamma} and {coordinate_weight}")
        self.alpha, self.beta, self.gamma, self.coordinate_weight = alpha, beta, gamma, coordinate_weight
        self.image_size = tuple(image_size)
        self.local_map = local_map
        self.backbone = BACKBONES.make(backbone, at="backbone")
        self._refuse_tokens()
        self.mi_loss = _of_scores(LOSSES.make(mi_loss or InfoNCELoss(), at="mi_loss"))
        channels = self.backbone.out_channels
        if not 0 <= local_map < len(channels):
            raise ValueError(f"local_map is one of the backbone's {len(channels)} maps, 0 to {len(channels) - 1}; got {local_map}")
        sizes = _map_sizes(self.backbone, self.image_size)
        flat = channels[-1] * math.prod(sizes[-1])
        self.fc = _fully_connected(flat, fc_channels)
        self.to_global = nn.Linear(fc_channels, global_channels)
        self.score_global = ScoreSpace(global_channels, score_channels) if global_channels != score_channels else nn.Identity()
        if beta:
            self.score_local = ScoreSpace(channels[local_map], score_channels)
        if alpha:
            if not hasattr(self.backbone, "copy_after"):
                raise ValueError(f"alpha={alpha} wants a copy of the backbone's layers after the local map, and "
                                 f"{type(self.backbone).__name__} has no copy_after(index); take StridedConvs, or alpha=0")
            self.score_map = nn.Sequential(self.backbone.copy_after(local_map), _fully_connected(flat, fc_channels),
                                           nn.Linear(fc_channels, score_channels))
        if gamma:
            self.discriminator = nn.Sequential(nn.Linear(global_channels, 1000), nn.ReLU(), nn.Linear(1000, 200), nn.ReLU(),
                                               nn.Linear(200, 1))                        # appendix A.2
        if coordinate_weight:
            self.predict_place = CoordinatePredictor(channels[local_map] + global_channels, *sizes[local_map])

    def forward(self, images: ImageBatch) -> Encoded:
        """The backbone's maps, the fully connected layer and the global vector.

        Raises:
            ConfigError: the images have another size than `image_size`.
        """
        if images.padded or tuple(images.tensor.shape[2:]) != self.image_size:
            raise ConfigError(f"this model takes images of {self.image_size} pixels, got sizes {sorted(set(images.sizes))} in a batch of "
                              f"{tuple(images.tensor.shape[2:])}; set image_size, resize or crop in the pipeline, and mind pad_divisor",
                              ("model", "image_size"))
        maps = self.backbone(images.tensor)
        fc = self.fc(maps[-1])
        return Encoded(maps, fc, self.to_global(fc))

    def loss(self, images: ImageBatch, samples: list[Sample]) -> dict[str, Tensor]:
        """The terms of eq. 8, weighted, and the discriminator's own.

        Raises:
            ConfigError: fewer than two images.
        """
        if len(images) < 2:
            raise ConfigError(f"negatives are the other images of a batch, and there is {len(images)} image in this one; a batch_size is 2 "
                              f"or more, and drop_last=True leaves a smaller last batch out", ("train_dataloader",))
        encoded = self(images)
        losses = {}
        if self.alpha:
            losses["loss_global"] = self.alpha * self.mi_loss(self.global_scores(encoded))
        if self.beta:
            losses["loss_local"] = self.beta * self.mi_loss(self.local_scores(encoded))
        if self.gamma:
            losses |= self.prior_losses(encoded.y)
        if self.coordinate_weight:
            losses["loss_coordinate"] = self.coordinate_weight * self.predict_place.loss(encoded.maps[self.local_map], encoded.y)
        return losses

    def local_scores(self, encoded: Encoded) -> Tensor:
        """u [N, N, L]: of global vector i with location l of image j, by one product of matrices."""
        local = self.score_local(encoded.maps[self.local_map]).flatten(2)                # [N, U, L]
        return torch.einsum("iu,jul->ijl", self.global_in_score_space(encoded), local)

    def global_scores(self, encoded: Encoded) -> Tensor:
        """u [N, N]: of global vector i with the whole local map of image j, encoded once more by layers of its own."""
        return self.global_in_score_space(encoded) @ self.score_map(encoded.maps[self.local_map]).T

    def global_in_score_space(self, encoded: Encoded) -> Tensor:
        """[N, U], the global vector as a map of one location."""
        return self.score_global(encoded.y[:, :, None, None]).flatten(1)

    def prior_losses(self, y: Tensor) -> dict[str, Tensor]:
        """Two players in one step (eq. 7): the discriminator learns to tell samples of the prior from `y` [N, D], the encoder to have its
        taken for them.

        Neither may learn from the other's term. The discriminator sees `y` detached; the encoder's term goes through a discriminator whose
        weights are detached. It is the non-saturating one, -log D(y) rather than log(1 - D(y)).
        """
        y = y.sigmoid()
        real, fake = self.discriminator(torch.rand_like(y)), self.discriminator(y.detach())
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        return {"loss_discriminator": (F.softplus(-real) + F.softplus(fake)).mean(),
                "loss_prior": self.gamma * F.softplus(-functional_call(self.discriminator, frozen, (y,))).mean()}

    def predict(self, images: ImageBatch, samples: list[Sample]) -> list[Sample]:
        """Which image is the global vector of? `pretext` has a row for each location of an image (one for the whole map where beta is 0):
        the scores of its global vector with that location of each of the N images of the batch. The label is the image's own place in
        the batch. By chance 1 / N is right, so compare batches of one size.

        The candidates are those of the loss: InfoNCE is indifferent to what is added to all scores of one global vector, so the scores of
        several vectors with one location cannot be compared.
        """
        encoded = self(images)
        scores = self.local_scores(encoded) if self.beta else self.global_scores(encoded)[:, :, None]
        for index, (sample, of_vector) in enumerate(zip(samples, scores.transpose(1, 2), strict=True)):     # [L, N]
            sample.pretext = InstanceData(scores=of_vector, labels=torch.full((len(of_vector),), index, device=of_vector.device))
        return samples

    def extract_features(self, images: ImageBatch) -> dict[str, Tensor]:
        """`map0`, `map1`, ... of the backbone, `fc` and the global vector `y`."""
        maps, fc, y = self(images)
        return {f"map{index}": level for index, level in enumerate(maps)} | {"fc": fc, "y": y}


class ScoreSpace(nn.Module):
    """Features of each location into the space where pairs are scored by a dot product ("encode and dot", appendix A.2).

    Two 1x1 convolutions beside a linear shortcut; the shortcut starts as the identity with a little noise, where the space has room for it.

    Args:
        in_channels: C.
        score_channels: U.
    """

    def __init__(self, in_channels: int, score_channels: int) -> None:
        super().__init__()
        self.nonlinear = nn.Sequential(nn.Conv2d(in_channels, score_channels, 1, bias=False), nn.BatchNorm2d(score_channels),
                                       nn.ReLU(inplace=True), nn.Conv2d(score_channels, score_channels, 1))
        self.shortcut = nn.Conv2d(in_channels, score_channels, 1, bias=False)
        self.norm = nn.LayerNorm(score_channels)
        nn.init.uniform_(self.shortcut.weight, -0.01, 0.01)
        with torch.no_grad():
            self.shortcut.weight[:, :, 0, 0].fill_diagonal_(1)

    def forward(self, features: Tensor) -> Tensor:
        """[N, C, h, w] to [N, U, h, w]."""
        features = self.nonlinear(features) + self.shortcut(features)
        return self.norm(features.movedim(1, -1)).movedim(-1, 1)


class CoordinatePredictor(nn.Module):
    """Row and column of a location, from its feature and the global vector, by two softmaxes.

    Args:
        in_channels: of both together.
        rows: of the map.
        columns: likewise.
        hidden_channels: of the layer before the softmaxes.
    """

    def __init__(self, in_channels: int, rows: int, columns: int, hidden_channels: int = 256) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(in_channels, hidden_channels, 1)
        self.to_row = nn.Conv2d(hidden_channels, rows, 1)
        self.to_column = nn.Conv2d(hidden_channels, columns, 1)

    def loss(self, local: Tensor, y: Tensor) -> Tensor:
        """Cross entropy of row and column, the mean over images and locations of `local` [N, C, h, w]; `y` is [N, D]."""
        count, _, height, width = local.shape
        both = torch.cat([local, y[:, :, None, None].expand(-1, -1, height, width)], 1)
        hidden = F.relu(self.hidden(both))
        row = torch.arange(height, device=y.device)[:, None].expand(count, height, width)
        column = torch.arange(width, device=y.device).expand(count, height, width)
        return F.cross_entropy(self.to_row(hidden), row) + F.cross_entropy(self.to_column(hidden), column)


def _of_scores(loss: nn.Module) -> nn.Module:
    """`loss`, which takes scores [N, N, ...] and nothing else."""
    try:
        inspect.signature(loss.forward).bind(None)
    except TypeError:
        raise ConfigError(f"the loss is to take the scores of all pairs, and {type(loss).__name__} takes "
                          f"{', '.join(inspect.signature(loss.forward).parameters)}; take InfoNCELoss, FenchelDualLoss or "
                          f"DonskerVaradhanLoss", ("mi_loss",)) from None
    return loss


def _map_sizes(backbone: nn.Module, image_size: tuple[int, int]) -> list[tuple[int, int]]:
    """(h, w) of each map that a backbone makes of images of this size: some round up, some down."""
    device = next(backbone.parameters(), torch.empty(0)).device
    training = backbone.training
    try:
        with torch.no_grad():
            sizes = [tuple(level.shape[2:]) for level in backbone.eval()(torch.zeros(1, 3, *image_size, device=device))]
    except RuntimeError:                                     # a kernel larger than what it is to run on
        sizes = [(0, 0)]
    finally:
        backbone.train(training)
    if not all(min(size) for size in sizes):
        raise ValueError(f"images of {image_size} pixels leave nothing at the backbone's stride of {backbone.strides[-1]}; set a larger "
                         f"image_size")
    return sizes


def _fully_connected(in_features: int, out_features: int) -> nn.Sequential:
    """[N, C, h, w] to [N, out_features]."""
    return nn.Sequential(nn.Flatten(), nn.Linear(in_features, out_features, bias=False), nn.BatchNorm1d(out_features),
                         nn.ReLU(inplace=True))
