"""What every data-loader worker does first."""
from __future__ import annotations

import os
import signal
import threading
from multiprocessing import parent_process
from multiprocessing.reduction import ForkingPickler

import cv2
import torch
from mmengine.registry import FUNCTIONS
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from visionkit.registry import load_plugins

LARGEST_COPY = 2**16                                         # bytes of a tensor


@FUNCTIONS.register_module()
def worker_init(worker_id: int) -> None:
    """Prepare one data-loader worker: `worker_init_fn=dict(type="worker_init")` in a config.

    One thread each for OpenCV and torch, since the workers are what runs in parallel, and the plugins, which a worker that was
    not forked has not loaded. Seeds come with every draw.

    A SIGTERM to the whole job (a scheduler's) is for the process that trains, which stops in an orderly way and needs its batch for it;
    the worker goes on, and ends when that process says so. macOS does not tell who sent a signal; there it ends the worker.

    From then on the worker hands over tensors of up to `LARGEST_COPY` bytes as copies: PyTorch opens shared memory and a connection for
    each tensor, which takes longer than to make a small image.
    """
    parent = parent_process()
    if parent and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_when_the_parent_says_so, args=(parent.pid,), daemon=True).start()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    load_plugins()
    ForkingPickler.register(Tensor, _copied_or_shared)


def _end_when_the_parent_says_so(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)                                              # at once, as torch's own handler does


def _copied_or_shared(tensor: Tensor) -> tuple:
    """How to pickle a tensor, as `__reduce__` tells it."""
    is_plain = tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.requires_grad and not tensor.is_quantized
    if not is_plain or tensor.nbytes > LARGEST_COPY:
        return reduce_tensor(tensor)
    whole = tensor.resolve_conj().clone(memory_format=torch.contiguous_format)           # an expanded tensor of one value has a stride of 0
    content = whole.flatten().view(torch.uint8).numpy().tobytes()
    return _copied, (content, tensor.dtype, tuple(tensor.shape))


def _copied(content: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=dtype).view(shape) if content else torch.empty(shape, dtype=dtype)
