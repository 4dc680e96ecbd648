import pytest
import torch

from visionkit.engine import detr_benchmark


@pytest.mark.parametrize("name", [detr_benchmark.OURS, *detr_benchmark.PEERS])
def test_a_step_trains_and_leaves_no_gradients_behind(name, monkeypatch):
    if name != detr_benchmark.OURS:
        pytest.importorskip("transformers", reason="what is measured beside: pip install -e '.[test]'")
        pytest.importorskip("timm", reason="what is measured beside: pip install -e '.[test]'")
    monkeypatch.setattr(detr_benchmark, "_HEIGHT", 64)
    monkeypatch.setattr(detr_benchmark, "_WIDTH", 96)
    step = detr_benchmark.build_step(name)
    (model,) = (cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, torch.nn.Module))
    trained = []
    for key, parameter in model.named_parameters():
        if "backbone" in key and parameter.requires_grad:
            parameter.register_hook(lambda grad, key=key: trained.append(key))
    step()
    assert len(trained) == (53 if name == detr_benchmark.PEERS[1] else 42)      # the stem and the first stage are 11 convolutions
    assert all(parameter.grad is None for parameter in model.parameters())
