import logging
import subprocess
import sys

import numpy as np
import pytest
import torch

from visionkit.datasets import VOCDataset
from visionkit.evaluation import VOCMetric
from visionkit.registry import METRICS, ConfigError
from visionkit.structures import InstanceData, Sample
from visionkit.transforms import PackSample

A, B = [0, 0, 10, 10], [50, 50, 60, 60]
ELSEWHERE = [80, 80, 99, 99]


def sample(img_id, annotations, boxes=(), scores=(), labels=None):
    predicted = InstanceData(bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                             scores=torch.tensor(scores, dtype=torch.float32),
                             labels=torch.tensor([0] * len(boxes) if labels is None else labels, dtype=torch.int64))
    return Sample(metainfo={"img_id": img_id, "ori_shape": (100, 100), "annotations": annotations}, pred_instances=predicted).to_dict()


def thing(bbox, label=0, difficult=0):
    return {"bbox": bbox, "bbox_label": label, "ignore_flag": difficult, "id": 0}


def evaluate(samples, classes=("dog",), size=None, **arguments):
    metric = VOCMetric(**arguments)
    metric.dataset_meta = {"classes": classes}
    for one in samples:
        metric.process(None, [one])
    return metric.evaluate(size or len(samples))


@pytest.fixture
def warnings(monkeypatch):
    """What is logged as a warning."""
    said = []
    monkeypatch.setattr("visionkit.evaluation.image_metric.print_log",
                        lambda text, logger, level=logging.INFO: said.append(text) if level == logging.WARNING else None)
    return said


def slow_average_precision(samples, label, threshold, rule, extra=0):
    """The AP of a class as the development kit computes it: one detection after the other, and recall walked along."""
    def overlap(box, other):
        width = min(box[2], other[2]) - max(box[0], other[0]) + extra
        height = min(box[3], other[3]) - max(box[1], other[1]) + extra
        if width <= 0 or height <= 0:
            return 0.0
        areas = [(x2 - x1 + extra) * (y2 - y1 + extra) for x1, y1, x2, y2 in (box, other)]
        return width * height / (sum(areas) - width * height)

    detections = [(float(score), one["img_id"], box.tolist()) for one in samples
                  for score, kind, box in zip(*(one["pred_instances"][key] for key in ("scores", "labels", "bboxes")), strict=True)
                  if kind == label]
    objects = {one["img_id"]: [{**each, "found": False} for each in one["annotations"] if each["bbox_label"] == label] for one in samples}
    count = sum(not each["ignore_flag"] for of_image in objects.values() for each in of_image)
    right = wrong = 0
    curve = []
    for _, image, box in sorted(detections, key=lambda detection: -detection[0]):
        best = max(objects[image], key=lambda each: overlap(box, each["bbox"]), default=None)
        if best is None or overlap(box, best["bbox"]) < threshold:
            wrong += 1
        elif best["ignore_flag"]:
            continue
        elif best["found"]:
            wrong += 1
        else:
            right, best["found"] = right + 1, True
        curve.append((right / count, right / (right + wrong)))
    if rule == "11_points":
        return sum(max([p for recall, p in curve if recall > t / 10 - 1e-9], default=0) for t in range(11)) / 11
    area = 0.0
    for step in range(1, count + 1):
        area += max([p for recall, p in curve if recall > step / count - 1e-9], default=0) / count
    return area


def random_samples(images=25, classes=3, seed=0):
    """Detections around the objects, with misses, doubles, wrong classes, difficult objects and empty images."""
    generator = np.random.default_rng(seed)
    def boxes(count):
        corner = generator.integers(0, 60, (count, 2))
        return np.concatenate([corner, corner + generator.integers(4, 40, (count, 2))], 1).astype(np.float64)
    for index in range(images):
        truth = boxes(0 if index % 7 == 3 else generator.integers(1, 7))
        labels = generator.integers(0, classes, len(truth))
        objects = [thing(box.tolist(), int(label), int(generator.random() < 0.2)) for box, label in zip(truth, labels, strict=True)]
        found = np.concatenate([np.repeat(truth, 2, axis=0) + generator.integers(-4, 5, (2 * len(truth), 4)), boxes(3)])
        kinds = np.concatenate([np.repeat(labels, 2), generator.integers(0, classes, 3)])
        keep = (generator.random(len(found)) < (0 if index % 7 == 5 else 0.8)) & (found[:, 2:] > found[:, :2]).all(1)
        yield sample(index, objects, found[keep], generator.random(int(keep.sum())), kinds[keep])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", ["area", "11_points"])
