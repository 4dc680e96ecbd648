import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger

from visionkit.evaluation import CocoMetric
from visionkit.evaluation.coco_ap import twelve_lines
from visionkit.registry import METRICS, ConfigError
from visionkit.structures import InstanceData, Sample

SIZE = (120, 160)


def sample(img_id, annotations, boxes=(), scores=(), labels=(), masks=None):
    predicted = InstanceData(bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                             scores=torch.tensor(scores, dtype=torch.float32), labels=torch.tensor(labels, dtype=torch.int64))
    if masks is not None:
        predicted.masks = masks
    return Sample(metainfo={"img_id": img_id, "ori_shape": SIZE, "annotations": annotations}, pred_instances=predicted).to_dict()


def annotation(bbox, label=0, crowd=0, **more):
    area = (bbox[2] - bbox[0]) * (bbox[3] - bbox[1])
    return {"bbox": bbox, "bbox_label": label, "ignore_flag": crowd, "area": area, "id": 0, **more}


def evaluate(samples, classes=("cell",), size=None, **arguments):
    metric = CocoMetric(**arguments)
    metric.dataset_meta = {"classes": classes, "category_ids": [7 - index for index in range(len(classes))]}
    for one in samples:
        metric.process(None, [one])
    return metric.evaluate(size or len(samples))


def random_boxes(generator, count):
    corner = generator.uniform(0, (100, 80), (count, 2))
    return np.concatenate([corner, corner + generator.uniform(2, (60, 40), (count, 2))], axis=1)


def random_samples(images=30, classes=4, seed=0):
    """Detections around the truth, with misses, doubles, wrong classes, crowds, and images without truth or predictions."""
    generator = np.random.default_rng(seed)
    for index in range(images):
        truth = random_boxes(generator, 0 if index % 7 == 3 else generator.integers(1, 8))
        labels = generator.integers(0, classes, len(truth))
        annotations = [annotation(box.tolist(), int(label), int(generator.random() < 0.15))
                       for box, label in zip(truth, labels, strict=True)]
        found = np.repeat(truth, 2, axis=0) + generator.normal(0, 2, (2 * len(truth), 4))
        found = np.concatenate([found, random_boxes(generator, 3)])
        found_labels = np.concatenate([np.repeat(labels, 2), generator.integers(0, classes, 3)])
        keep = generator.random(len(found)) < (0 if index % 7 == 5 else 0.8)
        yield sample(index * 10 + 3, annotations, found[keep], generator.random(int(keep.sum())), found_labels[keep])


@pytest.fixture
def warnings(monkeypatch):
    """What is logged as a warning."""
    said = []
    monkeypatch.setattr("visionkit.evaluation.image_metric.print_log",
                        lambda text, logger, level=logging.INFO: said.append(text) if level == logging.WARNING else None)
    return said


@pytest.mark.parametrize("seed", range(3))
def test_both_backends_give_the_same_twelve_numbers(seed):
    classes = ("a", "b", "c", "d")
    fast = evaluate(list(random_samples(seed=seed)), classes, backend="faster_coco_eval")
    slow = evaluate(list(random_samples(seed=seed)), classes, backend="pycocotools")
    assert len(fast) == 12
    assert fast == pytest.approx(slow, abs=1e-12)
    assert 0.05 < fast["coco/bbox_mAP"] < 0.95
    assert len(set(fast.values())) > 8                       # not twelve times the same


def test_half_the_objects_found_at_iou_0_6_gives_ap_worked_out_by_hand():
    """Two objects; one found with IoU 0.6, one missed. For the thresholds 0.50, 0.55 and 0.60 precision is 1 up to recall 0.5,
    which is 51 of the 101 recall points; for the other seven it is 0."""
    numbers = evaluate([sample(1, [annotation([0, 0, 10, 10]), annotation([50, 50, 60, 60])], [[0, 0, 6, 10]], [0.9], [0])])
    assert numbers["coco/bbox_mAP"] == pytest.approx(51 / 101 * 0.3)
    assert numbers["coco/bbox_mAP_50"] == pytest.approx(51 / 101)
    assert numbers["coco/bbox_mAP_75"] == 0
    assert numbers["coco/bbox_mAP_s"] == pytest.approx(51 / 101 * 0.3)
    assert numbers["coco/bbox_mAP_l"] == -1
    assert numbers["coco/bbox_AR_100"] == pytest.approx(0.5 * 0.3)


