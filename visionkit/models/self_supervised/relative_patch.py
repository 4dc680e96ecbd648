"""Context prediction: features learned by telling where a patch lies, seen from its neighbour (Doersch et al. 2015, arXiv:1505.05192)."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from visionkit.models.base import Model
from visionkit.models.self_supervised.answers import Answers, check_pool, embed_pieces, puzzle_of, whole_images
from visionkit.registry import BACKBONES, HEADS, MODELS, TRANSFORMS
from visionkit.structures import ImageBatch, Sample

# B images, D numbers an embedding, P pixels the side of a patch


@MODELS.register_module()
class RelativePatch(Model):
    """Nine patches of an image in a grid: which of the eight around the centre is this one? To say so one has to know the object.

    Both patches of a pair go through the same trunk (fig. 3), so each of the nine goes through it once, and all eight pairs are asked.

    Args:
        backbone: patches to feature maps, of which the last is averaged over a grid of cells.
        head: two embeddings to eight logits; by default `RelativePatchHead`.
        puzzle: images to nine patches; by default `PatchGrid` as in the paper, for images of at least 398x398.
        pool: cells of that grid, each way; side by side they are the embedding. The papers' AlexNets keep where in a patch a thing
            is; with 1, the mean of the whole map, what goes on beyond an edge is hard to tell.
        data_preprocessor: raw images to a batch, which must not be padded.
    """

    def __init__(self, backbone: dict | nn.Module, head: dict | nn.Module | None = None, puzzle: dict | nn.Module | None = None,
                 pool: int = 1, data_preprocessor: dict | nn.Module | None = None) -> None:
        super().__init__(data_preprocessor)
        self.pool = check_pool(pool)
        self.puzzle = TRANSFORMS.make(puzzle or {"type": "PatchGrid"}, at="puzzle")
        self.backbone = BACKBONES.make(backbone, at="backbone")
        self.head = HEADS.make(head or {"type": "RelativePatchHead"}, at="head", in_channels=self.backbone.out_channels[-1] * pool**2)

    def forward(self, images: ImageBatch) -> Answers:
        """Logits [B, 8, 8] of the pairs of the centre with each neighbour, in raster order, and the answers [B, 8], 0 to 7."""
        patches = puzzle_of(self.puzzle, whole_images(images), "patches").patches            # [B, 9, 3, P, P]
        embeddings = embed_pieces(self.backbone, patches, self.pool)                         # [B, 9, D]
        neighbours = torch.cat([embeddings[:, :4], embeddings[:, 5:]], 1)                    # [B, 8, D]
        centre = embeddings[:, 4:5].expand_as(neighbours)
        logits = self.head(centre.flatten(0, 1), neighbours.flatten(0, 1)).unflatten(0, neighbours.shape[:2])
        return Answers(logits, torch.arange(8, device=images.device).expand(len(images), 8))

    def loss(self, images: ImageBatch, samples: list[Sample]) -> dict[str, Tensor]:
        """Cross entropy over the eight places."""
        answers = self(images)
        return {"loss_pretext": self.head.loss(*answers), "pretext_accuracy": answers.accuracy()}

    def predict(self, images: ImageBatch, samples: list[Sample]) -> list[Sample]:
        """`samples` with `pretext`: eight rows, a neighbour each."""
        return self(images).into(samples)
