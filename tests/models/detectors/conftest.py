"""What the tests of several detectors share."""
import pytest
import torch
from torch import nn

from visionkit.ops import box_iou
from visionkit.structures import ImageBatch, Sample


@pytest.fixture
def learn_by_heart():
    """Trains a detector on two pictures of one coloured box each, the rate falling to zero, and looks for both boxes in its predictions."""
    def learn(model: nn.Module, truth: list[Sample], *, iterations: int, lr: float, score: float = 0.5, iou: float = 0.75) -> None:
        """The best prediction of each picture, in pixels twice as large, has the object's label, and at least that score and overlap."""
        picture = torch.zeros(2, 3, 64, 96)
        for image, target in zip(picture, truth, strict=True):
            x1, y1, x2, y2 = target.gt_instances.bboxes[0].int().tolist()
            image[target.gt_instances.labels[0], y1:y2, x1:x2] = 3.0
        batch = ImageBatch(picture, [(64, 96)] * 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        for iteration in range(iterations):
            optimizer.param_groups[0]["lr"] = lr * (1 - iteration / iterations)
            loss = sum(model(batch, truth, mode="loss").values())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            for result in model(batch, truth, mode="predict"):
                best = result.pred_instances[0]
                assert best.labels.tolist() == result.gt_instances.labels.tolist()
                assert best.scores.item() > score
                assert box_iou(best.bboxes / 2, result.gt_instances.bboxes).item() > iou
    return learn
