import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from visionkit.evaluation import PanopticQuality
from visionkit.evaluation.panoptic_quality import compare
from visionkit.registry import METRICS, ConfigError
from visionkit.structures import PanopticMap, Sample, Segment
from visionkit.structures.panoptic_map import areas_of, decode_png

ROOT = next((path for path in (os.environ.get("VISIONKIT_DATA"), "../shared/data") if path and Path(path, "coco_panoptic").is_dir()), None)
real_data = pytest.mark.skipif(ROOT is None, reason="needs data/coco_panoptic; VISIONKIT_DATA names the folder that holds it")
CAT, SKY = 0, 1                                              # the classes of the maps below: a thing and stuff


def panoptic(rows, described):
    """A map of one digit a pixel; `described` is id -> label, or (label, True) of a crowd."""
    ids = np.array([[int(digit) for digit in row] for row in rows], np.int32)
    pairs = {id_: value if isinstance(value, tuple) else (value, False) for id_, value in described.items()}
    return PanopticMap(ids, tuple(Segment(id_, label, label == CAT, areas_of(ids)[id_], crowd) for id_, (label, crowd) in pairs.items()))


def evaluate(pairs, classes=("cat", "sky"), isthing=(True, False), **arguments):
    metric = PanopticQuality(**arguments)
    metric.dataset_meta = {"classes": classes, "isthing": isthing, "category_ids": range(10, 10 + len(classes))}
    for img_id, (truth, found) in enumerate(pairs):
        sample = Sample(metainfo={"img_id": img_id, "panoptic": truth})
        sample.pred_panoptic = found
        metric.process(None, [sample.to_dict()])
    return metric.evaluate(len(pairs))


# ---------------------------------------------------------------------------------------------------------- worked out by hand

def test_two_cats_and_the_sky_worked_out_by_hand():
    truth = panoptic(["1122", "1122", "3333"], {1: CAT, 2: CAT, 3: SKY})
    found = panoptic(["1112", "1112", "3333"], {1: CAT, 2: CAT, 3: SKY})
    numbers = evaluate([(truth, found)])
    # the first cat: 4 of 6 pixels; the second 2 of 4, which is not above a half: one missed and one false
    assert numbers["panoptic/SQ_th"] == pytest.approx(4 / 6)
    assert numbers["panoptic/RQ_th"] == pytest.approx(1 / (1 + 1 / 2 + 1 / 2))
    assert numbers["panoptic/PQ_th"] == pytest.approx(1 / 3)
    assert numbers["panoptic/PQ_st"] == numbers["panoptic/SQ_st"] == numbers["panoptic/RQ_st"] == 1
    assert numbers["panoptic/PQ"] == pytest.approx((1 / 3 + 1) / 2)


def test_the_counts_of_all_images_are_added_before_the_quality_is_taken():
    cat, sky, none = panoptic(["11"], {1: CAT}), panoptic(["11"], {1: SKY}), panoptic(["00"], {})
    assert evaluate([(cat, cat), (cat, none), (sky, cat)])["panoptic/PQ_th"] == pytest.approx(1 / 2)        # not the mean of 1, 0 and 0


def test_a_class_that_does_not_occur_is_no_part_of_the_mean_but_one_only_predicted_is():
    cat = panoptic(["1122"], {1: CAT, 2: CAT})
    assert evaluate([(cat, cat)])["panoptic/PQ"] == 1
    assert evaluate([(cat, cat)])["panoptic/PQ_st"] == -1
    assert evaluate([(cat, cat)], classes=("cat", "sky", "sea"), isthing=(True, False, False))["panoptic/PQ"] == 1
    wrong = panoptic(["1123"], {1: CAT, 2: CAT, 3: SKY})
    assert evaluate([(panoptic(["1122"], {1: CAT, 2: CAT}), wrong)])["panoptic/PQ_st"] == 0


