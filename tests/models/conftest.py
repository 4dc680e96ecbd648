"""What the tests of several kinds of models share."""
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from visionkit.structures import ImageBatch, Sample

RANK = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

store, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=120))
for folder in map(str.strip, sys.stdin):
    models, batches = torch.load(f"{folder}/given.pt", weights_only=False)
    for model in models:
        torch.manual_seed(rank)
        parallel = DistributedDataParallel(model)           # lives until the gradients are averaged
        sum(term for name, term in parallel(*batches[rank], mode="loss").items() if "loss" in name).backward()
    gradients = [{name: value.grad for name, value in model.named_parameters() if value.requires_grad} for model in models]
    torch.save(gradients, f"{folder}/{rank}.pt")
    print("done", flush=True)
dist.destroy_process_group()
"""


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """Starts two processes that wait for work, or gives those that do: to begin takes them longer than any step."""
    ranks = []

    def start() -> list[subprocess.Popen]:
        if not ranks or any(rank.poll() is not None for rank in ranks):
            end()
            store = tmp_path_factory.mktemp("ranks") / "store"
            ranks[:] = [subprocess.Popen([sys.executable, "-c", RANK, str(store), str(rank)], text=True, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE) for rank in range(2)]
        return ranks

    def end() -> None:
        for rank in ranks:
            rank.kill()                                      # one may wait for another that is gone
            rank.communicate()

    yield start
    end()


@pytest.fixture
def on_two_ranks(two_ranks, tmp_path):
    """The gradients of models after a step in two processes, each with half of the images, seeded with the number of its rank."""
    def step(models: list[nn.Module], images: ImageBatch, samples: list[Sample]) -> list[list[dict[str, Tensor]]]:
        """By rank, then by model; names to gradients."""
        half = len(images) // 2
        batches = [(ImageBatch(images.tensor[part], images.sizes[part]), samples[part]) for part in (slice(half), slice(half, None))]
        torch.save((models, batches), tmp_path / "given.pt")
        ranks = two_ranks()
        for rank in ranks:
            print(tmp_path, file=rank.stdin, flush=True)
        assert [rank.stdout.readline() for rank in ranks] == ["done\n"] * 2
        return [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    return step
