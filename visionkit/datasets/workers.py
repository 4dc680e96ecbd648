"""What every data-loader worker does first."""
from __future__ import annotations

import cv2
import torch
from mmengine.registry import FUNCTIONS

from visionkit.registry import load_plugins


@FUNCTIONS.register_module()
def worker_init(worker_id: int) -> None:
    """Prepare one data-loader worker: `worker_init_fn=dict(type="worker_init")` in a config.

    One thread each for OpenCV and torch, since the workers are what runs in parallel, and the plugins, which a worker that was
    not forked has not loaded. Seeds come with every draw.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    load_plugins()
