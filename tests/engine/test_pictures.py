import logging
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from visionkit.engine.pictures import PictureHook, draw_sample, file_name, original_image, training_sheet
from visionkit.registry import HOOKS, ConfigError
from visionkit.structures import InstanceData, PanopticMap, Sample
from visionkit.visualization import class_color

ANNOTATION = {"bbox": [10, 10, 50, 40], "bbox_label": 0, "ignore_flag": 0}


def sample(img_id=1, scores=(0.9, 0.2), **metainfo):
    found = InstanceData(bboxes=torch.tensor([[20.0, 20, 60, 50], [70, 60, 90, 75]]), scores=torch.tensor(scores),
                         labels=torch.tensor([1, 2]))
    return Sample(metainfo={"img_id": img_id, "ori_shape": (80, 100), "annotations": [ANNOTATION]} | metainfo, pred_instances=found)


def runner(folder):
    loader = SimpleNamespace(dataset=SimpleNamespace(metainfo={"classes": ("a", "b", "c")}))
    said = []
    return SimpleNamespace(work_dir=str(folder), val_dataloader=loader, test_dataloader=loader, said=said,
                           logger=SimpleNamespace(info=said.append, level=logging.INFO))


def has(image, color):
    return (np.abs(image.astype(int) - color).max(-1) <= 2).any()


def run(hook, made_runner, batches, mode="val"):
    getattr(hook, f"before_{mode}_epoch")(made_runner)
    for index, batch in enumerate(batches):
        inputs = [torch.full((3, 80, 100), 128, dtype=torch.uint8) for _ in batch]
        getattr(hook, f"after_{mode}_iter")(made_runner, index, {"inputs": inputs}, batch)
    getattr(hook, f"after_{mode}_epoch")(made_runner, {})


@pytest.mark.parametrize("mode", ["val", "test"])
def test_the_first_images_are_saved_by_their_ids_and_the_log_says_where(tmp_path, mode):
    made = runner(tmp_path)
    hook = HOOKS.build({"type": "PictureHook", "first": 3})
    for _ in range(2):                                       # every validation draws the same
        run(hook, made, [[sample(7), sample("folder/b")], [sample(9), sample(11)]], mode)
    assert sorted(file.name for file in (tmp_path / "pictures").iterdir()) == ["7.jpg", "9.jpg", "folder_b.jpg"]
    assert made.said == [f"3 pictures of predictions beside the ground truth are in {tmp_path / 'pictures'}"] * 2


def test_all_images_are_saved_into_a_folder_of_choice(tmp_path):
    run(PictureHook(first=-1, folder=str(tmp_path / "show")), runner(tmp_path), [[sample(index)] for index in range(5)])
    assert len(list((tmp_path / "show").iterdir())) == 5
    assert not (tmp_path / "pictures").exists()


def test_in_several_processes_the_first_images_of_the_data_set_are_saved_once(tmp_path, monkeypatch):
    for rank in range(2):                                    # images 0, 2, 4 and 1, 3, 5
        monkeypatch.setattr("visionkit.engine.pictures.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("visionkit.engine.pictures.get_world_size", lambda: 2)
        run(PictureHook(first=3), runner(tmp_path), [[sample(index)] for index in range(rank, 6, 2)])
    assert sorted(file.stem for file in (tmp_path / "pictures").iterdir()) == ["0", "1", "2"]


def test_nothing_to_save_is_nothing_to_say(tmp_path):
    made = runner(tmp_path)
    run(PictureHook(first=0), made, [[sample()]])
    assert not made.said
    assert not (tmp_path / "pictures").exists()


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="score_threshold"):
        HOOKS.build({"type": "PictureHook", "score_threshold": 30})


def test_truth_is_left_and_predictions_above_the_threshold_are_right():
    drawn = draw_sample(np.full((80, 100, 3), 128, np.uint8), sample(), ("a", "b", "c"), 0.3)
    left, right = drawn[:, :drawn.shape[1] // 2], drawn[:, drawn.shape[1] // 2:]
    assert has(left, class_color(0))
    assert not has(left, class_color(1))
    assert has(right, class_color(1))
    assert not has(right, class_color(0))
    assert not has(right, class_color(2))                    # its score is 0.2


def test_without_ground_truth_there_is_one_picture():
    bare = sample()
    bare.pop("annotations")
    drawn = draw_sample(np.full((80, 100, 3), 128, np.uint8), bare, ("a", "b", "c"))
    assert drawn.shape == (384, 480, 3)


def test_a_panoptic_map_is_drawn_instead_of_boxes_beside_the_true_one():
    def everywhere(label):
        return PanopticMap.of_layers([np.ones((80, 100))], [label], (False,) * 3, size=(80, 100))
    both = sample(panoptic=everywhere(0))
    both.pred_panoptic = everywhere(1)
    drawn = draw_sample(np.full((80, 100, 3), 128, np.uint8), both, ("a", "b", "c"))
    left, right = drawn[:, :drawn.shape[1] // 2], drawn[:, drawn.shape[1] // 2:]
    for half, label in ((left, 0), (right, 1)):
        np.testing.assert_allclose(np.median(half[60:-20], axis=(0, 1)), (np.array(class_color(label)) + 128) / 2, atol=2)
    both.pop("panoptic")
    assert draw_sample(np.full((80, 100, 3), 128, np.uint8), both, ("a", "b", "c")).shape == (384, 480, 3)


def test_the_original_image_is_its_file(tmp_path):
    picture = np.full((80, 100, 3), (10, 20, 30), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    image = original_image(torch.zeros(3, 8, 8), sample(img_path=str(tmp_path / "a.png")))
    assert image.tolist() == picture[..., ::-1].tolist()     # RGB


@pytest.mark.parametrize("direction, axes", [("horizontal", 1), ("vertical", 0), ("diagonal", (0, 1))])
def test_without_a_file_the_networks_input_is_scaled_and_turned_back(direction, axes):
    picture = np.zeros((80, 100, 3), np.uint8)
    picture[:40, :50] = 200
    shrunk = np.flip(cv2.resize(picture, (50, 40)), axes)
    image = original_image(torch.from_numpy(shrunk.copy()).permute(2, 0, 1),
                           sample(img_path="generated.png", flip=True, flip_direction=direction))
    assert image.shape == (80, 100, 3)
    assert image[:36, :46].min() > 190
    assert image[44:].max() < 10


@pytest.mark.parametrize("img_id, name", [(12, "12"), ("a/b c.jpg", "a_b_c.jpg"), ("../../x", "_.._x"), ("..", "_")])
def test_an_id_becomes_a_file_name(img_id, name):
    assert file_name(img_id) == name


def test_a_training_sheet_shows_the_samples_as_the_model_gets_them():
    def item(value):
        made = Sample(metainfo={"img_id": value, "flip": False})
        made.gt_instances = InstanceData(bboxes=torch.tensor([[10.0, 10, 40, 40]]), labels=torch.tensor([0]))
        made.ignored_instances = InstanceData(bboxes=torch.tensor([[50.0, 50, 70, 70]]), labels=torch.tensor([0]))
        return {"inputs": torch.full((3, 80, 100), value, dtype=torch.uint8), "data_samples": made}

    class Samples(dict):
        metainfo = {"classes": ("a",)}
    sheet = training_sheet(Samples({0: item(90), 1: item(150)}), [1, 0], columns=2)
    row = sheet[sheet.shape[0] - 20, :, 0].tolist()
    assert row.index(150) < row.index(90)
    assert has(sheet, class_color(0))
    assert has(sheet, (160, 160, 160))
