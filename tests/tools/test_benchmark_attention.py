"""The four studies at sizes that say nothing of speed, but all of what is compared, printed and drawn."""
import subprocess
import sys
import time
from pathlib import Path

import pytest

from visionkit.engine import attention_benchmark
from visionkit.engine.attention_benchmark import AttentionCost, crossing, exponent

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("study, lengths, ways", [
    ("flash", (5, 9), ["scaled_dot_product_attention", "flash_attention"]),
    ("varlen", (3, 7, 2), ["padded, with a mask", "varlen_attention", "loop", "mask of blocks"]),
])
def test_ways_that_are_the_same_agree_and_are_shown(tool, capsys, study, lengths, ways):
    assert tool("benchmark_attention", study, "--lengths", *lengths, "--heads", 2, "--channels", 4, "--repeats", 1) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {study} ")]
    assert [cells[3] for cells in lines] == ways * len(lines[0:len(lines) // len(ways)])
    assert {cells[2] for cells in lines} == {"forward", "forward + backward"}
    assert {cells[1] for cells in lines} == ({"5", "9"} if study == "flash" else {"12"})
    assert all(float(cells[6].removesuffix(" |")) < 1e-5 for cells in lines)


def test_the_crossing_and_the_exponents_are_told_and_drawn(tool, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "crossing.png"
    assert tool("benchmark_attention", "linear", "--lengths", 8, 16, "--channels", 4, "--repeats", 1, "--causal", "--plot", picture) == 0
    shown = capsys.readouterr().out
    assert "linear_attention, forward: time grows with N^" in shown
    assert "scaled_dot_product_attention, forward + backward: time grows with N^" in shown
    assert "efficient_attention" not in shown                               # which cannot be causal
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_step_of_generation_is_measured_forward_only(tool, capsys):
    assert tool("benchmark_attention", "generation", "--lengths", 8, 16, "--heads", 2, "--channels", 4, "--repeats", 1) == 0
    shown = capsys.readouterr().out
    lines = [line.split(" | ")[1:4] for line in shown.splitlines() if line.startswith("| generation ")]
    expected = [[tokens, "forward", way] for tokens in ("8", "16") for way in ("scaled_dot_product_attention", "linear_attention_step")]
    assert lines == expected
    assert "linear_attention_step, forward: time grows with N^" in shown


def test_a_result_that_differs_is_reported(tool, capsys, monkeypatch):
    monkeypatch.setattr(attention_benchmark, "flash_attention", lambda query, key, value, causal: value * 2)
    assert tool("benchmark_attention", "flash", "--lengths", 6, "--repeats", 1) == 1
    assert "DISAGREES" in capsys.readouterr().out


def row(tokens, ratio, seconds=1.0):
    return AttentionCost("linear", tokens, "forward", "ours", seconds, ratio, None, None)


def test_the_crossing_is_where_it_is_faster_from_then_on():
    rows = [row(64, 0.6), row(128, 1.2), row(256, 0.9), row(512, 1.5), row(1024, 4.0)]
    assert crossing(rows, "ours", "forward") == 512
    assert crossing(rows[:3], "ours", "forward") is None
    assert crossing(rows, "theirs", "forward") is None


def test_the_exponent_is_that_of_long_sequences():
    rows = [row(64, 1, 5.0), row(1024, 1, 1.0), row(2048, 1, 2.0**1.2), row(4096, 1, 4.0**1.2)]
    assert exponent(rows, "ours", "forward") == pytest.approx(1.2)
    assert exponent(rows[:1], "ours", "forward") is None


@pytest.mark.parametrize("arguments, message", [
    (["varlen", "--causal"], "--causal is for flash and linear"),
    (["flash", "--repeats", "0"], "--repeats and --lengths must be positive")])
def test_wrong_settings_are_told(tool, capsys, arguments, message):
    assert tool("benchmark_attention", *arguments) == 2
    assert message in capsys.readouterr().err


def test_help_is_answered_before_anything_heavy_is_imported():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-X", "importtime", ROOT / "tools" / "benchmark_attention.py", "--help"],
                              capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1
    assert "--lengths" in done.stdout
    assert " torch" not in done.stderr
