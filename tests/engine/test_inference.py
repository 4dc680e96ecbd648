import json

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch import nn

import visionkit
from visionkit.engine.inference import detect_files, find_inputs, read_image
from visionkit.models.base import Model
from visionkit.registry import MODELS, ConfigError
from visionkit.structures import InstanceData
from visionkit.transforms import BrokenImageError


@MODELS.register_module()
class BrightestBlock(Model):
    """Finds what is white in an image: one box of class 1 with score 0.9, and all of the image as class 0 with score 0.1."""

    def __init__(self):
        super().__init__(dict(type="ImagePreprocessor", mean=(0, 0, 0), std=(1, 1, 1)))
        self.weight = nn.Parameter(torch.ones(3))
        self.batches = []

    def forward(self, images):
        return (images.tensor * self.weight.view(3, 1, 1)).min(1).values > 100

    def loss(self, images, samples):
        return {"loss": self.weight.sum()}

    def predict(self, images, samples):
        self.batches.append(len(samples))
        for white, sample in zip(self(images), samples, strict=True):
            rows, columns = white.any(1).nonzero().flatten(), white.any(0).nonzero().flatten()
            height, width = sample.ori_shape
            box = torch.zeros(4)
            if len(rows):
                box = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / torch.tensor(sample.scale_factor).repeat(2)
            sample.pred_instances = InstanceData(bboxes=torch.stack([box, torch.tensor([0.0, 0, width, height])]),
                                                 scores=torch.tensor([0.9, 0.1]), labels=torch.tensor([1, 0]))
        return samples


def picture(size=(60, 80), box=(10, 20, 30, 40)):
    image = np.zeros((*size, 3), np.uint8)
    image[box[1]:box[3], box[0]:box[2]] = 255
    return image


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({"state_dict": BrightestBlock().state_dict()}, path)
    return path


def config(**changes):
    pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_mask=True), dict(type="Resize", scale=(160, 120)),
                dict(type="PackSample")]
    dataset = dict(type="CocoDataset", data_root="nowhere", ann_file="none.json", metainfo=dict(classes=("all", "block")),
                   pipeline=pipeline)
    return Config(dict(model=dict(type="BrightestBlock"), test_dataloader=dict(dataset=dataset), default_scope="visionkit") | changes)


@pytest.fixture
def detector(weights):
    return visionkit.Detector(config(), weights, device="cpu", batch_size=2)


def test_boxes_are_in_pixels_of_the_image_that_was_given(detector):
    sample = detector(picture())
    assert sample.ori_shape == (60, 80)
    assert sample.img_shape == (120, 160)
    assert sample.pred_instances.bboxes.tolist() == [[10, 20, 30, 40]]
    assert sample.pred_instances.labels.tolist() == [1]
    assert detector.classes == ("all", "block")


def test_several_images_of_several_kinds_come_back_in_their_order(detector, tmp_path):
    from PIL import Image
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), picture(box=(1, 2, 3, 4)))
    samples = detector([picture(), path, str(path), Image.fromarray(picture((30, 40), (4, 4, 8, 8)))])
    assert [sample.img_id for sample in samples] == [0, 1, 2, 3]
    assert [sample.pred_instances.bboxes[0].tolist() for sample in samples] == [[10, 20, 30, 40], [1, 2, 3, 4], [1, 2, 3, 4], [4, 4, 8, 8]]
    assert [sample.img_path for sample in samples] == [None, str(path), str(path), None]
    assert detector.model.batches == [2, 2]
    assert detector([]) == []


def test_a_batch_of_different_sizes_gives_what_one_at_a_time_gives(weights):
    images = [picture((60, 80)), picture((90, 40), (5, 50, 20, 70)), picture((50, 50), (0, 0, 50, 50))]
    cfg = config()
    cfg.test_dataloader.dataset.pipeline.pop(2)              # no Resize
    together = visionkit.Detector(cfg, weights, batch_size=3)(images)
    alone = visionkit.Detector(cfg, weights, batch_size=1)(images)
    assert [a.pred_instances.bboxes.tolist() for a in together] == [a.pred_instances.bboxes.tolist() for a in alone]


def test_there_is_no_ground_truth_in_a_sample(detector):
    assert "annotations" not in detector(picture())
    assert "gt_instances" not in detector(picture())


def test_predictions_below_the_threshold_are_left_out(weights):
    assert len(visionkit.Detector(config(), weights, score_threshold=0.05)(picture()).pred_instances) == 2
    assert len(visionkit.Detector(config(), weights, score_threshold=0.95)(picture()).pred_instances) == 0


def test_a_model_that_finds_no_objects_is_one_message(detector, monkeypatch):
    monkeypatch.setattr(BrightestBlock, "predict", lambda self, images, samples: samples)
    with pytest.raises(ConfigError, match="^model: BrightestBlock finds no objects, so there is nothing to draw; tools/test.py"):
        detector(picture())


def test_a_huge_image_works(detector):
    assert detector(picture((6000, 8000), (1000, 2000, 3000, 4000))).pred_instances.bboxes[0].tolist() == [1000, 2000, 3000, 4000]


def test_a_stream_is_read_one_batch_at_a_time(detector):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield picture()
    stream = detector.stream(endless())
    next(stream)
    assert len(taken) == 2


