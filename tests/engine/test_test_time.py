import copy

import pytest
import torch
from mmengine.config import Config
from torch import nn

from visionkit.datasets import ShapesDataset
from visionkit.engine.test_time import InferenceLoop, TestTimeAugmentation, use_inference_loop, views_of
from visionkit.models.base import Model
from visionkit.ops import NMS
from visionkit.registry import ConfigError
from visionkit.structures import InstanceData, Sample
from visionkit.transforms import build_pipeline

PIPELINE = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}, {"type": "Resize", "scale": (80, 60)}, {"type": "PackSample"}]


def sample(boxes, scores, labels=None, flip=None, size=(40, 100)):
    meta = {"img_id": 1, "ori_shape": size, "flip": flip is not None, "flip_direction": flip}
    return Sample(metainfo=meta, pred_instances=InstanceData(
        bboxes=torch.tensor(boxes).float().view(-1, 4), scores=torch.tensor(scores), labels=torch.tensor(labels or [0] * len(scores))))


class Brightest(Model):
    """One box around what is brighter than half, in original pixels; deterministic and blind to flips."""

    def __init__(self):
        super().__init__(dict(type="ImagePreprocessor", mean=(0, 0, 0), std=(1, 1, 1), pad_divisor=1))
        self.weight = nn.Parameter(torch.ones(1))
        self.seen = []

    def forward(self, images):
        return (images.tensor * self.weight).mean(1) > 128

    def loss(self, images, samples):
        return {}

    def predict(self, images, samples):
        self.seen += [(one.img_shape, one.flip) for one in samples]
        for bright, one in zip(self(images), samples, strict=True):
            rows, columns = bright.any(1).nonzero().flatten(), bright.any(0).nonzero().flatten()
            box = torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]) / torch.tensor(one.scale_factor).repeat(2)
            one.pred_instances = InstanceData(bboxes=box, scores=torch.tensor([0.5]), labels=torch.tensor([0]))
        return samples


def image_with_block(x1, y1, x2, y2, height=60, width=80):
    image = torch.zeros(height, width, 3, dtype=torch.uint8)
    image[y1:y2, x1:x2] = 255
    return image.numpy()


def predict_views(views, images, model):
    pipeline = build_pipeline(views.pipeline(PIPELINE)[2:])
    packed = [pipeline({"img": image, "img_id": index, "ori_shape": image.shape[:2], "img_shape": image.shape[:2]})
              for index, image in enumerate(images)]
    batch = {key: list(zip(*(one[key] for one in packed), strict=True)) for key in ("inputs", "data_samples")}
    return views.predict(model.test_step, batch)


@pytest.mark.parametrize("flip, expected", [
    ("horizontal", [70, 5, 90, 15]), ("vertical", [10, 25, 30, 35]), ("diagonal", [70, 25, 90, 35])])
def test_the_box_of_a_flipped_view_is_mirrored_back(flip, expected):
    """In an image 100 wide and 40 high, the box from x 10 to 30 and y 5 to 15."""
    merged = TestTimeAugmentation().merge([sample([[10, 5, 30, 15]], [0.5], flip=flip)])
    assert merged.pred_instances.bboxes.tolist() == [expected]


def test_what_two_views_agree_on_is_found_once_with_the_better_score():
    merged = TestTimeAugmentation().merge([
        sample([[10, 5, 30, 15], [50, 5, 60, 15]], [0.5, 0.25]), sample([[70, 5, 90, 15]], [0.75], flip="horizontal")])
    assert merged.pred_instances.bboxes.tolist() == [[10, 5, 30, 15], [50, 5, 60, 15]]
    assert merged.pred_instances.scores.tolist() == [0.75, 0.25]
    assert len(TestTimeAugmentation(max_per_image=1).merge([merged]).pred_instances) == 1


def test_views_may_vote_or_lower_scores_instead():
    def views():
        return [sample([[10, 5, 30, 15]], [0.75]), sample([[10, 5, 26, 15]], [0.25])]
    assert TestTimeAugmentation(nms=dict(type="box_voting")).merge(views()).pred_instances.bboxes.tolist() == [[10, 5, 29, 15]]
    assert len(TestTimeAugmentation(nms=dict(type="soft_nms")).merge(views()).pred_instances) == 2


