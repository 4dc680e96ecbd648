import time
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from visionkit.evaluation import KNNProbe, LinearProbe, ProbeComparison
from visionkit.evaluation.linear_probe import fit
from visionkit.evaluation.probe import standardise
from visionkit.registry import METRICS, ConfigError
from visionkit.structures import Sample


def samples(features, labels, split, seed=0, encoder="pretrained", point="p"):
    found = []
    for index, (vector, label) in enumerate(zip(features, labels, strict=True)):
        sample = Sample(metainfo={"img_id": f"{index:06}", "split": split, "encoder": encoder, "seed": seed}, features={point: vector})
        sample.gt_label = torch.tensor(int(label))
        found.append(sample.to_dict())
    return found


def planted(count, generator, dims=12, classes=4, gap=4.0):
    """Noise, in which the first `classes` values tell the class; on scales and shifts that differ by a factor of a million."""
    labels = torch.randint(classes, (count,), generator=generator)
    features = torch.randn(count, dims, generator=generator)
    features[:, :classes] += gap * F.one_hot(labels, classes)
    return features * torch.logspace(-3, 3, dims) + torch.linspace(-5, 5, dims), labels


def probe(metric, train, test, seed=0):
    batch = samples(*train, "train", seed) + samples(*test, "test", seed)
    metric.process(None, batch)
    return metric.evaluate(len(batch))


@pytest.fixture
def splits():
    generator = torch.Generator().manual_seed(0)
    return planted(400, generator), planted(300, generator)


@pytest.mark.parametrize("metric", [LinearProbe(), KNNProbe(neighbours=10)], ids=["linear", "knn"])
def test_what_is_planted_is_found_and_shuffled_labels_give_chance(metric, splits):
    train, test = splits
    (name, accuracy), = probe(metric, train, test).items()
    assert name == f"probe/p_{metric.suffix}"
    assert accuracy > 0.9
    shuffled = train[1][torch.randperm(400, generator=torch.Generator().manual_seed(1))]
    assert probe(metric, (train[0], shuffled), test)[name] == pytest.approx(0.25, abs=0.07)


def test_the_linear_probe_is_the_minimum_of_its_formula(splits):
    """The formula is convex, so where its gradient is zero it is lowest."""
    (features, labels), _ = splits
    features = (features.double() - features.double().mean(0)) / features.double().std(0)
    weights = torch.from_numpy(fit(features, labels, 0.1, np.zeros((13, 4)), 500)).requires_grad_()
    loss = F.cross_entropy(features @ weights[:-1] + weights[-1], labels) + 0.05 * weights[:-1].square().sum()
    loss.backward()
    assert weights.grad.abs().max() < 1e-3
    assert loss < np.log(4) / 2
    single = torch.from_numpy(fit(features.float(), labels, 0.1, np.zeros((13, 4)), 500))
    torch.testing.assert_close(single, weights.detach(), atol=1e-2, rtol=0)


def test_the_strength_of_the_penalty_is_chosen_on_held_out_images():
    """Few images of many noisy features: without a strong penalty the classifier learns them by heart."""
    generator = torch.Generator().manual_seed(0)
    train, test = (planted(count, generator, dims=150, classes=2, gap=1.5) for count in (200, 1000))
    alone = {l2: probe(LinearProbe(l2=(l2,)), train, test)["probe/p_linear"] for l2 in (1.0, 1e-5)}
    assert alone[1.0] > alone[1e-5] + 0.02
    assert probe(LinearProbe(l2=(1e-5, 1.0)), train, test)["probe/p_linear"] == alone[1.0]


def test_test_images_take_no_part_in_the_fit(splits):
    """The accuracy is the mean over the test images, whichever others are there: nothing is fitted or standardised on them."""
    train, (features, labels) = splits
    halves = [slice(0, 150), slice(150, 300)]
    for metric in (LinearProbe(), KNNProbe(neighbours=10)):
        whole, *parts = (next(iter(probe(metric, train, (features[part], labels[part])).values())) for part in (slice(None), *halves))
        assert whole == pytest.approx(np.mean(parts), abs=1e-6)


