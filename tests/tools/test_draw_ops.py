"""The pictures of docs/ops.md are drawn from what the ops tell of themselves."""
import importlib.util
import re
from pathlib import Path

import cv2
import pytest
import torch

from visionkit.ops import roi_align

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"


@pytest.fixture(scope="module")
def draw_ops():
    spec = importlib.util.spec_from_file_location("tools_draw_ops", ROOT / "tools" / "draw_ops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_taps_of_a_convolution_are_found(draw_ops):
    offset = torch.zeros(1, 18, 6, 7)
    offset[0, 2 * 4:2 * 4 + 2, 2, 3] = torch.tensor([0.25, -0.5])              # the middle tap, a quarter down and half a pixel left
    shares, taps = draw_ops.taps_of_convolution(offset, 6, 7, 2, 3)
    around = torch.tensor([[x, y] for y in (1.0, 2, 3) for x in (2.0, 3, 4)])
    around[4] += torch.tensor([-0.5, 0.25])
    torch.testing.assert_close(taps, around)
    assert shares[2, 3] == 0.75 * 0.5
    assert shares[3, 2] == 1 + 0.25 * 0.5
    assert shares.sum() == 9
    assert shares[0].sum() == 0


def test_the_pixels_of_bins_are_found(draw_ops):
    rois = torch.tensor([[0.0, 2, 1, 4, 2]])
    shares = draw_ops.pixels_of_bins(lambda maps: roi_align(maps, rois, (1, 2), 1.0, 1, True), 4, 6)
    assert shares.shape == (1, 2, 4, 6)
    assert shares.nonzero().tolist() == [[0, 0, 1, 2], [0, 1, 1, 3]]
    assert shares.sum() == 2


def test_the_groups_of_score_maps_are_found(draw_ops):
    def pool(maps):                                          # bin (i, j) reads pixel (i, j) of group 3 - (2 i + j)
        groups = maps[0].unflatten(0, (-1, 4))
        return torch.stack([torch.stack([groups[:, 3 - 2 * i - j, i, j] for j in range(2)], 1) for i in range(2)], 1)[None]
    shares, groups = draw_ops.pixels_of_score_maps(pool, 2, 3, 3)
    assert groups.tolist() == [[3, 2], [1, 0]]
    assert shares.nonzero().tolist() == [[0, 0, 0, 0], [0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 1, 1]]


def test_it_draws_the_pictures_that_the_page_shows(tool, tmp_path):
    assert tool("draw_ops", "--out", tmp_path) == 0
    drawn = {path.name: path for path in tmp_path.iterdir()}
    page = (ROOT / "docs" / "ops.md").read_text()
    shown, plotted = set(re.findall(r"\(pictures/([\w.]+)\)", page)), set(re.findall(r"--plot docs/pictures/([\w.]+)", page))
    assert set(drawn) == shown - plotted
    assert shown <= {path.name for path in PICTURES.iterdir()}
    for path in drawn.values():
        assert path.stat().st_size < 100_000
        height, width, _ = cv2.imread(str(path)).shape
        assert 250 < height < width < 1600
