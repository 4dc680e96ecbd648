"""What the tests of several kinds of models share."""
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
    torch.manual_seed(rank)
    parallel = DistributedDataParallel(model)           # lives until the gradients are averaged
    sum(term for name, term in parallel(*batches[rank], mode="loss").items() if "loss" in name).backward()
gradients = [{name: value.grad for name, value in model.named_parameters() if value.requires_grad} for model in models]
torch.save(gradients, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture
def on_two_ranks(tmp_path):
    """The gradients of models after a step in two processes, each with half of the images, seeded with the number of its rank."""
    def step(models: list[nn.Module], images: ImageBatch, samples: list[Sample]) -> list[list[dict[str, Tensor]]]:
        """By rank, then by model; names to gradients."""
        half = len(images) // 2
        batches = [(ImageBatch(images.tensor[part], images.sizes[part]), samples[part]) for part in (slice(half), slice(half, None))]
        torch.save((models, batches), tmp_path / "given.pt")
        ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path), str(rank)]) for rank in range(2)]
        try:
            assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
        finally:
            for rank in ranks:
                rank.kill()                                  # one that waits for another that is gone
        return [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    return step
