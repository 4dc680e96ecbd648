import cv2


def test_report_sheet_and_speed_come_out(project, tool, capsys):
    assert tool("check", "config.py", "--out", "sheets", "--seconds", "0.1") == 0
    printed = capsys.readouterr().out
    assert "pre-flight passed" in printed
    assert "boxes per class   block 3, newt 0" in printed
    assert "nothing wrong found (every file read)" in printed
    assert "images/s with 0 workers" in printed
    assert printed.count("CocoDataset") == 1                 # the three loaders have the same data set: it is reported once
    sheet = cv2.imread(str(project / "sheets" / "training_samples.png"))
    assert sheet.shape[1] > 3 * 400                          # three pictures in a row


def test_by_default_the_sheet_goes_into_the_work_folder_of_the_config(project, tool):
    assert tool("check", "config.py", "--seconds", "0", "--samples", "1") == 0
    assert (project / "work_dirs" / "config" / "check" / "training_samples.png").is_file()


def test_what_is_wrong_with_the_data_is_reported(project, tool, capsys):
    (project / "images" / "2.png").write_bytes(b"broken")
    (project / "images" / "1.png").write_bytes((project / "images" / "0.png").read_bytes())
    assert tool("check", "config.py", "--seconds", "0", "--samples", "4") == 1
    assert (project / "work_dirs" / "config" / "check" / "training_samples.png").is_file()
    printed = capsys.readouterr().out
    assert "1 unreadable files:" in printed
    assert "2.png (image id 3" in printed
    assert "1 different files with the same content:" in printed


def test_what_the_pre_flight_finds_is_one_message_and_exit_code_2(project, tool, capsys):
    for option, said in (("model.num_classes=80", "error: model.num_classes: the model has 80 classes, but train_dataloader.dataset has 2"),
                         ("train_dataloader.dataset.ann_file=none.json", "error: train_dataloader.dataset.ann_file: no annotation file"),
                         ("test_evaluator.type=CocoMetrik", "error: test_evaluator.type: no metric named 'CocoMetrik'. Did you mean")):
        assert tool("check", "config.py", "--cfg-options", option) == 2
        assert said in capsys.readouterr().err