def test_class_names_come_from_the_checkpoint_first(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"state_dict": BrightestBlock().state_dict(), "meta": {"dataset_meta": {"classes": ("x", "y")}}}, path)
    assert visionkit.Detector(config(), path).classes == ("x", "y")


def test_class_names_come_from_a_generated_data_set_and_are_none_where_nobody_knows(weights):
    cfg = config()
    del cfg.test_dataloader.dataset["metainfo"]
    assert visionkit.Detector(cfg, weights).classes == ()
    cfg.test_dataloader.dataset = dict(type="ShapesDataset", num_images=1, pipeline=[dict(type="PackSample")])
    assert visionkit.Detector(cfg, weights).classes == ("circle", "rectangle", "triangle", "star")


def test_a_wrapped_data_set_has_its_pipeline_found(weights):
    cfg = config()
    cfg.test_dataloader.dataset = dict(type="RepeatDataset", times=1, dataset=cfg.test_dataloader.dataset)
    assert visionkit.Detector(cfg, weights)(picture()).img_shape == (120, 160)


def test_what_is_missing_is_named(weights, tmp_path):
    with pytest.raises(ConfigError, match="needs weights"):
        visionkit.Detector(config())
    with pytest.raises(ConfigError, match=r"none\.pth"):
        visionkit.Detector(config(), tmp_path / "none.pth")
    with pytest.raises(ConfigError, match=r"test_dataloader\.dataset\.pipeline"):
        visionkit.Detector(config(test_dataloader=None), weights)
    with pytest.raises(ConfigError, match=r"^model\.type: .*Did you mean 'BrightestBlock'"):
        visionkit.Detector(config(model=dict(type="BrightestBlok")), weights)


@pytest.mark.parametrize("image, said", [(np.zeros((4, 4, 3)), r"float64 \[4, 4, 3\]"), (7, "int"),
                                         (np.zeros((4, 4, 4), np.uint8), r"uint8 \[4, 4, 4\]"),
                                         (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]")])
def test_an_image_of_another_form_is_refused(image, said):
    with pytest.raises(ValueError, match=said):
        read_image(image)


def test_grey_arrays_and_turned_pictures_are_read():
    from PIL import Image
    assert read_image(np.full((2, 3), 7, np.uint8)).tolist() == np.full((2, 3, 3), 7).tolist()
    turned = Image.fromarray(picture())
    turned.getexif()[0x0112] = 6                             # lies on its side
    assert read_image(turned).shape == (80, 60, 3)


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(BrokenImageError, match=r"bad\.jpg: .*truncated"):
        read_image(tmp_path / "bad.jpg")
    with pytest.raises(BrokenImageError, match=r"none\.jpg: the file does not exist"):
        read_image(tmp_path / "none.jpg")


# --------------------------------------------------------------------------------------------------------------- files

def test_files_give_pictures_and_one_json_file(detector, tmp_path):
    for name in ("in/a.png", "in/b.jpg", "in/deeper/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / name), picture())
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    (tmp_path / "in" / "c.png").write_bytes(b"not an image either")
    done = detect_files(detector, [tmp_path / "in"], tmp_path / "out")
    assert (done.images, done.objects) == (3, 3)
    assert len(done.unreadable) == 1
    assert "c.png" in done.unreadable[0]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.jpg", "a_2.jpg", "b.jpg", "detections.json"]
    records = json.loads(done.json_file.read_text())
    assert records[0] == {"image": str(tmp_path / "in" / "a.png"), "width": 80, "height": 60,
                          "detections": [{"class": "block", "label": 1, "score": 0.9, "box": [10, 20, 30, 40]}]}
    assert cv2.imread(str(tmp_path / "out" / "a.jpg")).shape[1] >= 480


def test_a_video_gives_a_video_and_an_entry_a_frame(detector, tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "film.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (80, 60))
    for frame in range(5):
        writer.write(picture(box=(10 * frame, 8, 10 * frame + 16, 24)))
    writer.release()
    done = detect_files(detector, [tmp_path / "film.avi"], tmp_path / "out")
    records = json.loads(done.json_file.read_text())
    assert [record["frame"] for record in records] == [0, 1, 2, 3, 4]
    assert [record["detections"][0]["box"][0] for record in records] == pytest.approx([0, 10, 20, 30, 40], abs=1.5)
    video = cv2.VideoCapture(str(tmp_path / "out" / "film.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 5
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(10)


def test_a_video_that_cannot_be_read_is_named(detector, tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"nothing")
    done = detect_files(detector, [tmp_path / "film.mp4"], tmp_path / "out")
    assert done.images == 0
    assert "film.mp4" in done.unreadable[0]


def test_inputs_that_are_nothing_are_refused(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no file or folder .*pictur\.png.*Did you mean 'picture\.png'"):
        find_inputs([tmp_path / "pictur.png"])
    for name in ("notes.txt", "empty"):
        with pytest.raises(ConfigError, match=f"{name}.*no image or video"):
            find_inputs([tmp_path / name])
    assert find_inputs([tmp_path, tmp_path / "picture.png"])[0] == [tmp_path / "picture.png"]
