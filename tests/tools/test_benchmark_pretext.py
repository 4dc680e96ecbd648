from visionkit.engine import pretext_benchmark


def test_it_prints_a_row_of_training_and_one_of_puzzles(tool, capsys, monkeypatch):
    monkeypatch.setattr(pretext_benchmark, "BAR", 1e9)
    assert tool("benchmark_pretext", "--smallest", "--repeats", 1, "--images", 1, "--puzzle-images", 2) == 0
    training, puzzles = (block.splitlines()[2:] for block in capsys.readouterr().out.split("\n\n")[1:])
    assert [line.split(" | ")[0] for line in training + puzzles] == ["| ConvBlocks", "| FourRotations, 32 px"]
    assert all(float(cell) > 0 for cell in (*training[0].strip("| ").split("|")[2:], *puzzles[0].strip("| ").split("|")[1:]))


def test_a_step_that_takes_longer_than_the_bar_is_told_by_the_exit_code(tool, capsys, monkeypatch):
    monkeypatch.setattr(pretext_benchmark, "BAR", 0.0)
    assert tool("benchmark_pretext", "--smallest", "--repeats", 1, "--images", 1, "--puzzle-images", 2) == 1
    assert "ABOVE 0" in capsys.readouterr().out
