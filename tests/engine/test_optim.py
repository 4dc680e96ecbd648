"""Mixed precision."""
import pytest
import torch

from visionkit.registry import ConfigError


def test_amp_computes_in_bfloat16_and_keeps_weights_in_float32(toy, toy_parts, monkeypatch):
    kinds = []
    forward = toy_parts.ToyModel.forward

    def noting(self, images):
        kinds.append(self.features(images.tensor).dtype)
        return forward(self, images)
    monkeypatch.setattr(toy_parts.ToyModel, "forward", noting)
    runner = toy("amp", "+model.dropout=0.0", amp=True)
    assert set(kinds) == {torch.bfloat16}
    assert {value.dtype for value in runner.model.state_dict().values()} == {torch.float32}
    amp = list(toy_parts.LOSSES)
    kinds.clear()
    toy("full", "+model.dropout=0.0")
    assert set(kinds) == {torch.float32}
    assert amp == pytest.approx(toy_parts.LOSSES, rel=0.05)
    assert amp != toy_parts.LOSSES


def test_amp_refuses_a_wrapper_that_it_would_replace(toy):
    with pytest.raises(ConfigError, match=r"optim_wrapper\.type: --amp .*'AmpOptimWrapper'"):
        toy("run", "optim_wrapper.type=AmpOptimWrapper", amp=True)
