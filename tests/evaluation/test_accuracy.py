import logging
import subprocess
import sys

import numpy as np
import pytest
import torch

from visionkit.evaluation import Accuracy, PretextAccuracy
from visionkit.evaluation.accuracy import chance_to_be_right
from visionkit.registry import METRICS, ConfigError
from visionkit.structures import InstanceData, Sample


def image(img_id, label, scores):
    sample = Sample(metainfo={"img_id": img_id})
    sample.gt_label, sample.pred_scores = torch.tensor(label), torch.tensor(scores, dtype=torch.float32)
    return sample.to_dict()


def puzzles(img_id, labels, scores):
    scores = torch.as_tensor(scores, dtype=torch.float32)
    sample = Sample(metainfo={"img_id": img_id}, pretext=InstanceData(scores=scores, labels=torch.tensor(labels, dtype=torch.int64)))
    return sample.to_dict()


def evaluate(metric, samples, classes=None):
    metric.dataset_meta = {"classes": classes} if classes else None
    metric.process(None, samples)
    return metric.evaluate(len(samples))


@pytest.fixture
def said(monkeypatch):
    """What is printed, warnings included."""
    texts = []
    for place in ("image_metric", "accuracy", "pretext_accuracy"):
        monkeypatch.setattr(f"visionkit.evaluation.{place}.print_log", lambda text, logger, level=logging.INFO: texts.append(text))
    return texts


def test_top_k_counts_the_k_surest_answers():
    samples = [image(0, 2, [0.1, 0.2, 0.7]), image(1, 1, [0.5, 0.3, 0.2]), image(2, 1, [0.6, 0.1, 0.3]), image(3, 0, [0.6, 0.1, 0.3])]
    assert evaluate(Accuracy(top_k=(1, 2, 3)), samples) == {"accuracy/top1": 0.5, "accuracy/top2": 0.75, "accuracy/top3": 1.0}


def test_the_table_has_a_line_a_class(said):
    samples = [image(0, 0, [1, 0, 0]), image(1, 0, [0, 1, 0]), image(2, 2, [0, 0, 1])]
    evaluate(Accuracy(per_class=True), samples, ("cat", "dog", "cow"))
    rows = [line.split() for line in said[0].splitlines()[2:]]
    assert rows == [["class", "images", "top1"], ["cat", "2", "0.500"], ["cow", "1", "1.000"]]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_equal_scores_count_as_a_fair_draw_does_on_average(k):
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 3, (6, 5)).astype(float), rng.integers(0, 5, 6)
    draws = []
    for _ in range(4000):                                    # a tiny random part orders what is equal
        order = np.argsort(-(scores + 0.5 * rng.random(scores.shape)), 1)[:, :k]
        draws.append((order == labels[:, None]).any(1))
    assert chance_to_be_right(scores, labels, k) == pytest.approx(np.mean(draws, 0), abs=0.03)


def test_a_model_that_says_nothing_scores_chance_and_not_more():
    assert evaluate(Accuracy(), [image(i, 0, [0.25] * 4) for i in range(3)])["accuracy/top1"] == pytest.approx(1 / 4)
    assert evaluate(PretextAccuracy(), [puzzles(0, [0, 0], np.ones((2, 8)))]) == pytest.approx(
        {"pretext/accuracy": 1 / 8, "pretext/chance": 1 / 8})


def test_scores_that_are_not_numbers_are_wrong():
    assert evaluate(Accuracy(), [image(0, 0, [float("nan"), 0.1]), image(1, 0, [float("inf"), 0.1])])["accuracy/top1"] == 0


def test_pretext_accuracy_is_over_puzzles_beside_the_mean_chance(said):
    four = puzzles(0, [0, 1, 2, 3], [[9, 0, 0, 0], [0, 9, 0, 0], [0, 0, 0, 9], [0, 0, 0, 9]])
    two = puzzles(1, [1, 0], [[0, 9], [0, 9]])
    numbers = evaluate(PretextAccuracy(), [four, two, puzzles(2, [], np.zeros((0, 5)))])
    assert numbers == pytest.approx({"pretext/accuracy": 4 / 6, "pretext/chance": (4 * 1 / 4 + 2 * 1 / 2) / 6})
    rows = [line.split() for line in said[-1].splitlines()[2:]]
    assert rows == [["right", "answer", "puzzles", "accuracy"], ["0", "2", "0.500"], ["1", "2", "1.000"], ["2", "1", "0.000"],
                    ["3", "1", "1.000"]]
    evaluate(PretextAccuracy(per_answer=3), [four])
    assert len(said[-1].splitlines()) == 2                   # no table of a thousand permutations
    assert set(numbers) == set(PretextAccuracy().reported)