@pytest.mark.parametrize("add_one", [False, True])
def test_it_agrees_with_a_loop_over_the_detections(seed, rule, add_one):
    samples = list(random_samples(seed=seed))
    numbers = evaluate(samples, ("a", "b", "c"), iou=(0.5, 0.7), rule=rule, add_one=add_one)
    slow = [np.mean([slow_average_precision(samples, label, threshold, rule, int(add_one)) for label in range(3)])
            for threshold in (0.5, 0.7)]
    assert numbers == pytest.approx({"voc/mAP": np.mean(slow), "voc/mAP_50": slow[0], "voc/mAP_70": slow[1]}, abs=1e-12)
    assert 0.05 < slow[1] < slow[0] < 0.95


@pytest.mark.parametrize("rule, expected", [
    ("area", (1 + 2 / 3) / 2),                               # half of recall at precision 1, half at 2/3
    ("11_points", (6 * 1 + 5 * 2 / 3) / 11)])                # recalls 0 to 0.5 at precision 1, 0.6 to 1 at 2/3
def test_right_wrong_right_of_two_objects_gives_the_ap_worked_out_by_hand(rule, expected):
    numbers = evaluate([sample(1, [thing(A), thing(B)], [A, ELSEWHERE, B], [0.9, 0.8, 0.7])], rule=rule)
    assert numbers["voc/mAP"] == numbers["voc/mAP_50"] == pytest.approx(expected)


def test_a_recall_of_exactly_three_tenths_reaches_its_point():
    """3 of 10 objects found, none wrong: the points 0, 0.1, 0.2 and 0.3 have precision 1."""
    spots = [[10 * i, 0, 10 * i + 8, 8] for i in range(10)]
    assert evaluate([sample(1, [thing(spot) for spot in spots], spots[:3], [0.9, 0.8, 0.7])],
                    rule="11_points")["voc/mAP"] == pytest.approx(4 / 11)


def test_finding_an_object_twice_is_wrong_the_second_time():
    once = evaluate([sample(1, [thing(A), thing(B)], [A, B], [0.9, 0.7])])
    twice = evaluate([sample(1, [thing(A), thing(B)], [A, A, B], [0.9, 0.8, 0.7])])
    assert once["voc/mAP"] == pytest.approx(1)
    assert twice["voc/mAP"] == pytest.approx((1 + 2 / 3) / 2)


def test_a_box_counts_for_the_object_it_overlaps_most_even_if_that_is_taken():
    """Two objects side by side; the second detection overlaps the first object by 0.9, the second one by less: it is wrong."""
    first, second = [0, 0, 10, 10], [0, 0, 10, 7]
    numbers = evaluate([sample(1, [thing(first), thing(second)], [first, [0, 0, 10, 9]], [0.9, 0.8])], iou=0.6)
    assert numbers["voc/mAP"] == pytest.approx(0.5)


def test_the_better_score_wins_across_images():
    """A wrong detection in one image comes after a right one in another, whatever the order of the images."""
    images = [sample(1, [], [A], [0.5]), sample(2, [thing(A)], [A], [0.6])]
    assert evaluate(images)["voc/mAP"] == evaluate(images[::-1])["voc/mAP"] == pytest.approx(1)


def test_difficult_objects_are_neither_missed_nor_right_nor_wrong():
    difficult = [thing(A), thing(B, difficult=1)]
    for found in ([A], [A, B], [B, B, A]):
        assert evaluate([sample(1, difficult, found, [0.9, 0.8, 0.7][:len(found)])])["voc/mAP"] == pytest.approx(1)
    assert evaluate([sample(1, difficult, [ELSEWHERE, A], [0.9, 0.8])])["voc/mAP"] == pytest.approx(0.5)


def test_an_overlap_that_just_reaches_the_threshold_is_enough():
    half = [sample(1, [thing([0, 0, 10, 10])], [[0, 0, 10, 5]], [0.9])]
    assert evaluate(half, iou=0.5)["voc/mAP"] == pytest.approx(1)
    assert evaluate(half, iou=0.51)["voc/mAP"] == 0


def test_one_pixel_more_on_each_side_is_vocs_overlap_of_boxes_as_its_files_have_them():
    """Inside pixels 1 to 10 and 1 to 5 of a line of height 1: 5 of 10. Without the one pixel nothing has any height."""
    as_in_files = [sample(1, [thing([1, 1, 10, 1])], [[1, 1, 5, 1]], [0.9])]
    assert evaluate(as_in_files, add_one=True)["voc/mAP"] == pytest.approx(1)
    assert evaluate(as_in_files)["voc/mAP"] == 0
    in_our_form = [sample(1, [thing([0, 0, 10, 1])], [[0, 0, 5, 1]], [0.9])]
    assert evaluate(in_our_form)["voc/mAP"] == pytest.approx(1)


