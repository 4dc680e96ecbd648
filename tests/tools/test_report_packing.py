import pytest


def test_each_packer_is_reported(project, tool, capsys):
    assert tool("report_packing", "config.py", "--max-tokens", "50", "--processes", "2") == 0
    printed = capsys.readouterr().out
    for packer in ("next_fit", "best_fit", "balanced"):      # three images of 48x64 are 4 x 6 patches each: two go into a pack
        assert f"{packer}\n  packs             2 of at most 50 tokens (the tokens alone would take 2)" in printed
    assert printed.count("fill              0.720") == 3
    assert printed.count("tokens a process  48, 24; waits 25.0% of a step for the longest") == 3


def test_what_the_config_says_is_the_default(project, tool, capsys):
    with open("config.py", "a") as file:
        file.write("train_dataloader = dict(loader, batch_sampler=dict(type='PackedBatchSampler', max_tokens=7, filter_overlong=True,\n"
                   "                                                     length=dict(type='ImageTokens', merged=True)))\n")
    assert tool("report_packing", "config.py", "--packers", "best_fit") == 0
    assert "packs             3 of at most 7 tokens" in capsys.readouterr().out
    length = "{'type': 'ImageTokens', 'patch_size': 24, 'merge': 1}"
    assert tool("report_packing", "config.py", "--length", length, "--packers", "next_fit") == 0
    assert "6 to" not in capsys.readouterr().out


def test_a_config_without_images_is_one_message(project, tool, capsys):
    with open("empty.py", "w") as file:
        file.write("x = 1")
    assert tool("report_packing", "empty.py", "--max-tokens", "50") == 2
    assert "empty.py has no train_dataloader" in capsys.readouterr().err


def test_a_length_that_python_cannot_read_is_one_message(project, tool, capsys):
    with pytest.raises(SystemExit):
        tool("report_packing", "config.py", "--max-tokens", "50", "--length", "{'type':")
    assert "--length: must be a name or a dict as Python writes it, got {'type':" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    ([], "say how many tokens a pack holds, --max-tokens"),
    (["--max-tokens", "0"], "max_tokens is how many tokens a pack holds at most, 1 or more; got 0"),
    (["--max-tokens", "50", "--packers", "best"], "no packer named 'best'. Did you mean"),
    (["--max-tokens", "9", "--filter-overlong"], "no sample has 9 tokens or less"),
], ids=["no limit", "a limit of 0", "no packer", "nothing fits"])
def test_wrong_arguments_are_told(project, tool, capsys, arguments, message):
    assert tool("report_packing", "config.py", *arguments) == 2
    assert message in capsys.readouterr().err
