import io

import pytest
import torch
from mmengine.config import Config
from rich.console import Console
from torch import nn

from visionkit.engine import checkpointing_benchmark
from visionkit.engine.checkpointing_benchmark import Cost, as_table, held_bytes, measure_checkpointing, switched
from visionkit.models.base import Model
from visionkit.ops.checkpointing import Checkpointing, run_blocks
from visionkit.registry import BACKBONES, MODELS, ConfigError

SHAPES = {"type": "ShapesDataset", "num_images": 2, "size": (64, 64)}


@MODELS.register_module()
class ChainToMeasure(Model):
    def __init__(self, backbone, checkpointing=False):
        super().__init__()
        self.backbone = BACKBONES.make(backbone, at="backbone")
        self.checkpointing = Checkpointing.of(checkpointing)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.Tanh(), nn.Dropout(0.1)) for _ in range(9))

    def forward(self, images):
        return run_blocks(self.blocks, self.backbone(images.tensor)[0], checkpointing=self.checkpointing)

    def loss(self, images, samples):
        return {"loss": self(images).square().mean()}

    def predict(self, images, samples):
        return samples


CHAIN = {"type": "ChainToMeasure", "backbone": {"type": "ConvBlocks", "channels": (6,), "convs_per_block": 1}}


def config(model):
    pipeline = [{"type": "LoadAnnotations"}, {"type": "PackSample"}]
    return Config({"model": model, "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.1}},
                   "train_dataloader": {"batch_size": 1, "num_workers": 0, "sampler": {"type": "DrawSampler", "shuffle": False},
                                        "dataset": SHAPES | {"pipeline": pipeline}}})


@pytest.fixture
def in_this_process(monkeypatch):
    """A new process takes seconds, and how this one asks for memory is to stay."""
    class Here:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, *arguments):
            self.result = lambda: function(*arguments)
            return self

    monkeypatch.setattr(checkpointing_benchmark, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(checkpointing_benchmark, "keep_freed_memory", lambda: None)


def test_it_measures_every_policy_on_the_same_numbers(in_this_process):
    costs = {cost.policy: cost for cost in measure_checkpointing(config(CHAIN), iterations=1)}
    assert list(costs) == ["none", "every", "sqrt", "selective"]
    for cost in costs.values():
        assert (cost.loss, cost.gradient_norm) == (costs["none"].loss, costs["none"].gradient_norm)
        assert cost.seconds > 0
        assert cost.peak_bytes > cost.held_bytes
    assert costs["every"].held_bytes < 0.5 * costs["none"].held_bytes
    assert costs["every"].peak_bytes < costs["sqrt"].peak_bytes < costs["none"].peak_bytes
    assert costs["every"].held_bytes < costs["sqrt"].held_bytes < costs["none"].held_bytes            # 9 blocks are few
    if torch.__version__ >= "2.14":
        assert costs["every"].held_bytes < costs["selective"].held_bytes < costs["none"].held_bytes


def test_every_switch_of_a_model_is_found():
    model, places = switched(CHAIN, "sqrt")
    assert places == ["model", "model.backbone"]
    assert (model["checkpointing"], model["backbone"]["checkpointing"]) == ({"policy": "sqrt"},) * 2
    assert "checkpointing" not in CHAIN["backbone"]
    with pytest.raises(ConfigError, match="^model: no part of this model has an argument `checkpointing`"):
        next(measure_checkpointing(Config({"model": {"type": "MyModel"}})))


def test_what_is_held_counts_once_and_without_parameters():
    linear, x = torch.nn.Linear(4, 4, bias=False), torch.randn(2, 4, requires_grad=True)
    held, output = held_bytes(lambda: linear(x).exp() * linear(x[:1]), linear.parameters())
    assert held == (8 + 8 + 4) * 4                           # x, of which x[:1] is a part; exp's output, also a factor; the other factor
    assert output.requires_grad


def test_the_peak_of_tensors_is_the_most_at_a_time():
    """A million numbers and their exponentials; both are gone when a third million comes."""
    def call():
        x = torch.zeros(1_000_000)
        y = x.exp()
        del x, y
        return torch.zeros(1_000_000)

    assert 8_000_000 <= checkpointing_benchmark.peak_of_tensors(call) < 8_100_000


def test_the_table_is_relative_to_no_checkpointing_and_tells_what_differs():
    costs = [Cost("none", 4_000_000, 8_000_000, 0.1, 1.5, 2.0), Cost("every", 1_000_000, 4_000_000, 0.13, 1.5, 2.25)]
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(as_table(costs))
    rows = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in console.export_text().splitlines() if "│" in line]
    assert rows == [["none", "4.0", "1.00", "8.0", "1.00", "100", "1.00", "1.5", "2"],
                    ["every", "1.0", "0.25", "4.0", "0.50", "130", "1.30", "1.5", "2.25, not the same"]]
