"""A toy run: a config on disk that trains in well under a second."""
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
RUNTIME = HERE.parents[1] / "configs" / "_base_" / "runtime.py"

TOY = """
_base_ = {runtime!r}
custom_imports = dict(imports=["toy_parts"])
model = dict(type="ToyModel")
train_dataloader = dict(batch_size=2, num_workers=0, sampler=dict(type="DrawSampler"), dataset=dict(type="ToyData", length=11))
train_cfg = dict(type="EpochLoop", max_epochs=2)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1, momentum=0.9))
param_scheduler = [dict(type="LinearLR", start_factor=0.1, by_epoch=False, end=3), dict(type="CosineAnnealingLR")]
custom_hooks = [dict(type="ToyRecorder")]
"""
VALIDATION = """
val_dataloader = dict(batch_size=2, sampler=dict(type="DrawSampler", shuffle=False), dataset=dict(type="ToyData", length=4, augment=False))
val_cfg = dict(type="ValLoop")
val_evaluator = dict(type="ToyMetric")
"""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def toy_parts(monkeypatch):
    """The module `toy_parts`, with nothing recorded yet."""
    monkeypatch.syspath_prepend(str(HERE))
    import toy_parts
    for record in (toy_parts.SEEN, toy_parts.LOSSES, toy_parts.RATES):
        record.clear()
    yield toy_parts
    sys.modules.pop("toy_parts")


@pytest.fixture
def toy_file(tmp_path, toy_parts):
    """Writes the toy config with `more` lines on top of it."""
    def write(more: str = "") -> Path:
        (tmp_path / "toy_base.py").write_text(TOY.format(runtime=str(RUNTIME)))
        path = tmp_path / "toy.py"
        path.write_text('_base_ = "toy_base.py"\n' + more)
        return path
    return write


@pytest.fixture
def toy(toy_file, tmp_path):
    """Trains the toy config with `options` in the folder `name`, after forgetting what was recorded before; the runner."""
    import toy_parts

    from visionkit.engine import load_config, train

    def run(name: str = "run", *options: str, more: str = "", **arguments):
        for record in (toy_parts.SEEN, toy_parts.LOSSES, toy_parts.RATES):
            record.clear()
        return train(load_config(toy_file(more), options), work_dir=tmp_path / name, **arguments)
    return run


@pytest.fixture
def validation():
    return VALIDATION