def test_an_image_that_came_twice_counts_once(said):
    assert evaluate(Accuracy(), [image(0, 0, [1, 0]), image(1, 0, [0, 1]), image(0, 0, [1, 0])])["accuracy/top1"] == 0.5
    assert "1 of 3 evaluated images came twice" in said[0]
    assert evaluate(PretextAccuracy(), [puzzles("a", [0], [[1, 0]]), puzzles("b", [0], [[0, 1]]), puzzles("a", [0], [[1, 0]])])[
        "pretext/accuracy"] == 0.5


def test_nothing_to_count_is_minus_one_and_a_warning(said):
    assert set(evaluate(PretextAccuracy(), [puzzles(0, [], np.zeros((0, 4)))]).values()) == {-1.0}
    assert "no puzzle" in said[-1]


DISTRIBUTED = """
import sys
import torch, torch.distributed as dist
from visionkit.evaluation import Accuracy, PretextAccuracy
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
accuracy, pretext = Accuracy(), PretextAccuracy()
for i in (0, 2, 4) if rank == 0 else (1, 3, 0):              # five images: the second process is filled up with image 0
    scores = torch.tensor([1.0, 0]) if i < 3 else torch.tensor([0, 1.0])
    accuracy.process(None, [{"img_id": i, "gt_label": torch.tensor(0), "pred_scores": scores}])
    pretext.process(None, [{"img_id": i, "pretext": {"scores": scores.repeat(i + 1, 1), "labels": torch.zeros(i + 1).long()}}])
print("FOUND", accuracy.evaluate(5)["accuracy/top1"], pretext.evaluate(5)["pretext/accuracy"])
dist.destroy_process_group()
"""


def test_two_processes_count_each_image_once(tmp_path):
    commands = [[sys.executable, "-c", DISTRIBUTED, str(rank), str(tmp_path / "store")] for rank in range(2)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) for command in commands]
    for process in processes:
        printed = process.communicate(timeout=120)[0]
        assert [float(number) for number in printed.split("FOUND ")[-1].split()] == pytest.approx([3 / 5, 6 / 15])


@pytest.mark.parametrize("sample, metric, message", [
    ({"img_id": 3, "pred_scores": torch.ones(2)}, Accuracy(), "needs each sample's `gt_label`, but that of image 3 has none.*ImageFolder"),
    ({"img_id": 3, "gt_label": torch.tensor(0)}, Accuracy(), "`pred_scores`.*`predict` fills it in"),
    (image(3, 2, [0, 1]), Accuracy(), "image 3 has the label 2, and the model scores 2 classes"),
    (image(3, 1, [0, 1]), Accuracy(top_k=5), r"scores 2 classes, of which top_k=\(5,\)"),
    ({"img_id": 3}, PretextAccuracy(), "`pretext`.*self_supervised"),
    (puzzles(3, [2], [[0, 1]]), PretextAccuracy(), r"labels` \[T\] from 0 to K - 1; got \[1, 2\] and the labels \[2\]")])
def test_a_sample_that_cannot_be_judged_says_what_to_do(sample, metric, message):
    with pytest.raises(ConfigError, match=message):
        metric.process(None, [sample])


@pytest.mark.parametrize("config, message", [
    (dict(type="Accuracy", top_k=0), "top_k: .*from 1 on"), (dict(type="Accuracy", top_k=()), "top_k: "),
    (dict(type="PretextAccuracy", per_answer=-1), "per_answer: ")])
def test_unknown_choices_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        METRICS.build(config)


def test_the_metric_tells_its_numbers_before_it_is_run():
    assert Accuracy(top_k=(1, 5)).reported == ["accuracy/top1", "accuracy/top5"]
    assert list(evaluate(Accuracy(), [image(0, 0, [1, 0])])) == Accuracy().reported
