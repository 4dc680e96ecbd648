import cv2
import pytest
import torch
from mmengine.config import Config

from visionkit.registry import MODELS

MODEL = """
_base_ = "config.py"
model = dict(
    _delete_=True, type="FasterRCNN",
    backbone=dict(type="ResNet", depth=18, norm="GN", dcn=dict(type="DeformConv2dPack"), stage_with_dcn=(False, False, False, True)),
    neck=dict(type="FPN", out_channels=16),
    rpn=dict(type="RPN", pre_nms=(20, 20), post_nms=(10, 10)),
    roi=dict(type="RoIBoxHead", num_classes=2, hidden_channels=(16,)))
"""


@pytest.fixture
def deformable(project):
    (project / "deformable.py").write_text(MODEL)
    torch.save({"state_dict": MODELS.build(Config.fromfile("deformable.py").model).state_dict()}, project / "deformable.pth")
    return project


def test_the_picture_and_the_table_come_out(deformable, tool, capsys):
    assert tool("draw_sampling", "deformable.py", "deformable.pth", "images/1.png", "--at", "20", "10", "--out", "found/at.png",
                "--dilation", "2", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "sampling locations: found/at.png" in printed
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.startswith(" ")}
    assert rows["layer"] == ["small", "medium", "large", "background"]
    assert rows["backbone.layer4.0.conv2"] == ["-", "-", "-", "1.00", "±", "0.00"]           # no filter is centred on a block
    assert cv2.imread(str(deformable / "found" / "at.png")).shape == (360, 480, 3)


@pytest.mark.parametrize("arguments, said", [
    (["deformable.py", "deformable.pth"], "give an image and --at X Y"),
    (["deformable.py", "deformable.pth", "images/1.png", "--at", "99", "0"], "--at names a pixel of the image"),
    (["config.py", "weights.pth", "images/1.png", "--at", "9", "9"], "no deformable convolution")])
def test_a_users_error_is_one_message_and_exit_code_2(deformable, tool, capsys, arguments, said):
    assert tool("draw_sampling", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