@pytest.mark.parametrize("truth, expected", [
    ("000112", [2 / 3, 1, 0, 0]),                            # the union leaves 3 void out: 2 of 3 pixels
    ("000012", [0, 0, 0, 1]),                                # 1 of 2 is not above a half: the cat is missed; 4 of 6 on void: not false
    ("001222", [0, 0, 1, 1]),                                # 2 of 6 on void: false
    ("000222", [0, 0, 1, 0]),                                # just half on void is not more than half
    ("444422", [0, 0, 0, 0]),                                # 4 of 6 on a crowd of cats: not false, and the crowd is not missed
    ("555522", [0, 0, 1, 0]),                                # 4 of 6 on a crowd of another class
    ("004422", [0, 0, 0, 0]),                                # void and crowd together
], ids=["void in the union", "mostly void", "partly void", "half void", "mostly crowd", "another crowd", "void and crowd"])
def test_one_predicted_cat_over_void_and_crowd_worked_out_by_hand(truth, expected):
    known = {1: CAT, 2: SKY, 4: (CAT, True), 5: (SKY, True)}
    truth = panoptic([truth], {id_: value for id_, value in known.items() if str(id_) in truth})
    np.testing.assert_allclose(compare(truth, panoptic(["999999"], {9: CAT}))[CAT], expected)


def test_a_predicted_void_is_nothing():
    truth = panoptic(["1111"], {1: CAT})
    assert evaluate([(truth, panoptic(["1110"], {1: CAT}))])["panoptic/PQ"] == pytest.approx(3 / 4)


def test_ids_say_nothing_only_labels_do():
    truth, found = panoptic(["1122"], {1: CAT, 2: SKY}), panoptic(["9977"], {9: CAT, 7: SKY})
    assert evaluate([(truth, found)])["panoptic/PQ"] == 1
    assert evaluate([(truth, panoptic(["9977"], {9: SKY, 7: CAT}))])["panoptic/PQ"] == 0


# ------------------------------------------------------------------------------------------------------------------ real data

def coco():
    """The two images: their maps, the categories in the order of their ids, and the ids of the maps as the files have them."""
    folder = Path(ROOT) / "coco_panoptic" / "sample_data"
    content = json.loads((folder / "panoptic_examples.json").read_text())
    categories = sorted(content["categories"], key=lambda category: category["id"])
    labels = {category["id"]: label for label, category in enumerate(categories)}
    isthing = [bool(category["isthing"]) for category in categories]
    maps = [PanopticMap.from_coco(decode_png((folder / "panoptic_examples" / one["file_name"]).read_bytes()), one["segments_info"],
                                  labels, isthing) for one in content["annotations"]]
    return maps, categories, isthing


def with_ids(ids, label_of, isthing, crowds=()):
    return PanopticMap(ids, tuple(Segment(id_, label_of[id_], isthing[label_of[id_]], area, id_ in crowds)
                                  for id_, area in areas_of(ids).items() if id_))


def disturbed(truth, isthing):
    """A copy with two people merged, one cut in two, all moved a little, one of another class, one dropped, a hole of void, the crowd
    split in two, and a large false object over whatever was there."""
    ids, label_of = truth.ids.copy(), {segment.id: segment.label for segment in truth.segments}
    people = sorted((segment for segment in truth.segments if segment.label == 0 and not segment.iscrowd), key=lambda one: -one.area)
    crowd = next(segment for segment in truth.segments if segment.iscrowd)
    ids[ids == people[0].id] = people[1].id
    columns = np.arange(ids.shape[1])
    ids[(ids == people[2].id) & (columns % 400 > columns[(ids == people[2].id).any(0)].mean())] = 1
    ids[(ids == crowd.id) & (columns > 300)] = 2
    label_of |= {1: 0, 2: 0, 3: 5}
    label_of[people[3].id] = 7
    ids[ids == people[4].id] = 0
    ids = np.roll(ids, (3, 4), (0, 1))
    ids[100:180, 200:230] = 0
    ids[300:340, 20:120] = 3
    return with_ids(ids, label_of, isthing)


def by_masks(pairs, classes):
    """panopticapi's definition, one pair of masks at a time."""
    counts = np.zeros((classes, 4))                          # sum of IoU, true positives, false positives, false negatives
    for truth, found in pairs:
        void = truth.ids == 0
        matched_truth, matched_found = set(), set()
        for real in truth.segments:
            for guess in found.segments:
                if real.label != guess.label or real.iscrowd:
                    continue
                real_mask, guess_mask = truth.ids == real.id, found.ids == guess.id
                iou = (real_mask & guess_mask).sum() / (real_mask | (guess_mask & ~void)).sum()
                if iou > 0.5:
                    counts[real.label] += iou, 1, 0, 0
                    matched_truth.add(real.id)
                    matched_found.add(guess.id)
        for real in truth.segments:
            counts[real.label, 3] += real.id not in matched_truth and not real.iscrowd
        for guess in found.segments:
            guess_mask, excused = found.ids == guess.id, void.copy()
            for real in truth.segments:
                if real.iscrowd and real.label == guess.label:
                    excused |= truth.ids == real.id
            counts[guess.label, 2] += guess.id not in matched_found and (guess_mask & excused).sum() / guess_mask.sum() <= 0.5
    numbers = {}
    for label, (iou, tp, fp, fn) in enumerate(counts):
        if tp + fp + fn:
            numbers[label] = np.array([iou / (tp + fp / 2 + fn / 2), iou / tp if tp else 0, tp / (tp + fp / 2 + fn / 2)])
    return numbers, counts


