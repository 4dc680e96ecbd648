"""The one bridge from mmengine's runner to a model's forward, loss and predict."""
from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from mmengine.model import BaseDataPreprocessor, BaseModel
from torch import Tensor, nn

from visionkit.registry import MODELS, ConfigError
from visionkit.structures import ImageBatch, ImageList, PackedSequence, Sample


@MODELS.register_module()
class ImagePreprocessor(BaseDataPreprocessor):
    """Raw images to a normalised, padded batch on the model's device: what a data loader yields to what a model takes.

    Args:
        mean: of the three RGB channels, on the 0..255 scale.
        std: likewise.
        pad_divisor: height and width of the batch become multiples of it; the padding is 0 after normalisation.
        channels_last: hand on the batch in channels-last memory order, which convolutions on a CPU prefer.
    """

    def __init__(self, mean: Sequence[float] = (123.675, 116.28, 103.53), std: Sequence[float] = (58.395, 57.12, 57.375),
                 pad_divisor: int = 32, channels_last: bool = True) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean and std need three values each, std above 0; got mean={mean}, std={std}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.pad_divisor = pad_divisor
        self.channels_last = channels_last

    def forward(self, data: Mapping[str, Any], training: bool = False) -> dict[str, Any]:
        """`inputs`, a list of uint8 or float [3, h, w] RGB, and `data_samples` to `images` and `samples`."""
        data = self.cast_data(data)
        images = [(image.float() - self.mean) / self.std for image in data["inputs"]]
        batch = ImageBatch.stack(images, divisor=self.pad_divisor)
        if self.channels_last:
            batch = ImageBatch(batch.tensor.contiguous(memory_format=torch.channels_last), batch.sizes)
        return {"images": batch, "samples": list(data["data_samples"])}


