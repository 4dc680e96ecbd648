import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from visionkit.registry import MODELS

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.mark.parametrize("name", ["train", "test", "infer", "check", "draw_neighbours", "draw_sampling"])
def test_help_answers_before_anything_heavy_is_imported(name):
    code = ("import runpy, sys; sys.argv = ['tool', '--help']\n"
            f"try: runpy.run_path({str(TOOLS / f'{name}.py')!r}, run_name='__main__')\n"
            "except SystemExit: sys.exit(bool({'torch', 'mmengine', 'numpy', 'visionkit'} & set(sys.modules)))")
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "usage" in done.stdout
    assert time.perf_counter() - start < 5                   # 0.1 s where nothing else runs


def test_the_table_the_detections_and_the_pictures_come_out(project, tool, capfd):
    code = tool("test", "config.py", "weights.pth", "--out", "found/all.json", "--show-dir", "show", "--work-dir", "work")
    printed = "".join(capfd.readouterr())
    assert code == 0
    assert printed.count("Average Precision  (AP) @[ IoU=") == 6
    assert "maxDets=100 ] = 1.000" in printed
    assert "block" in printed
    found = json.loads((project / "found" / "all.json").read_text())
    assert found[1] == {"image_id": 2, "category_id": 5, "bbox": [10, 8, 16, 16], "score": 1}
    assert sorted(file.name for file in (project / "show").iterdir()) == ["1.jpg", "2.jpg", "3.jpg"]
    assert (project / "work").is_dir()
    assert not (project / "work_dirs").exists()


@pytest.mark.parametrize("ways", [["--tta"], ["--amp"], ["--tta", "--amp"]], ids=" ".join)
def test_flipped_views_and_bfloat16_find_the_same(project, tool, capfd, monkeypatch, ways):
    model, autocast = MODELS.get("WhiteBlock"), []
    forward = model.forward

    def noting(self, images):
        autocast.append(torch.is_autocast_enabled(images.tensor.device.type))
        return forward(self, images)

    monkeypatch.setattr(model, "forward", noting)
    assert tool("test", "config.py", "weights.pth", *ways, "--out", "all.json", "--show-dir", "show", "--work-dir", "work") == 0
    assert "maxDets=100 ] = 1.000" in "".join(capfd.readouterr())
    assert [one["bbox"] for one in json.loads((project / "all.json").read_text())] == [[0, 8, 16, 16], [10, 8, 16, 16], [20, 8, 16, 16]]
    assert len(list((project / "show").iterdir())) == 3
    assert autocast == ["--amp" in ways] * (4 if "--tta" in ways else 2)                     # two batches, of each view


@pytest.mark.parametrize("arguments, said", [
    (["config.py", "weights.pth", "--tta", "--cfg-options", "+tta={'scale': [1]}"], "tta.scale"),
    (["none.py", "weights.pth"], "no config file 'none.py'"),
    (["config.py", "none.pth"], "none.pth"),
    (["config.py", "weights.pth", "--cfg-options", "test_evaluator.bakend=x"], "bakend"),
    (["config.py", "weights.pth", "--cfg-options", "model.type=WhiteBlok"], "model.type: no model named 'WhiteBlok'. Did you mean"),
    (["config.py", "weights.pth", "--out", "all.txt"], ".json"),
    (["config.py", "weights.pth", "--out", "a.json", "--cfg-options", "test_evaluator.type=DumpResults",
      "+test_evaluator.out_file_path=a.pkl"], "CocoMetric"),
])
def test_a_users_error_is_one_message_and_exit_code_2(project, tool, capsys, arguments, said):
    assert tool("test", *arguments, "--work-dir", "work") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert "Traceback" not in error


def test_the_traceback_is_there_for_those_who_ask(project, tool):
    with pytest.raises(ValueError, match="no config file"):
        tool("test", "none.py", "weights.pth", "--traceback")
