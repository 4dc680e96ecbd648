"""Normalisers that make a loss independent of how a batch is spread over processes."""
from __future__ import annotations

import torch
import torch.distributed as dist


def mean_over_ranks(count: int | float, device: torch.device) -> float:
    """The mean of `count` over all processes, at least 1.

    DDP averages gradients over ranks. A sum divided by this mean is therefore, after DDP, the sum over the whole batch divided by the
    count of the whole batch, however the images fell.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        total = torch.tensor(float(count), device=device)
        dist.all_reduce(total)
        count = total.item() / dist.get_world_size()
    return max(float(count), 1.0)