@MODELS.register_module()
class NativeResolutionPreprocessor(BaseDataPreprocessor):
    """Raw images to normalised images of their own sizes on the model's device, for token backbones: there is no canvas.

    Each image is padded with black at its right and bottom until patches fill it, before it is normalised, as Kimi-VL has it.

    Args:
        mean: of the three RGB channels, on the 0..255 scale.
        std: likewise.
        multiple: height and width of each image become multiples of it: the backbone's stride, 2 patches of 14 pixels in MoonViT.
        exchange_images: a control, to see whether a model looks at images at all: each sample gets the image of the next one in the batch,
            the last that of the first. In shuffled batches accuracy is then that of chance.
    """

    def __init__(self, mean: Sequence[float] = (127.5, 127.5, 127.5), std: Sequence[float] = (127.5, 127.5, 127.5), multiple: int = 28,
                 exchange_images: bool = False) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean and std need three values each, std above 0; got mean={mean}, std={std}")
        if multiple < 1:
            raise ValueError(f"multiple is a number of pixels, 1 or more, got {multiple}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.multiple = multiple
        self.exchange_images = exchange_images

    def forward(self, data: Mapping[str, Any], training: bool = False) -> dict[str, Any]:
        """`inputs`, a list of uint8 or float [3, h, w] RGB, and `data_samples` to `images` and `samples`."""
        data = self.cast_data(data)
        given = list(data["inputs"])
        if self.exchange_images and len(given) == 1:
            raise ValueError("exchange_images needs another image to exchange with, and a batch has only one; set another batch_size, or "
                             "drop_last=True")
        if self.exchange_images:
            given = given[1:] + given[:1]
        padded = ImageList.pad([image.float() for image in given], divisor=self.multiple)
        return {"images": ImageList(tuple((image - self.mean) / self.std for image in padded.images), padded.sizes),
                "samples": list(data["data_samples"])}


def last_features(backbone: nn.Module, images: ImageBatch | ImageList | Tensor) -> Tensor | PackedSequence:
    """The last map [B, C, h, w] of a backbone, or the tokens of one that `returns_tokens`.

    Raises:
        ValueError: a backbone that makes maps is given images of their own sizes.
    """
    if getattr(backbone, "returns_tokens", False):
        return backbone(images)
    return backbone(_canvas(backbone, images))[-1]


def _canvas(backbone: nn.Module, images: ImageBatch | ImageList | Tensor) -> Tensor:
    if isinstance(images, ImageList):
        raise ValueError(f"{type(backbone).__name__} makes maps of a batch in one tensor, and each image here has a tensor of its own; "
                         f"take data_preprocessor=dict(type='ImagePreprocessor'), or a token backbone such as MoonViT")
    return images.tensor if isinstance(images, ImageBatch) else images


class Model(BaseModel):
    """A model that mmengine's runner can train and test.

    A subclass writes three methods of the paper: `forward(images)`, `loss(images, samples)` and `predict(images, samples)`.

    Args:
        data_preprocessor: config of the preprocessor, or one that is built; by default `ImagePreprocessor`.

    Attributes:
        reads_tokens: whether it also works with a token backbone, and so with images that have a tensor each.
        learns_from: fields of a `Sample` that `loss` reads and that a data pipeline has to load; looked for before training.
        least_images: in a batch that `loss` can learn from.
    """
    reads_tokens = False
    learns_from: tuple[str, ...] = ()
    least_images = 1

    def __init__(self, data_preprocessor: dict | nn.Module | None = None) -> None:
        preprocessor = MODELS.make(data_preprocessor or {"type": "ImagePreprocessor"}, at="data_preprocessor")
        super().__init__(data_preprocessor=preprocessor)

    def __call__(self, images: ImageBatch | ImageList, samples: list[Sample] | None = None, mode: str = "tensor") -> Any:
        # mmengine, also through its DDP wrapper, calls model(**data, mode=...). Turning here rather than in forward leaves
        # forward to the paper.
        self._refuse_tokens(images)
        if mode == "loss":
            return self.loss(images, samples)
        if mode == "predict":
            return self.predict(images, samples)
        if mode == "features":
            return self.extract_features(images)
        return super().__call__(images)

    def _refuse_tokens(self, images: ImageBatch | ImageList | None = None) -> None:
        if self.reads_tokens:
            return
        name, backbone = type(self).__name__, getattr(self, "backbone", None)
        if getattr(backbone, "returns_tokens", False):
            raise ConfigError(f"{name} reads maps, and {type(backbone).__name__} gives tokens; take another backbone, such as ResNet, or "
                              f"a model that reads tokens: PackedDETR, ImageClassifier, Rotation", ("model", "backbone"))
        if isinstance(images, ImageList):
            raise ConfigError(f"{name} computes on images in one tensor, and each image here has a tensor of its own; take "
                              f"dict(type='ImagePreprocessor')", ("model", "data_preprocessor"))

    @abstractmethod
    def forward(self, images: ImageBatch) -> Any:
        """What the paper's network computes from `images`."""

    @abstractmethod
    def loss(self, images: ImageBatch, samples: list[Sample]) -> dict[str, Tensor]:
        """Every term of the training loss, a scalar each."""

    @abstractmethod
    def predict(self, images: ImageBatch, samples: list[Sample]) -> list[Sample]:
        """`samples` with predictions in original-image pixels."""

    def extract_features(self, images: ImageBatch | ImageList) -> dict[str, Tensor]:
        """What the network makes of `images` before it says anything, by name, for probes and retrieval: each [B, C, h, w] or [B, D].

        By default the backbone's feature maps, `map0`, `map1`, ...; of a token backbone `mean`, of each image's tokens.
        """
        if getattr(self.backbone, "returns_tokens", False):
            return {"mean": self.backbone(images).mean().flatten(1)}
        return {f"map{index}": level for index, level in enumerate(self.backbone(_canvas(self.backbone, images)))}

    def parse_losses(self, losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The total to back-propagate, and the values to log: their mean over all ranks, so that a log does not depend on the
        number of processes."""
        total, log = super().parse_losses(losses)
        log = {name: value.detach() for name, value in log.items()}
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            values = torch.stack([value.float() for value in log.values()])
            dist.all_reduce(values)
            log = dict(zip(log, values / dist.get_world_size(), strict=True))
        return total, log
