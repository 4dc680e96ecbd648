from visionkit.engine import packing_benchmark


def test_it_prints_a_row_a_pass_and_what_is_below_the_bar_is_told_by_the_exit_code(tool, capsys, monkeypatch):
    monkeypatch.setattr(packing_benchmark, "TIME_BAR", 0.0)
    assert tool("benchmark_packing", "--smallest", "--repeats", 1, "--no-memory") == 0
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split(" | ")[0] for row in rows] == ["| forward", "| forward + backward"]
    monkeypatch.setattr(packing_benchmark, "TIME_BAR", 1e9)
    assert tool("benchmark_packing", "--smallest", "--repeats", 1, "--no-memory") == 1
    assert "BELOW" in capsys.readouterr().out