def test_the_knn_probe_votes_as_a_loop_over_images_does(splits):
    (train, train_labels), (test, test_labels) = ((features[:40], labels[:40]) for features, labels in splits)
    mean, std = train.double().mean(0), train.double().std(0, unbiased=False)
    right = 0
    for vector, label in zip((test.double() - mean) / std, test_labels, strict=True):
        likeness = F.cosine_similarity(vector[None], (train.double() - mean) / std)
        votes = torch.zeros(4, dtype=torch.float64)
        for index in likeness.argsort(descending=True)[:5]:
            votes[train_labels[index]] += (likeness[index] / 0.07).exp()
        right += int(votes.argmax() == label)
    assert probe(KNNProbe(neighbours=5), (train, train_labels), (test, test_labels))["probe/p_knn"] == pytest.approx(right / 40)
    assert 10 < right < 40


def test_standardised_features_have_mean_0_deviation_1_and_constants_say_nothing():
    train, test = torch.randn(50, 300) * 7 + 1000, torch.randn(20, 300)
    train[:, 3], test[:, 3] = 0.1, 5.0                       # constant in training only
    expected = (test - train.mean(0)) / train.std(0, unbiased=False)
    standardise(train, test)
    usual = torch.arange(300) != 3
    torch.testing.assert_close(train[:, usual].mean(0), torch.zeros(299), atol=1e-4, rtol=0)
    torch.testing.assert_close(train[:, usual].std(0, unbiased=False), torch.ones(299), atol=1e-4, rtol=0)
    torch.testing.assert_close(test[:, usual], expected[:, usual], atol=1e-2, rtol=1e-3)
    assert (train[:, 3] == 0).all()
    assert (test[:, 3] == 0).all()


def test_the_held_out_images_depend_on_the_seed_and_on_nothing_else(splits):
    train, test = splits
    noisy = train[0] + 3 * torch.randn(train[0].shape, generator=torch.Generator().manual_seed(2)) * train[0].std(0)
    batch = samples(noisy, train[1], "train") + samples(*test, "test")
    def measured(order, seed):
        metric = LinearProbe(l2=(0.1,))
        metric.process(None, [{**batch[index], "seed": seed} for index in order])
        return metric.evaluate(len(batch))["probe/p_linear"]
    forwards = measured(range(700), 0)
    assert measured(range(699, -1, -1), 0) == forwards
    assert len({measured(range(700), seed) for seed in range(4)}) > 1


def test_an_image_that_came_twice_counts_once_in_its_split(splits, monkeypatch):
    said = []
    monkeypatch.setattr("visionkit.evaluation.image_metric.print_log", lambda text, *_, **__: said.append(text))
    train, test = splits
    metric = KNNProbe(neighbours=10)
    batch = samples(*train, "train") + samples(*test, "test")
    metric.process(None, batch + batch[:5])                  # ids repeat between the splits, which is no doubling
    assert metric.evaluate(705) == probe(KNNProbe(neighbours=10), train, test)
    assert said == ["KNNProbe: 5 of 705 evaluated images came twice and count once"]


def test_features_are_kept_once():
    features = torch.randn(200, 5000)
    batch = samples(features, [0, 1] * 100, "train")
    metrics = [LinearProbe(), KNNProbe()]
    tracemalloc.start()
    for metric in metrics:
        metric.process(None, batch)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < features.nbytes / 10
    features[3, 4] = 77.0
    assert all(metric.results[3]["features"]["p"][4] == 77.0 for metric in metrics)


def test_ten_thousand_images_of_256_features_take_seconds():
    features, labels = planted(10_000, torch.Generator().manual_seed(0), dims=256, classes=10, gap=2.0)
    standardise(features)
    start = time.perf_counter()
    assert LinearProbe().measure(features, labels, features[:500], labels[:500]) > 0.6
    assert time.perf_counter() - start < 60                  # 3 s where nothing else runs


