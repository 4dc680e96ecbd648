"""Jigsaw puzzles: features learned by finding the order of nine tiles (Noroozi and Favaro 2016, arXiv:1603.09246)."""
from __future__ import annotations

from torch import Tensor, nn

from visionkit.models.base import Model
from visionkit.models.self_supervised.answers import Answers, check_pool, embed_pieces, puzzle_of, whole_images
from visionkit.registry import BACKBONES, HEADS, MODELS, TRANSFORMS, ConfigError
from visionkit.structures import ImageBatch, Sample

# B images, T puzzles an image, K orders there are, D numbers an embedding, P pixels the side of a tile


@MODELS.register_module()
class Jigsaw(Model):
    """The context-free network of the paper (fig. 3): a trunk sees every tile by itself, and only the head sees them together.

    So a tile's embedding does not depend on where it is put: each tile goes through the trunk once, and its embeddings are put in T orders.

    Args:
        backbone: tiles to feature maps, of which the last is averaged over a grid of cells.
        head: nine embeddings in some orders to K logits for each order; by default `JigsawHead`.
        puzzle: images to tiles and orders, with K `permutations`; by default `JigsawTiles`.
        pool: cells of that grid, each way; side by side they are the embedding. The papers' AlexNets keep where in a tile a thing
            is; with 1, the mean of the whole map, what goes on beyond an edge is hard to tell.
        data_preprocessor: raw images to a batch, which must not be padded.
    """

    def __init__(self, backbone: dict | nn.Module, head: dict | nn.Module | None = None, puzzle: dict | nn.Module | None = None,
                 pool: int = 1, data_preprocessor: dict | nn.Module | None = None) -> None:
        super().__init__(data_preprocessor)
        self.pool = check_pool(pool)
        self.puzzle = TRANSFORMS.make(puzzle or {"type": "JigsawTiles"}, at="puzzle")
        if not hasattr(self.puzzle, "permutations"):
            raise ConfigError(f"Jigsaw wants a puzzle with permutations, such as JigsawTiles, and {type(self.puzzle).__name__} has none; "
                              f"it is a puzzle for another model", ("puzzle",))
        self.backbone = BACKBONES.make(backbone, at="backbone")
        self.head = HEADS.make(head or {"type": "JigsawHead"}, at="head", in_channels=self.backbone.out_channels[-1] * pool**2,
                               num_answers=len(self.puzzle.permutations))

    def forward(self, images: ImageBatch) -> Answers:
        """Logits [B, T, K] of every puzzle, and the right orders [B, T]."""
        puzzle = puzzle_of(self.puzzle, whole_images(images), "tiles", "orders", "labels")
        embeddings = embed_pieces(self.backbone, puzzle.tiles, self.pool)                    # [B, 9, D]
        return Answers(self.head(embeddings, puzzle.orders), puzzle.labels)

    def loss(self, images: ImageBatch, samples: list[Sample]) -> dict[str, Tensor]:
        """Cross entropy over the K orders."""
        answers = self(images)
        return {"loss_pretext": self.head.loss(*answers), "pretext_accuracy": answers.accuracy()}

    def predict(self, images: ImageBatch, samples: list[Sample]) -> list[Sample]:
        """`samples` with `pretext`: T rows, an order each."""
        return self(images).into(samples)
