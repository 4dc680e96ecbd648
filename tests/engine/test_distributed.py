"""Several processes: the same run as one."""
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from visionkit.engine import load_config, train
from visionkit.engine.distributed import end_processes
from visionkit.registry import ConfigError

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SAME_IMAGES = """
model = dict(dropout=0.0)
train_dataloader = dict(batch_size={batch_size}, dataset=dict(length=24))
train_cfg = dict(max_epochs=3)
default_hooks = dict(logger=dict(interval=1))
"""


def torchrun(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", ROOT / "tools" / "train.py", *arguments,
         "--launcher", "pytorch"], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
             **environment})


@pytest.mark.slow
def test_two_ranks_at_batch_4_train_as_one_at_batch_8(toy, toy_file, toy_parts, tmp_path):
    toy("one", more=SAME_IMAGES.format(batch_size=8))
    one = list(toy_parts.LOSSES)
    done = torchrun(toy_file(SAME_IMAGES.format(batch_size=4)), "--work-dir", tmp_path / "two", TOY_LOSSES=str(tmp_path / "losses"))
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in (0, 1):
        two = [float(line) for line in (tmp_path / f"losses.{rank}").read_text().splitlines()]
        assert two == pytest.approx(one, abs=1e-4)
        assert len(two) == 9
    # and they stop together when one is asked to, and go on as one process
    stop = SAME_IMAGES.format(batch_size=4) + "custom_hooks = [dict(type='ToyRecorder', signal_at=4)]\n"
    done = torchrun(toy_file(stop), "--work-dir", tmp_path / "stopped")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("To go on: torchrun --nproc-per-node=2 ") == 1
    toy("stopped", more=SAME_IMAGES.format(batch_size=8), resume=True)
    assert one[5:] == pytest.approx(toy_parts.LOSSES, abs=1e-4)


def test_what_holds_the_group_is_freed_before_the_interpreter_ends(tmp_path):
    class Runner:
        """Refers to itself, as mmengine's does through its hooks and loops."""
        def __init__(self, model):
            self.model, self.runner = model, self

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    model = DistributedDataParallel(nn.Linear(1, 1))
    alive = weakref.ref(model)
    runner = Runner(model)
    del model, runner
    assert alive() is not None
    end_processes()
    assert alive() is None
    assert not dist.is_initialized()


def test_the_launcher_wants_torchrun(toy_file, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="launcher: .*started by torchrun, which sets RANK"):
        train(load_config(toy_file()), work_dir=tmp_path, launcher="pytorch")
    with pytest.raises(ConfigError, match="launcher is one of none, pytorch; got 'slurm'"):
        train(load_config(toy_file(), ["launcher=slurm"]), work_dir=tmp_path)