@pytest.mark.parametrize("change, said", [
    (lambda batch: batch[0].pop("split"), "needs each sample's `split`.*ProbeLoop"),
    (lambda batch: batch[0].pop("features"), "needs each sample's `features`.*ProbeLoop"),
    (lambda batch: batch[0].pop("gt_label"), "needs each sample's `gt_label`.*labelled images"),
    (lambda batch: batch[0].update(encoder="random"), "one encoder at a time, and was given pretrained 0, random 0"),
    (lambda batch: batch[0].update(features={"p": torch.zeros(3)}), "at 'p' image '00000.' has .* features and others"),
    (lambda batch: batch[0].update(features={"p": torch.full((12,), torch.nan)}), "features at 'p' are not all finite"),
    (lambda batch: [one.update(split="train") for one in batch], "10 training images of two classes and a test image, got .* and 0"),
    (lambda batch: [one.update(gt_label=torch.tensor(1)) for one in batch], "two classes")])
def test_samples_that_cannot_be_judged_say_what_to_do(splits, change, said):
    train, test = splits
    batch = samples(train[0][:20], train[1][:20], "train") + samples(test[0][20:30], test[1][20:30], "test")
    change(batch)
    metric = KNNProbe(neighbours=3)
    with pytest.raises(ConfigError, match=said):
        metric.process(None, batch)
        metric.evaluate(30)


@pytest.mark.parametrize("config, said", [
    (dict(type="LinearProbe", l2=()), "l2 is one weight or more"), (dict(type="LinearProbe", l2=(0,)), "above 0"),
    (dict(type="KNNProbe", neighbours=0), "neighbours is at least 1"), (dict(type="KNNProbe", temperature=0), "temperature above 0")])
def test_unknown_choices_are_refused(config, said):
    with pytest.raises(ConfigError, match=said):
        METRICS.build(config)


def test_more_neighbours_than_images_are_an_error(splits):
    with pytest.raises(ConfigError, match="401 neighbours are to vote and there are 400 training images"):
        probe(KNNProbe(neighbours=401), *splits)


def test_the_comparison_has_means_deviations_and_the_difference():
    comparison = ProbeComparison()
    for value in (0.5, 0.6):
        comparison.add("pretrained", {"probe/a_linear": value, "probe/b_knn": 0.31})
    for value in (0.3, 0.4, 0.5):
        comparison.add("random", {"probe/a_linear": value, "probe/b_knn": 0.30})
    assert comparison.numbers() == pytest.approx({
        "probe/a_linear": 0.55, "probe/a_linear_random": 0.4, "probe/a_linear_gain": 0.15, "probe/a_linear_std": 0.005 ** 0.5,
        "probe/a_linear_random_std": 0.1, "probe/b_knn": 0.31, "probe/b_knn_random": 0.3, "probe/b_knn_gain": 0.01, "probe/b_knn_std": 0,
        "probe/b_knn_random_std": 0})
    rows = [line.split() for line in comparison.table().splitlines()]
    assert " ".join(rows[1]) == "probe/a_linear 0.550 ± 0.071 (2) 0.400 ± 0.100 (3) +15.0"
    assert " ".join(rows[2]) == "probe/b_knn 0.310 ± 0.000 (2) 0.300 ± 0.000 (3) +1.0 no gain at this budget"


def test_a_single_pretraining_has_no_deviation():
    comparison = ProbeComparison()
    comparison.add("pretrained", {"x": 0.5})
    comparison.add("random", {"x": 0.5})
    assert set(comparison.numbers()) == {"x", "x_random", "x_gain"}
    assert comparison.table().splitlines()[1].split() == ["x", "0.500", "(1)", "0.500", "(1)", "+0.0", "no", "gain", "at", "this", "budget"]
