import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from visionkit.engine.matcher_benchmark import match_by_cross_product
from visionkit.models.targets import SetTarget

ROOT = Path(__file__).parents[2]
pytest.importorskip("torchvision", reason="the other form takes torchvision's generalized IoU: pip install -e '.[bench]'")


def test_it_prints_a_row_with_both_times():
    done = subprocess.run([sys.executable, ROOT / "tools" / "benchmark_matcher.py", "--smallest", "--repeats", "1"], capture_output=True,
                          text=True, timeout=120, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    cells = done.stdout.splitlines()[-1].strip("|").split("|")
    assert [cell.strip() for cell in cells[:3]] == ["1", "100", "1"]
    assert all(float(cell) > 0 for cell in cells[3:])


def test_the_other_form_takes_of_each_image_its_own_objects():
    boxes = torch.tensor([[[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]], [[0.7, 0.7, 0.2, 0.2], [0.6, 0.7, 0.2, 0.2]]])
    targets = [SetTarget(torch.tensor([0]), boxes[0, 1:]), SetTarget(torch.tensor([0]), boxes[1, :1])]
    pairs = match_by_cross_product(torch.zeros(2, 2, 3), boxes, targets)
    assert [queries.tolist() for queries, _ in pairs] == [[1], [0]]