def test_a_detection_inside_a_crowd_is_not_false():
    found = [[0, 0, 10, 10], [60, 60, 70, 70]]
    crowd = [annotation([0, 0, 10, 10]), annotation([50, 50, 90, 90], crowd=1)]
    with_crowd = evaluate([sample(1, crowd, found, [0.5, 0.9], [0, 0])])
    without = evaluate([sample(1, crowd[:1], found, [0.5, 0.9], [0, 0])])
    assert with_crowd["coco/bbox_mAP"] == pytest.approx(1)
    assert without["coco/bbox_mAP"] == pytest.approx(0.5)


def test_the_size_group_comes_from_the_annotation_and_not_from_its_box():
    thin = annotation([0, 0, 100, 100]) | {"area": 50.0}     # a diagonal line in a large box
    numbers = evaluate([sample(1, [thin], [[0, 0, 100, 100]], [1.0], [0])])
    assert numbers["coco/bbox_mAP_s"] == pytest.approx(1)
    assert numbers["coco/bbox_mAP_l"] == -1


@pytest.mark.parametrize("backend", ["faster_coco_eval", "pycocotools"])
def test_no_predictions_at_all_give_zeros_and_a_warning(backend, warnings):
    numbers = evaluate([sample(1, [annotation([0, 0, 10, 10])])], backend=backend)
    assert numbers["coco/bbox_mAP"] == numbers["coco/bbox_AR_100"] == 0
    assert any("no predictions" in text for text in warnings)


@pytest.mark.parametrize("backend", ["faster_coco_eval", "pycocotools"])
@pytest.mark.parametrize("boxes", [[], [[0, 0, 5, 5]]], ids=["nothing predicted", "one box predicted"])
def test_no_ground_truth_gives_minus_one_and_a_warning(backend, boxes, warnings):
    numbers = evaluate([sample(1, [], boxes, [0.5] * len(boxes), [0] * len(boxes))], backend=backend)
    assert set(numbers.values()) == {-1.0}
    assert any("no ground truth" in text for text in warnings)


def test_predictions_that_are_not_finite_are_left_out_with_a_warning(warnings):
    nan = float("nan")
    numbers = evaluate([sample(1, [annotation([0, 0, 10, 10])], [[nan, 0, 9, 9], [0, 0, 10, 10]], [0.9, 0.8], [0, 0])])
    assert numbers["coco/bbox_mAP"] == pytest.approx(1)
    assert any("not finite" in text for text in warnings)


def test_an_image_that_comes_twice_counts_once(warnings):
    truth = [annotation([0, 0, 10, 10]), annotation([50, 50, 60, 60])]
    once = [sample(1, truth, [[0, 0, 10, 10]], [0.9], [0]), sample(2, truth, [], [], [])]
    assert evaluate([*once, once[0]]) == evaluate(once)
    assert any("came twice" in text for text in warnings)


def test_the_padding_of_a_distributed_sampler_is_trimmed_by_size(warnings):
    samples = list(random_samples(images=6))
    classes = ("a", "b", "c", "d")
    assert evaluate([*samples, samples[0], samples[1]], classes, size=6) == evaluate(samples, classes)
    assert not warnings


