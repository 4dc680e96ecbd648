import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from visionkit.datasets import Dataset, DrawSampler, ShapesDataset, images_per_second, worker_init

PIPELINE = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="RandomFlip", prob=0.5),
            dict(type="PhotoMetricDistortion"), dict(type="PackSample")]


def batches(num_workers, **arguments):
    dataset = ShapesDataset(12, size=(48, 48), pipeline=PIPELINE)
    loader = DataLoader(dataset, batch_size=3, sampler=DrawSampler(dataset, seed=1), num_workers=num_workers,
                        collate_fn=pseudo_collate, **arguments)
    return [(sample.img_id, sample.flip, image.sum().item()) for batch in loader
            for image, sample in zip(batch["inputs"], batch["data_samples"], strict=True)]


def test_augmentation_does_not_depend_on_the_number_of_workers():
    alone = batches(0)
    assert len({flip for _, flip, _ in alone}) == 2
    assert alone == batches(1) == batches(2)


def test_the_runner_finds_worker_init_by_its_name():
    dataset = Threads(pipeline=[])
    loader = Runner.build_dataloader(dict(dataset=dataset, sampler=DrawSampler(dataset, seed=0), batch_size=1, num_workers=1,
                                          worker_init_fn=dict(type="worker_init")), seed=0)
    assert [batch["threads"] for batch in loader] == [[(1,), (1,)]]                                # pseudo_collate transposes tuples


class Threads(Dataset):
    """One record: how many threads OpenCV and torch use in the process that loads it."""

    def load_data_list(self):
        return [{}]

    def get_data_info(self, idx):
        return {"threads": (cv2.getNumThreads(), torch.get_num_threads())}


class Tensors(Dataset):
    """A tensor a record, of each kind that a sample may hold, and last one that is too large to copy."""
    kinds = (torch.arange(6).view(2, 3), torch.tensor(2.5).expand(1), torch.zeros(0, 4), torch.tensor([True, False]),
             torch.arange(6.0).view(2, 3).T, torch.ones(3, dtype=torch.bfloat16), torch.full((3,), 1 + 2j).conj(),
             torch.ones(2, 2**15 + 1, dtype=torch.uint8))

    def load_data_list(self):
        return [{} for _ in self.kinds]

    def get_data_info(self, idx):
        return {"tensor": self.kinds[idx]}


def test_workers_hand_over_small_tensors_as_copies_and_large_ones_in_shared_memory():
    loader = DataLoader(Tensors(pipeline=[]), batch_size=None, num_workers=1, worker_init_fn=worker_init)
    received = [record["tensor"] for record in loader]
    for tensor, sent in zip(received, Tensors.kinds, strict=True):
        assert tensor.dtype == sent.dtype
        assert tensor.shape == sent.shape
        assert torch.equal(tensor, sent)
        tensor += True                                       # it may be written to
    assert [tensor.is_shared() for tensor in received] == [False] * 7 + [True]


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system does not tell who sent a signal")
def test_a_worker_ends_when_its_loader_says_so_and_not_by_anybody_elses_sigterm():
    loader = DataLoader(range(100), batch_size=None, num_workers=1, worker_init_fn=worker_init)
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers
    subprocess.run([sys.executable, "-c", f"import os, signal; os.kill({worker.pid}, signal.SIGTERM)"], check=True)
    assert list(batches) == list(range(1, 100))
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers
    worker.terminate()
    worker.join(10)
    ended = worker.exitcode
    worker.kill()                                            # or the interpreter would wait for it
    assert ended == 0


def test_throughput_counts_images_and_refuses_nonsense():
    dataset = ShapesDataset(8, size=(32, 32), pipeline=PIPELINE)
    assert images_per_second(dataset, batch_size=2, num_workers=0, seconds=0.05) > 1
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        images_per_second(dataset, batch_size=0)


class Records(Dataset):
    """50,000 records about as large as an image of COCO's with seven boxes, and no images."""

    def load_data_list(self):
        rng = np.random.default_rng(0)
        boxes = rng.uniform(0, 640, (50_000, 7, 4)).round(2).tolist()
        return [{"img_id": i, "img_path": f"{i:012d}.jpg", "height": 480, "width": 640,
                 "instances": [{"bbox": box, "bbox_label": 1, "ignore_flag": 0, "area": 100.0, "id": 7 * i + n}
                               for n, box in enumerate(rows)]} for i, rows in enumerate(boxes)]


def memory_mib(pid):
    """The proportional share of a process in memory, or all that is resident where the kernel does not tell the share."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    except OSError:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory figures from /proc")
def test_worker_memory_does_not_grow_with_epochs(capsys):
    dataset = Records(pipeline=[lambda record: len(record["instances"])])
    loader = DataLoader(dataset, batch_size=500, shuffle=True, num_workers=2, collate_fn=list, persistent_workers=True)
    memory, loaded = [], 0
    for _ in range(5):
        for number, batch in enumerate(loader):
            loaded += sum(batch)
            if not memory and number == 5:                   # both workers run, and have seen little: a list of dicts would grow from here
                memory.append([memory_mib(worker.pid) for worker in loader._iterator._workers])
        memory.append([memory_mib(worker.pid) for worker in loader._iterator._workers])
    assert loaded == 5 * 50_000 * 7
    with capsys.disabled():                                  # the figures in docs/data.md
        print(f"\n{dataset.data_bytes.nbytes / 2**20:.0f} MiB of annotations; two workers' MiB (PSS) after 6 batches, then each epoch: "
              + ", ".join(f"{first:.0f} + {second:.0f}" for first, second in memory))
    growth = [last - first for first, last in zip(memory[0], memory[-1], strict=True)]
    assert max(growth) < 10
