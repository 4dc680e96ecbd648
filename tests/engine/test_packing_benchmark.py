import pytest
import torch

from visionkit.engine.op_benchmark import PASSES
from visionkit.engine.packing_benchmark import Shape, build_call, measure_packing

SMALL = Shape(channels=16, num_heads=2, hidden_channels=24, grids=((2, 2), (2, 6)))


def test_the_shape_is_the_one_of_the_bar():
    """8 images of 64 to 1024 patches, 3428 in all; 16 heads of 72 channels."""
    shape = Shape()
    lengths = [h * w for h, w in shape.grids]
    assert (len(lengths), min(lengths), max(lengths), sum(lengths)) == (8, 64, 1024, 3428)
    assert shape.channels / shape.num_heads == 72


@pytest.mark.parametrize("passes", PASSES)
def test_both_forms_compute_the_same_so_that_only_the_padding_differs(passes):
    packed, padded = (build_call(form, passes, SMALL)() for form in ("packed", "padded"))
    assert len(packed) == (1 if passes == PASSES[0] else 12)
    for ours, theirs in zip(packed, padded, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_row_has_both_times_and_their_ratio():
    rows = list(measure_packing(1, SMALL, memory=False))
    assert [row.passes for row in rows] == list(PASSES)
    for row in rows:
        assert row.times_faster == pytest.approx(row.padded_seconds / row.packed_seconds)
        assert row.memory is None
        assert row.difference < 1e-4
