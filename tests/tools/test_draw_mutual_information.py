import cv2
import pytest

from visionkit.engine import mutual_information


@pytest.fixture(autouse=True)
def two_estimators(monkeypatch):
    kept = {name: mutual_information.ESTIMATORS[name] for name in ("DV", "InfoNCE, N = 16")}
    monkeypatch.setattr(mutual_information, "ESTIMATORS", kept)


def test_the_table_is_printed_and_the_picture_drawn(tool, tmp_path, capsys):
    out = tmp_path / "new" / "found.png"
    assert tool("draw_mutual_information", "--truths", "4", "1", "--iterations", "1", "--dimension", "2", "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("| estimator | batch | cap | I = 1 | I = 4 |\n")
    assert printed.rstrip().endswith(str(out))
    assert cv2.imread(str(out)).std() > 5                    # not an empty sheet


def test_a_users_error_is_one_message_and_exit_code_2(tool, capsys):
    assert tool("draw_mutual_information", "--truths", "0") == 2
    assert "--truths above 0" in capsys.readouterr().err
