import torch

from visionkit.ops.windows import axis_windows, cross, runs


def test_runs_are_consecutive_integers_end_to_end():
    owner, integers = runs(torch.tensor([5, 0, 7]), torch.tensor([2, 0, 3]))
    assert owner.tolist() == [0, 0, 2, 2, 2]
    assert integers.tolist() == [5, 6, 7, 8, 9]


def test_a_window_holds_each_pixel_between_its_samples_once():
    # bin 0 has samples at 1.5, 2.5 and 2.75, bin 1 one on the last pixel, 4
    low, high = torch.tensor([1, 2, 2, 4]), torch.tensor([2, 3, 3, 4])
    windows = axis_windows(low, high, torch.tensor([3, 1]))
    assert (windows.start.tolist(), windows.count.tolist(), windows.bin.tolist()) == ([0, 3], [3, 1], [0, 0, 0, 1])
    assert windows.pixel.tolist() == [1, 2, 3, 4]
    assert windows.spread(torch.tensor([0.5, 0.5, 0.25, 1]), torch.tensor([0.5, 0.5, 0.75, 0])).tolist() == [0.5, 1.25, 1.25, 1]


def test_crossing_pairs_each_row_of_a_window_with_each_column():
    crossing = cross(torch.tensor([10, 20]), torch.tensor([2, 1]), torch.tensor([0, 5]), torch.tensor([2, 3]))
    assert list(zip(crossing.bag.tolist(), crossing.y.tolist(), crossing.x.tolist(), strict=True)) == [
        (0, 10, 0), (0, 10, 1), (0, 11, 0), (0, 11, 1), (1, 20, 5), (1, 20, 6), (1, 20, 7)]
    assert crossing.starts.tolist() == [0, 4]
