"""What the tests of several detectors share."""
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

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
