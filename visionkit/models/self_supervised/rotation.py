"""RotNet: features learned by telling how an image is turned (Gidaris et al. 2018, arXiv:1803.07728)."""
from __future__ import annotations

from torch import Tensor, nn

from visionkit.models.base import Model, last_features
from visionkit.models.self_supervised.answers import Answers, puzzle_of, whole_images, whole_list
from visionkit.registry import BACKBONES, HEADS, MODELS, TRANSFORMS
from visionkit.structures import ImageBatch, ImageList, Sample

# B images, 4 rotations each, C channels


@MODELS.register_module()
class Rotation(Model):
    """An image is turned by 0, 90, 180 and 270 degrees; to say which is which one has to see what is in it.

    Args:
        backbone: images to feature maps, of which the last is read, or to tokens.
        head: features to four logits; by default `RotationHead`.
        puzzle: images to their rotations; by default `FourRotations`. Another one may tell its `num_answers`, which are 4 otherwise.
        data_preprocessor: raw images to a batch or a list, which must not be padded.

    Images of their own sizes show by their shape whether they were turned by a quarter, if the data has mostly wide ones, say: let the
    pipeline draw heights and widths alike, as `RandomNativeResize` does.
    """
    reads_tokens = True

    def __init__(self, backbone: dict | nn.Module, head: dict | nn.Module | None = None, puzzle: dict | nn.Module | None = None,
                 data_preprocessor: dict | nn.Module | None = None) -> None:
        super().__init__(data_preprocessor)
        self.puzzle = TRANSFORMS.make(puzzle or {"type": "FourRotations"}, at="puzzle")
        self.backbone = BACKBONES.make(backbone, at="backbone")
        self.head = HEADS.make(head or {"type": "RotationHead"}, at="head", in_channels=self.backbone.out_channels[-1],
                               num_answers=getattr(self.puzzle, "num_answers", 4))

    def forward(self, images: ImageBatch | ImageList) -> Answers:
        """Logits [B, 4, 4] of every rotation of every image, and the rotations [B, 4]."""
        if isinstance(images, ImageList):
            views, labels = self._turned(whole_list(images))                 # B * 4 images, [B, 4]
        else:
            views, labels = self._turned(whole_images(images))               # [B, 4, 3, S, S], [B, 4]
            views = views.flatten(0, 1)
        features = last_features(self.backbone, views)                       # [B * 4, C, h, w], or the tokens of B * 4 views
        return Answers(self.head(features).unflatten(0, labels.shape), labels)

    def _turned(self, images: Tensor | ImageList) -> tuple[Tensor | ImageList, Tensor]:
        made = puzzle_of(self.puzzle, images, "views", "labels")
        return made.views, made.labels

    def loss(self, images: ImageBatch | ImageList, samples: list[Sample]) -> dict[str, Tensor]:
        """Eq. 2 and 3: the mean over images of the mean over their rotations."""
        answers = self(images)
        return {"loss_pretext": self.head.loss(*answers), "pretext_accuracy": answers.accuracy()}

    def predict(self, images: ImageBatch | ImageList, samples: list[Sample]) -> list[Sample]:
        """`samples` with `pretext`: four rows, a rotation each."""
        return self(images).into(samples)