def test_difficult_flags_reach_the_metric_from_the_xml_files(tmp_path):
    entry = "<object><name>dog</name><difficult>{}</difficult>" \
            "<bndbox><xmin>{}</xmin><ymin>1</ymin><xmax>{}</xmax><ymax>10</ymax></bndbox></object>"
    for folder in ("Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "Annotations" / "a.xml").write_text(
        f"<annotation><size><width>50</width><height>40</height></size>{entry.format(0, 1, 10)}{entry.format(1, 21, 30)}</annotation>")
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("a\n")
    record = VOCDataset(data_root=str(tmp_path), ann_file="ImageSets/Main/test.txt", metainfo=dict(classes=("dog",))).get_data_info(0)
    packed = PackSample()({**record, "img": np.zeros((40, 50, 3), np.uint8)})["data_samples"]
    packed.pred_instances = InstanceData(bboxes=torch.tensor([[0.0, 0, 10, 10]]), scores=torch.ones(1), labels=torch.zeros(1).long())
    assert evaluate([packed.to_dict()])["voc/mAP"] == pytest.approx(1)


def test_classes_without_an_object_are_left_out_of_the_mean(monkeypatch):
    said = []
    monkeypatch.setattr("visionkit.evaluation.voc_ap.print_log", lambda text, logger: said.append(text))
    numbers = evaluate([sample(1, [thing(A), thing(B, 1)], [A, ELSEWHERE], [0.9, 0.8], [0, 2])], ("dog", "cat", "cow"), iou=(0.5, 0.75))
    assert numbers["voc/mAP"] == pytest.approx(0.5)
    rows = {line.split()[0]: line.split()[1:] for line in said[0].splitlines() if line.strip()}
    assert rows["class"] == ["objects", "AP50", "AP75"]
    assert (rows["dog"], rows["cat"], rows["cow"]) == (["1", "1.000", "1.000"], ["1", "0.000", "0.000"], ["0", "-", "-"])


def test_no_predictions_give_zeros_and_no_ground_truth_minus_one_each_with_a_warning(warnings):
    assert set(evaluate([sample(1, [thing(A)])]).values()) == {0.0}
    assert "no predictions" in warnings.pop()
    assert set(evaluate([sample(1, [thing(A, difficult=1)], [A], [0.5])]).values()) == {-1.0}
    assert "no ground truth" in warnings.pop()
    assert not warnings


DISTRIBUTED = """
import sys
import torch, torch.distributed as dist
from visionkit.evaluation import VOCMetric
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
metric = VOCMetric()
metric.dataset_meta = {"classes": ("dog",)}
for i in (0, 2, 4) if rank == 0 else (1, 3, 0):              # five images: the second process is filled up with image 0
    boxes = torch.tensor([[0.0, 0, 10, 10 - 2 * i], [20, 20, 30, 30]])
    metric.process(None, [{"img_id": i, "ori_shape": (50, 50), "annotations": [{"bbox": [0, 0, 10, 10], "bbox_label": 0}],
                           "pred_instances": {"bboxes": boxes, "scores": torch.tensor([1 - i / 10, 0.75]),
                                              "labels": torch.zeros(2).long()}}])
print("AP", metric.evaluate(5)["voc/mAP"])
dist.destroy_process_group()
"""


def test_two_processes_give_the_numbers_of_one(tmp_path):
    commands = [[sys.executable, "-c", DISTRIBUTED, str(rank), str(tmp_path / "store")] for rank in range(2)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    samples = [sample(i, [thing(A)], [[0, 0, 10, 10 - 2 * i], [20, 20, 30, 30]], [1 - i / 10, 0.75]) for i in range(5)]
    expected = evaluate(samples)["voc/mAP"]
    assert 0.2 < expected < 0.9
    for text in printed:
        assert float(text.split("AP ")[-1]) == pytest.approx(expected)


def test_the_metric_tells_its_numbers_before_it_is_run():
    assert VOCMetric(iou=(0.5, 0.55)).reported == ["voc/mAP", "voc/mAP_50", "voc/mAP_55"]
    assert list(evaluate([sample(1, [thing(A)])])) == VOCMetric().reported


@pytest.mark.parametrize("arguments, said", [({"iou": 0}, "IoU above 0"), ({"iou": ()}, "IoU above 0"), ({"rule": "2007"}, "'11_points'")])
def test_unknown_choices_are_refused(arguments, said):
    with pytest.raises(ConfigError, match=said):
        METRICS.build({"type": "VOCMetric", **arguments})


def test_a_sample_without_annotations_says_what_to_do():
    bare = sample(5, [])
    del bare["annotations"]
    with pytest.raises(ConfigError, match="VOCMetric.*image 5.*PackSample"):
        evaluate([bare])
