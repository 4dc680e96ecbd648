import numpy as np
import pytest

from visionkit.visualization import draw_neighbours
from visionkit.visualization.neighbours import QUERY, RIGHT, UNKNOWN, WRONG

GREY = np.full((32, 32, 3), 128, np.uint8)


def frames(labels):
    """The colour of each frame of a sheet of grey images, row by row."""
    sheet = draw_neighbours([[GREY] * len(row) for row in labels], labels, ("cat", "dog"))
    colors = {name: (sheet == color).all(2) for name, color in
              {"query": QUERY, "right": RIGHT, "wrong": WRONG, "unknown": UNKNOWN}.items()}
    height, width = sheet.shape[0] // len(labels), sheet.shape[1] // len(labels[0])
    return [[max(colors, key=lambda name: colors[name][y * height:(y + 1) * height, x * width:(x + 1) * width].sum())
             for x in range(len(labels[0]))] for y in range(len(labels))]


def test_frames_tell_the_query_and_what_is_right_and_wrong():
    assert frames([[0, 0, 1], [1, 0, 1], [None, None, 1], [1, None, 0]]) == [
        ["query", "right", "wrong"], ["query", "wrong", "right"], ["query", "unknown", "unknown"], ["query", "unknown", "wrong"]]


def test_what_is_wrong_is_said_in_words_too(monkeypatch):
    said = []
    monkeypatch.setattr("visionkit.visualization.neighbours.contact_sheet", lambda *_, captions, **__: said.extend(captions))
    draw_neighbours([[GREY] * 4], [[1, 0, 1, 2]], ("cat", "dog"))
    assert said == ["dog", "x cat", "dog", "x 2"]


@pytest.mark.parametrize("images, labels", [([], []), ([[GREY, GREY]], [[0]]), ([[GREY], [GREY, GREY]], [[0], [0, 0]])])
def test_rows_out_of_step_are_refused(images, labels):
    with pytest.raises(ValueError, match="as many images as labels"):
        draw_neighbours(images, labels)