DISTRIBUTED = """
import sys
import torch, torch.distributed as dist
from visionkit.evaluation import CocoMetric
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
metric = CocoMetric()
metric.dataset_meta = {"classes": ("cell",)}
for i in (0, 2, 4) if rank == 0 else (1, 3, 0):              # five images: the second process is filled up with image 0
    boxes = torch.tensor([[0.0, 0, 10, 10 - i]])
    annotation = {"bbox": [0, 0, 10, 10], "bbox_label": 0, "ignore_flag": 0, "area": 100}
    metric.process(None, [{"img_id": i, "ori_shape": (50, 50), "annotations": [annotation],
                           "pred_instances": {"bboxes": boxes, "scores": torch.tensor([1 - i / 10]), "labels": torch.tensor([0])}}])
print("AP", metric.evaluate(5)["coco/bbox_mAP"])
dist.destroy_process_group()
"""


def test_two_processes_give_the_numbers_of_one(tmp_path):
    commands = [[sys.executable, "-c", DISTRIBUTED, str(rank), str(tmp_path / "store")] for rank in range(2)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    samples = [sample(i, [annotation([0, 0, 10, 10])], [[0, 0, 10, 10 - i]], [1 - i / 10], [0]) for i in range(5)]
    expected = evaluate(samples)["coco/bbox_mAP"]
    assert 0.2 < expected < 0.9
    for text in printed:
        assert float(text.split("AP ")[-1]) == pytest.approx(expected)
    assert "came twice" not in printed[0]


def test_the_metric_tells_its_numbers_before_it_is_run():
    metric = CocoMetric(metric=("bbox", "segm"), prefix="cells")
    assert len(metric.reported) == 24
    assert {"cells/bbox_mAP", "cells/segm_AR_l"} < set(metric.reported)
    assert list(evaluate([sample(1, [])])) == CocoMetric().reported


def test_image_ids_may_be_words():
    numbers = evaluate([sample("2007_000032", [annotation([0, 0, 10, 10])], [[0, 0, 10, 10]], [1.0], [0])])
    assert numbers["coco/bbox_mAP"] == pytest.approx(1)


def test_the_result_file_is_what_coco_reads(tmp_path):
    from pycocotools.coco import COCO
    path = tmp_path / "new" / "found.json"
    evaluate([sample(42, [annotation([0, 0, 10, 10])], [[1, 2, 11, 22]], [0.5], [1])], ("a", "b"), outfile=str(path))
    assert json.loads(path.read_text()) == [{"image_id": 42, "category_id": 6, "bbox": [1, 2, 10, 20], "score": 0.5}]
    assert [file.name for file in path.parent.iterdir()] == ["found.json"]
    truth = COCO()
    truth.dataset = {"info": {}, "images": [{"id": 42}], "annotations": [], "categories": [{"id": 6, "name": "b"}]}
    truth.createIndex()
    assert len(truth.loadRes(str(path)).anns) == 1


@pytest.mark.parametrize("backend", ["faster_coco_eval", "pycocotools"])
@pytest.mark.parametrize("polygon", [True, False], ids=["polygon", "run lengths"])
def test_masks_are_compared_as_masks(backend, polygon):
    """A triangle found as a triangle: IoU 1; found as a square over most of it: IoU 0.62."""
    corners = [[0.0, 0.0, 80.0, 0.0, 0.0, 80.0]]
    rows, columns = np.mgrid[:SIZE[0], :SIZE[1]]
    triangle = (rows + columns) < 80
    from pycocotools import mask as coding
    truth = annotation([0, 0, 80, 80], mask=corners if polygon else coding.encode(np.asfortranarray(triangle.astype(np.uint8))))
    whole = np.zeros(SIZE, bool)
    whole[:70, :70] = True
    numbers = {}
    for name, mask in (("triangle", triangle), ("whole", whole)):
        one = sample(1, [truth], [[0, 0, 80, 80]], [1.0], [0], torch.from_numpy(mask[None]))
        numbers[name] = evaluate([one], metric=("bbox", "segm"), backend=backend)
    assert numbers["triangle"]["coco/segm_mAP"] == pytest.approx(1)
    assert numbers["whole"]["coco/segm_mAP_75"] == 0
    assert numbers["whole"]["coco/segm_mAP_50"] == pytest.approx(1)
    assert numbers["whole"]["coco/bbox_mAP"] == pytest.approx(1)


@pytest.mark.parametrize("backend", ["faster_coco_eval", "pycocotools"])
def test_the_size_of_a_detected_mask_is_its_own_and_not_that_of_its_box(backend):
    """A sure detection of nothing: a thin line of 100 pixels in a large box. It is small, so it halves the precision of the small."""
    block, line = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
    block[:20, :20] = True
    line[np.arange(100), np.arange(100) + 40] = True
    truth = annotation([0, 0, 20, 20], mask=[[0.0, 0.0, 20.0, 0.0, 20.0, 20.0, 0.0, 20.0]])
    one = sample(1, [truth], [[0, 0, 20, 20], [40, 0, 140, 100]], [0.5, 0.9], [0, 0], torch.from_numpy(np.stack([block, line])))
    numbers = evaluate([one], metric=("bbox", "segm"), backend=backend)
    assert numbers["coco/segm_mAP_s"] == pytest.approx(0.5)
    assert numbers["coco/bbox_mAP_s"] == pytest.approx(1)


def test_the_table_has_cocos_twelve_lines_and_an_ap_a_class(monkeypatch):
    said = []
    monkeypatch.setattr("visionkit.evaluation.coco_ap.print_log", lambda text, logger, level=logging.INFO: said.append(text))
    numbers = evaluate(list(random_samples(classes=3)), ("zebra", "yak", "crab", "newt"))
    table = said[-1]
    first = f" Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = {numbers['coco/bbox_mAP']:.3f}"
    assert first in table
    assert table.count("Average Precision") == table.count("Average Recall") == 6
    aps = {line.split()[0]: line.split()[2] for line in table.splitlines() if line.split()[0:1] and line.split()[0] in
           ("zebra", "yak", "crab", "newt")}
    assert aps.pop("newt") == "-"                            # no object of this class
    assert np.mean([float(ap) for ap in aps.values()]) == pytest.approx(numbers["coco/bbox_mAP"], abs=1e-3)
    assert float(aps["crab"]) != float(aps["zebra"])


def test_the_printed_lines_are_those_of_pycocotools(capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    nothing = COCO()
    nothing.dataset = {"images": [], "annotations": [], "categories": []}
    evaluation = COCOeval(nothing, nothing, "bbox")
    evaluation.eval = {"precision": np.full((10, 101, 1, 4, 3), 0.25), "recall": np.full((10, 1, 4, 3), 0.5)}
    capsys.readouterr()
    evaluation.summarize()
    assert capsys.readouterr().out.rstrip("\n") == twelve_lines(evaluation.stats)


@pytest.mark.parametrize("arguments, said", [({"metric": "box"}, "'box'"), ({"metric": ()}, "bbox"), ({"backend": "coco"}, "'coco'")])
def test_unknown_choices_are_refused(arguments, said):
    with pytest.raises(ConfigError, match=said):
        METRICS.build({"type": "CocoMetric", **arguments})


def test_a_label_beyond_the_classes_names_both_numbers():
    with pytest.raises(ConfigError, match="label 3.*1 classes"):
        evaluate([sample(1, [annotation([0, 0, 1, 1])], [[0, 0, 1, 1]], [1.0], [3])])


def test_a_sample_without_annotations_says_what_to_do():
    bare = sample(5, [])
    del bare["annotations"]
    with pytest.raises(ConfigError, match="image 5.*PackSample"):
        evaluate([bare])


def test_masks_wanted_but_not_predicted_is_an_error():
    with pytest.raises(ConfigError, match="no masks"):
        evaluate([sample(1, [annotation([0, 0, 1, 1])], [[0, 0, 1, 1]], [1.0], [0])], metric="segm")


def test_the_table_reaches_the_current_logger(tmp_path):
    logger = MMLogger.get_instance("coco_ap_test", log_file=str(tmp_path / "log.txt"))
    evaluate([sample(1, [annotation([0, 0, 10, 10])], [[0, 0, 10, 10]], [1.0], [0])])
    for handler in logger.handlers:
        handler.flush()
    assert "maxDets=100" in (tmp_path / "log.txt").read_text()
