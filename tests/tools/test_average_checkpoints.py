import runpy
import sys
from pathlib import Path

import pytest
import torch

from visionkit.engine.checkpoint import read_checkpoint

TOOL = str(Path(__file__).parents[2] / "tools" / "average_checkpoints.py")


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(TOOL, run_name="__main__")
    return ended.value.code


def test_it_writes_the_mean_and_tells_what_it_did(tmp_path, monkeypatch, capsys):
    for number in (1, 3):
        torch.save({"state_dict": {"weight": torch.full((2,), float(number))}}, tmp_path / f"{number}.pth")
    out = tmp_path / "mean.safetensors"
    assert run(monkeypatch, out, tmp_path / "1.pth", tmp_path / "3.pth") == 0
    assert "1 tensors, each the mean of 2" in capsys.readouterr().out
    assert read_checkpoint(out)["state_dict"]["weight"].tolist() == [2.0, 2.0]


def test_a_missing_file_is_told_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, tmp_path / "epoch_1.pth")
    out = tmp_path / "mean.safetensors"
    assert run(monkeypatch, out, tmp_path / "epoch_1.pth", tmp_path / "epoch_2.pth") == 2
    assert "epoch_2.pth'. Did you mean 'epoch_1.pth'?" in capsys.readouterr().err
    assert not out.exists()
