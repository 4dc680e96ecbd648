"""What the tests of several detectors share."""
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from visionkit.ops import box_iou
from visionkit.structures import ImageBatch, Sample

RANK = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
models, batches = torch.load(f"{folder}/given.pt", weights_only=False)
for model in models:
    parallel = DistributedDataParallel(model)           # lives until the gradients are averaged
    sum(parallel(*batches[rank], mode="loss").values()).backward()
gradients = [{name: value.grad for name, value in model.named_parameters() if value.requires_grad} for model in models]
torch.save(gradients, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture
def on_two_ranks(tmp_path):
    """The gradients of models after a step in two processes, each with one image of a batch of two, and the models' copies there."""
    def step(models: list[nn.Module], images: ImageBatch, samples: list[Sample]) -> list[list[dict[str, Tensor]]]:
        """By rank, then by model; names to gradients."""
        batches = [(ImageBatch(images.tensor[rank:rank + 1], images.sizes[rank:rank + 1]), samples[rank:rank + 1]) for rank in range(2)]
        torch.save((models, batches), tmp_path / "given.pt")
        ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path), str(rank)]) for rank in range(2)]
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
        return [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    return step


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
