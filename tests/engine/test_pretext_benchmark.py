import pytest
import torch

from visionkit.engine.pretext_benchmark import PUZZLES, measure_puzzles, measure_training, rotation_step, supervised_step

TRUNK = {"type": "ConvBlocks", "channels": (4, 8), "convs_per_block": 1}


def test_both_steps_compute_the_same_so_that_only_the_turning_differs():
    batch = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = [rotation_step(TRUNK, batch), supervised_step(TRUNK, batch)]
    losses = [[step().item() for _ in range(4)] for step in steps]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] != losses[0][0]                                               # and it learns


def test_a_row_counts_the_puzzles_of_all_images():
    (row,) = measure_puzzles(2, 1, puzzles={"rotations": ({"type": "FourRotations"}, 8, 4)})
    assert row.puzzles_per_second == pytest.approx(2 * 4 / row.seconds)
    (row,) = measure_training(2, 8, 1, trunks={"small": TRUNK})
    assert row.ratio == pytest.approx(row.rotation_seconds / row.supervised_seconds)


def test_every_puzzle_of_the_table_can_be_made():
    rows = list(measure_puzzles(1, 1, puzzles={name: case for name, case in PUZZLES.items() if "Jigsaw" not in name}))
    assert all(row.puzzles_per_second > 0 for row in rows)