@real_data
def test_real_ground_truth_against_itself_is_perfect():
    maps, categories, isthing = coco()
    numbers = evaluate([(one, one) for one in maps], [one["name"] for one in categories], isthing)
    assert all(value == 1.0 for value in numbers.values())   # PQ 1.0 exactly
    assert len(numbers) == 9


@real_data
def test_a_disturbed_copy_of_real_ground_truth_has_panopticapi_s_numbers():
    maps, categories, isthing = coco()
    maps[1].ids[200:260, 300:420] = 0                        # void in the ground truth too, under several segments
    truth = [with_ids(one.ids, {segment.id: segment.label for segment in one.segments}, isthing,
                      {segment.id for segment in one.segments if segment.iscrowd}) for one in maps]
    pairs = [(one, disturbed(one, isthing)) for one in truth]
    expected, counts = by_masks(pairs, len(categories))
    assert counts.sum(0)[1:].tolist() == [28, 18, 19]        # matches, false ones and misses all occur
    numbers = evaluate(pairs, [one["name"] for one in categories], isthing)
    for suffix, chosen in (("", list(expected)), ("_th", [label for label in expected if isthing[label]]),
                           ("_st", [label for label in expected if not isthing[label]])):
        for name, value in zip(("PQ", "SQ", "RQ"), np.mean([expected[label] for label in chosen], axis=0), strict=True):
            assert numbers[f"panoptic/{name}{suffix}"] == pytest.approx(value, abs=1e-12)
    assert numbers["panoptic/PQ"] == pytest.approx(0.471373, abs=1e-6)


