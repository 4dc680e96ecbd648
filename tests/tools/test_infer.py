import json


def test_pictures_and_one_json_file_come_out(project, tool, capsys):
    assert tool("infer", "config.py", "weights.pth", "images", "--out-dir", "out") == 0
    assert "3 objects in 3 images: out/detections.json" in capsys.readouterr().out
    records = json.loads((project / "out" / "detections.json").read_text())
    assert [record["detections"][0]["box"] for record in records] == [[0, 8, 16, 24], [10, 8, 26, 24], [20, 8, 36, 24]]
    assert records[0]["detections"][0]["class"] == "block"
    assert sorted(file.name for file in (project / "out").iterdir()) == ["0.jpg", "1.jpg", "2.jpg", "detections.json"]


def test_flipped_views_in_bfloat16_find_the_same(project, tool, capsys):
    assert tool("infer", "config.py", "weights.pth", "images", "--out-dir", "out", "--tta", "--amp") == 0
    records = json.loads((project / "out" / "detections.json").read_text())
    assert [[one["box"] for one in record["detections"]] for record in records] == [[[0, 8, 16, 24]], [[10, 8, 26, 24]], [[20, 8, 36, 24]]]


def test_an_unreadable_input_is_named_and_the_others_are_done(project, tool, capsys):
    (project / "images" / "bad.png").write_bytes(b"")
    assert tool("infer", "config.py", "weights.pth", "images/0.png", "images/bad.png", "--out-dir", "out") == 1
    printed = capsys.readouterr()
    assert "1 objects in 1 images" in printed.out
    assert "images/bad.png: the file is empty" in printed.err


def test_a_users_error_is_one_message_and_exit_code_2(project, tool, capsys):
    for arguments, said in ((["imagess"], "no file or folder 'imagess'. Did you mean 'images'?"),
                            (["images", "--score-threshold", "30"], "score_threshold lies within 0 and 1"),
                            (["images", "--cfg-options", "model.tipe=x"], "tipe")):
        assert tool("infer", "config.py", "weights.pth", *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert said in error
