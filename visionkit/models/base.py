"""The one bridge from mmengine's runner to a model's forward, loss and predict."""
from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from mmengine.model import BaseDataPreprocessor, BaseModel
from torch import Tensor, nn

from visionkit.registry import MODELS
from visionkit.structures import ImageBatch, Sample


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


class Model(BaseModel):
    """A model that mmengine's runner can train and test.

    A subclass writes three methods of the paper: `forward(images)`, `loss(images, samples)` and `predict(images, samples)`.

    Args:
        data_preprocessor: config of the preprocessor, or one that is built; by default `ImagePreprocessor`.
    """

    def __init__(self, data_preprocessor: dict | nn.Module | None = None) -> None:
        preprocessor = MODELS.make(data_preprocessor or {"type": "ImagePreprocessor"}, at="data_preprocessor")
        super().__init__(data_preprocessor=preprocessor)

    def __call__(self, images: ImageBatch, samples: list[Sample] | None = None, mode: str = "tensor") -> Any:
        # mmengine, also through its DDP wrapper, calls model(**data, mode=...). Turning here rather than in forward leaves
        # forward to the paper.
        if mode == "loss":
            return self.loss(images, samples)
        if mode == "predict":
            return self.predict(images, samples)
        if mode == "features":
            return self.extract_features(images)
        return super().__call__(images)

    @abstractmethod
    def forward(self, images: ImageBatch) -> Any:
        """What the paper's network computes from `images`."""

    @abstractmethod
    def loss(self, images: ImageBatch, samples: list[Sample]) -> dict[str, Tensor]:
        """Every term of the training loss, a scalar each."""

    @abstractmethod
    def predict(self, images: ImageBatch, samples: list[Sample]) -> list[Sample]:
        """`samples` with predictions in original-image pixels."""

    def extract_features(self, images: ImageBatch) -> dict[str, Tensor]:
        """What the network makes of `images` before it says anything, by name, for probes and retrieval: each [B, C, h, w] or [B, D].

        By default the backbone's feature maps, `map0`, `map1`, ...
        """
        return {f"map{index}": level for index, level in enumerate(self.backbone(images.tensor))}

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