def test_an_image_of_four_hundred_segments_takes_milliseconds():
    ids = (np.arange(500)[:, None] // 25 * 20 + np.arange(500) // 25 + 1).astype(np.int32)
    label_of, isthing = {id_: id_ % 8 for id_ in areas_of(ids)}, (True,) * 8
    truth, found = with_ids(ids, label_of, isthing), with_ids(np.roll(ids, 5, 1), label_of, isthing)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        compare(truth, found)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1                                  # 2.3 ms; `by_masks` takes 4.4 s


# -------------------------------------------------------------------------------------------------------------- what it writes

def test_results_are_written_in_coco_s_form(tmp_path):
    truth, found = panoptic(["1122"], {1: CAT, 2: SKY}), panoptic(["3344"], {3: CAT, 4: SKY})
    evaluate([(truth, found)] * 2, outfile_prefix=str(tmp_path / "run" / "panoptic"))
    content = json.loads((tmp_path / "run" / "panoptic.json").read_text())
    assert [one["image_id"] for one in content["annotations"]] == [0, 1]
    one = content["annotations"][1]
    assert one["segments_info"][1] == {"id": 4, "category_id": 11, "iscrowd": 0, "area": 2, "bbox": [2, 0, 2, 1]}
    assert np.array_equal(decode_png((tmp_path / "run" / "panoptic" / one["file_name"]).read_bytes()), found.ids)
    assert content["categories"] == [{"id": 10, "name": "cat", "isthing": 1}, {"id": 11, "name": "sky", "isthing": 0}]
    back = PanopticMap.from_coco(found.ids, one["segments_info"], {10: 0, 11: 1}, (True, False))
    assert evaluate([(truth, back)])["panoptic/PQ"] == 1


def test_images_whose_ids_are_words_have_a_file_each(tmp_path):
    metric = PanopticQuality(outfile_prefix=str(tmp_path / "panoptic"))
    metric.dataset_meta = {"classes": ("cat", "sky"), "isthing": (True, False)}
    maps = [panoptic(["11"], {1: CAT}), panoptic(["22"], {2: SKY})]
    for img_id, found in zip(("day/1", "day 1"), maps, strict=True):
        sample = Sample(metainfo={"img_id": img_id, "panoptic": maps[0]})
        sample.pred_panoptic = found
        metric.process(None, [sample.to_dict()])
    metric.evaluate(2)
    written = json.loads((tmp_path / "panoptic.json").read_text())["annotations"]
    assert [one["image_id"] for one in written] == ["day/1", "day 1"]
    for one, found in zip(written, maps, strict=True):
        assert np.array_equal(decode_png((tmp_path / "panoptic" / one["file_name"]).read_bytes()), found.ids)


def test_an_image_that_comes_twice_counts_once():
    metric = METRICS.build({"type": "PanopticQuality"})
    metric.dataset_meta = {"classes": ("cat", "sky"), "isthing": (True, False)}
    cat, none = panoptic(["11"], {1: CAT}), panoptic(["00"], {})
    for img_id, found in ((1, cat), (2, none), (1, cat), (1, cat)):
        sample = Sample(metainfo={"img_id": img_id, "panoptic": cat})
        sample.pred_panoptic = found
        metric.process(None, [sample.to_dict()])
    assert metric.evaluate(4)["panoptic/PQ"] == pytest.approx(1 / 1.5)
    assert set(metric.reported) >= {"panoptic/PQ", "panoptic/RQ_st"}


DISTRIBUTED = """
import sys
import numpy as np, torch.distributed as dist
from visionkit.evaluation import PanopticQuality
from visionkit.structures import PanopticMap, Sample, Segment
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + folder + "/store", rank=rank, world_size=2)
metric = PanopticQuality(outfile_prefix=folder + "/panoptic")
metric.dataset_meta = {"classes": ("cat", "sky"), "isthing": (True, False)}
for i in (0, 2, 4) if rank == 0 else (1, 3, 0):              # five images: the second process is filled up with image 0
    maps = []
    for row in ([1] * 4 + [2] * 6, [1] * (4 - i) + [2] * (6 + i)):
        ids = np.array([row], np.int32)
        maps.append(PanopticMap(ids, tuple(Segment(id_, id_ - 1, id_ == 1, row.count(id_)) for id_ in (1, 2) if id_ in row)))
    sample = Sample(metainfo={"img_id": i, "panoptic": maps[0]})
    sample.pred_panoptic = maps[1]
    metric.process(None, [sample.to_dict()])
numbers = metric.evaluate(5)
print("PQ", numbers["panoptic/PQ"], numbers["panoptic/PQ_th"])
dist.destroy_process_group()
"""


def test_two_processes_give_the_numbers_of_one_and_write_one_file(tmp_path):
    commands = [[sys.executable, "-c", DISTRIBUTED, str(rank), str(tmp_path)] for rank in range(2)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    # Of image i the cat has 4 - i of its 4 pixels, and the sky all its 6 and i more: cats are found in 0 and 1, missed in 2 to 4, of which
    # 2 and 3 have a false one; skies are found in all but in no more than 6 / (6 + i).
    cat = (4 / 4 + 3 / 4) / (2 + 2 / 2 + 3 / 2)
    sky = sum(6 / (6 + i) for i in range(5)) / 5
    for text in printed:
        assert [float(number) for number in text.split("PQ ")[-1].split()[:2]] == pytest.approx([(cat + sky) / 2, cat])
    content = json.loads((tmp_path / "panoptic.json").read_text())
    assert sorted(one["image_id"] for one in content["annotations"]) == [0, 1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "panoptic").iterdir()) == [f"{image:012d}.png" for image in range(5)]


def test_what_is_missing_is_named():
    cat = panoptic(["11"], {1: CAT})
    with pytest.raises(ConfigError, match="label 5, but the data set has 2 classes"):
        evaluate([(cat, panoptic(["11"], {1: 5}))])
    with pytest.raises(ConfigError, match=r"has \[1, 3\] pixels, its ground truth \[1, 2\]"):
        evaluate([(cat, panoptic(["111"], {1: CAT}))])
    metric = PanopticQuality()
    metric.dataset_meta = {"classes": ("cat",), "isthing": (True,)}
    with pytest.raises(ConfigError, match=r"LoadPanopticAnnotations and PackSample\(meta_keys="):
        metric.process(None, [Sample(metainfo={"img_id": 3}).to_dict()])
    with pytest.raises(ConfigError, match="predicts no panoptic map"):
        metric.process(None, [Sample(metainfo={"img_id": 3, "panoptic": cat}).to_dict()])
    metric.dataset_meta = {"classes": ("cat",)}
    with pytest.raises(ConfigError, match="isthing"):
        metric.process(None, [Sample(metainfo={"img_id": 3, "panoptic": cat}).to_dict()])
