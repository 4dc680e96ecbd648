import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_prints_both_memory_orders_and_the_data_path():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "benchmark_training.py", ROOT / "configs" / "quickstart.py", "--iterations", "1",
         "--compare-memory-order", "--cfg-options", "train_dataloader.batch_size=1", "train_dataloader.num_workers=0",
         "train_dataloader.persistent_workers=False", "train_dataloader.dataset.num_images=8", "train_dataloader.dataset.size=(64, 64)"],
        capture_output=True, text=True, timeout=120, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    numbers = [float(number) for number in re.findall(r"^ *([\d.]+) (?:s an iteration|images/s)", done.stdout, re.MULTILINE)]
    assert len(numbers) == 4
    assert all(number > 0 for number in numbers)