@pytest.mark.parametrize("flip", ["horizontal", "vertical", "diagonal"])
def test_a_flipped_view_alone_gives_the_flipped_image_mirrored_exactly(flip):
    """The pixels of a view are those of the flipped image, and what is found in it lies where it does in the image as it is."""
    views = TestTimeAugmentation(flips=(flip,))
    steps = views.pipeline(PIPELINE)[-1]["transforms"]
    steps[1] = steps[1][1:]                                  # without the view as it is
    (alone,) = build_pipeline([{"type": "TestTimeAug", "transforms": steps}])(
        {"img": image_with_block(10, 5, 31, 15), "ori_shape": (60, 80)})["inputs"]
    axes = {"horizontal": [2], "vertical": [1], "diagonal": [1, 2]}[flip]
    assert torch.equal(alone, torch.from_numpy(image_with_block(10, 5, 31, 15)).permute(2, 0, 1).flip(axes))
    model = Brightest()
    (both,) = predict_views(TestTimeAugmentation(flips=(flip,), nms=dict(type="nms", iou=1.0)), [image_with_block(10, 5, 31, 15)], model)
    assert both.pred_instances.bboxes.tolist() == [[10, 5, 31, 15]] * 2
    assert model.seen == [((60, 80), False), ((60, 80), True)]


def test_views_of_several_sizes_and_images_come_back_to_their_image():
    model = Brightest()
    views = TestTimeAugmentation(scales=(1.0, 1.5), flips=("horizontal",))
    found = predict_views(views, [image_with_block(8, 8, 40, 40), image_with_block(60, 20, 100, 60, 120, 160)], model)
    assert [shape for shape, _ in model.seen[::2]] == [(60, 80), (60, 80), (90, 120), (90, 120)]
    assert [one.img_id for one in found] == [0, 1]
    for one, expected in zip(found, ([8, 8, 40, 40], [60, 20, 100, 60]), strict=True):
        torch.testing.assert_close(one.pred_instances.bboxes[0], torch.tensor(expected).float(), rtol=0, atol=2)
        assert len(one.pred_instances) == 1


def test_a_pipeline_without_resize_gets_one():
    views = TestTimeAugmentation(scales=(1.0, 2.0)).pipeline([PIPELINE[0], PIPELINE[3]])
    assert views[-1]["transforms"][0] == [{"type": "Resize", "scale_factor": 1.0}, {"type": "Resize", "scale_factor": 2.0}]
    dataset = ShapesDataset(num_images=1, size=(64, 64), pipeline=views)
    assert [tuple(view.shape) for view in dataset[0]["inputs"]] == [(3, 64, 64), (3, 64, 64), (3, 128, 128), (3, 128, 128)]


def test_the_config_is_as_it_was_after_its_transforms_are_built():
    views = TestTimeAugmentation().pipeline(PIPELINE)
    before = copy.deepcopy(views)
    build_pipeline(views)
    assert views == before


@pytest.mark.parametrize("pipeline, said", [
    (PIPELINE[:3], "PackSample at the end"), ([PIPELINE[2], *PIPELINE[2:]], "one Resize"),
    ([{"type": "RandomFlip"}, PIPELINE[3]], "no RandomFlip")])
def test_pipelines_that_cannot_make_views_are_refused(pipeline, said):
    cfg = Config(dict(test_dataloader=dict(dataset=dict(type="RepeatDataset", dataset=dict(type="X", pipeline=pipeline)))))
    with pytest.raises(ConfigError, match=rf"test_dataloader.dataset.dataset.pipeline: .*{said}"):
        use_inference_loop(cfg, tta=True, amp=False)


@pytest.mark.parametrize("tta, said", [
    (dict(scale=(1, 2)), "tta.scale: .*Did you mean 'scales'"), (dict(scales=(0,)), "tta.scales: .*above 0"),
    (dict(flips="horizontal"), "tta.flips: flips is a list"), (dict(nms=dict(type="nsm")), "tta.nms.type: no op named"),
    (dict(max_per_image=0), "tta.max_per_image")])
def test_a_wrong_section_is_named_by_its_place(tta, said):
    with pytest.raises(ConfigError, match=said):
        views_of(Config(dict(tta=tta)))


def test_a_test_loop_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="test_cfg.type: .*TestLoop.*'OtherLoop'"):
        use_inference_loop(Config(dict(test_cfg=dict(type="OtherLoop"))), tta=False, amp=True)


def test_masks_of_several_views_are_not_merged_in_silence():
    one = sample([[10, 5, 30, 15]], [0.5])
    one.pred_instances.masks = torch.zeros(1, 40, 100, dtype=torch.bool)
    with pytest.raises(ConfigError, match="also predicts masks"):
        TestTimeAugmentation().merge([one])


def test_the_views_of_the_config_are_those_of_the_loop():
    assert isinstance(TestTimeAugmentation().nms, NMS)
    cfg = Config(dict(tta=dict(scales=[1.0, 2.0]), test_dataloader=dict(dataset=dict(type="X", pipeline=PIPELINE))))
    use_inference_loop(cfg, tta=True, amp=True)
    assert cfg.test_cfg.to_dict() == dict(type="InferenceLoop", amp=True, tta=dict(scales=[1.0, 2.0]))
    assert [step["type"] for step in cfg.test_dataloader.dataset.pipeline] == ["LoadImageFromFile", "LoadAnnotations", "TestTimeAug"]
    assert InferenceLoop.__name__ == cfg.test_cfg.type
