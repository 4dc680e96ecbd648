"""What the tests of models that solve puzzles share."""
import pytest
import torch
from torch import nn

from visionkit.structures import ImageBatch


@pytest.fixture
def pictures():
    """Random pictures [count, 3, side, side] of a few large shapes, no two of their parts alike."""
    def draw(count: int, side: int) -> ImageBatch:
        coarse = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))
        return ImageBatch(nn.functional.interpolate(coarse, (side, side), mode="bilinear"), [(side, side)] * count)
    return draw
