"""How many images a second the data path delivers, without a model."""
from __future__ import annotations

import time
from collections.abc import Sized

from mmengine.dataset import pseudo_collate
from torch.utils.data import DataLoader

from visionkit.datasets.sampler import InfiniteDrawSampler
from visionkit.datasets.workers import worker_init


def images_per_second(dataset: Sized, batch_size: int = 8, num_workers: int = 2, seconds: float = 5.0) -> float:
    """Load shuffled batches for about so many seconds and count the images.

    The clock starts when every worker has delivered once, so that starting them and first reads do not count.

    Args:
        dataset: with its whole pipeline.
        batch_size: images a batch, as in training.
        num_workers: processes, as in training; 0 loads in this one.
        seconds: how long to measure; at least one batch is measured.

    Raises:
        ValueError: no batch, no time, or a negative number of workers.
    """
    if batch_size < 1 or num_workers < 0 or seconds <= 0:
        raise ValueError(f"batch_size must be 1 or more, num_workers 0 or more, seconds above 0; got {batch_size=}, {num_workers=}, "
                         f"{seconds=}")
    loader = DataLoader(dataset, batch_size, sampler=InfiniteDrawSampler(dataset, seed=0), num_workers=num_workers,
                        collate_fn=pseudo_collate, worker_init_fn=worker_init)
    batches = iter(loader)
    # What the workers have prefetched while nobody looked is taken out of the queue before the clock starts.
    for _ in range(num_workers * (loader.prefetch_factor or 0) + 1):
        next(batches)
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < seconds:
        next(batches)
        count += batch_size
    return count / (time.perf_counter() - start)
