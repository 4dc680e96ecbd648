import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from visionkit import engine
from visionkit.engine.preflight import preflight
from visionkit.engine.probing import Point, features_of, frozen, random_network, read_points
from visionkit.registry import ConfigError

CARD = """
_base_ = {runtime!r}
custom_imports = dict(imports=["probe_parts"])
model = dict(type="ProbePretext", backbone=dict(type="ProbeNet"))
pipeline = [dict(type="LoadImageFromFile"), dict(type="PackSample")]
test_dataloader = dict(batch_size=16, num_workers=0, sampler=dict(type="DrawSampler", shuffle=False),
                       dataset=dict(type="ImageFolder", data_root={root!r} + "/test", pipeline=pipeline))
test_cfg = dict(
    type="ProbeLoop",
    train_dataloader=dict(batch_size=16, num_workers=0, sampler=dict(type="DrawSampler", shuffle=False),
                          dataset=dict(type="ImageFolder", data_root={root!r} + "/train", pipeline=pipeline)),
    points=dict(block1=dict(feature="map0", pool=2), block2=dict(feature="map1"), top=dict(feature="vector", pool=3)))
test_evaluator = [dict(type="LinearProbe", max_iters=30), dict(type="KNNProbe", neighbours=5)]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Images of 32x32 in two classes, stripes across and stripes down, of random colours: 40 to learn from and 20 to be tested on."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 10)):
        for label, name in enumerate(("across", "down")):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                image = np.broadcast_to(rng.integers(0, 256, (32, 1, 3)), (32, 32, 3)).astype(np.uint8)
                cv2.imwrite(str(tmp_path / split / name / f"{index:02}.png"), image if label == 0 else image.transpose(1, 0, 2))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield tmp_path
    sys.modules.pop("probe_parts", None)


@pytest.fixture
def build(folder):
    """The card with options, and a checkpoint of its network as seed 7 draws it."""
    runtime = Path(__file__).parents[2] / "configs" / "_base_" / "runtime.py"
    (folder / "card.py").write_text(CARD.format(runtime=str(runtime), root=str(folder)))

    def write(*options):
        cfg = engine.load_config(folder / "card.py", options)
        for seed in (7, 8):
            torch.save({"state_dict": random_network(cfg.model, seed).state_dict()}, folder / f"{seed}.pth")
        return cfg
    import probe_parts  # noqa: F401

    return write


NAMES = [f"probe/{point}_{kind}" for kind in ("linear", "knn") for point in ("block1", "block2", "top")]


def test_every_number_has_the_random_one_beside_it(build, folder, capfd):
    numbers = engine.test(build(), folder / "7.pth", work_dir=folder / "work")
    assert set(numbers) == {name + end for name in NAMES for end in ("", "_random", "_random_std", "_gain")}
    for name in NAMES:
        assert numbers[f"{name}_gain"] == pytest.approx(numbers[name] - numbers[f"{name}_random"])
    assert numbers["probe/block2_knn"] > 0.8                 # stripes are found by any filter
    assert any(numbers[f"{name}_random_std"] > 0 for name in NAMES)
    printed = capfd.readouterr().out
    assert "frozen features of 40 training and 20 test images" in printed
    rows = [line.split() for line in printed.splitlines() if line.startswith(" probe/")]
    assert [row[0] for row in rows] == NAMES
    assert all(row[2] == "(1)" and row[6] == "(3)" for row in rows)


def test_the_numbers_repeat(build, folder):
    first = engine.test(build(), folder / "7.pth", work_dir=folder / "work")
    torch.manual_seed(99)
    assert engine.test(build(), folder / "7.pth", work_dir=folder / "work") == first


def test_the_pretrained_networks_are_those_of_the_checkpoints_and_the_random_ones_follow_the_seeds(build, folder, capfd):
    """Here the checkpoints are networks of the seeds 7 and 8 themselves, so that a random one equals each."""
    cfg = build("+test_cfg.seeds=(7,8,9)", f"+test_cfg.checkpoints=['{folder}/8.pth']")
    numbers = engine.test(cfg, folder / "7.pth", work_dir=folder / "work")
    found = dict(re.findall(r"(\w+ encoder, seed \d): (.*) \(\d+ s\)", capfd.readouterr().out))
    assert len(found) == 5
    for seed in (7, 8):
        assert found[f"pretrained encoder, seed {seed}"] == found[f"random encoder, seed {seed}"]
    assert len({found[f"random encoder, seed {seed}"] for seed in (7, 8, 9)}) == 3
    of_7, of_8 = (float(found[f"random encoder, seed {seed}"].split("block2_knn ")[1][:5]) for seed in (7, 8))
    assert numbers["probe/block2_knn"] == pytest.approx((of_7 + of_8) / 2, abs=1e-3)
    assert numbers["probe/block2_knn_std"] == pytest.approx(abs(of_7 - of_8) / 2 ** 0.5, abs=1e-3)


@pytest.mark.parametrize("options, said", [
    (["+test_cfg.seeds=(0,1)"], r"test_cfg.seeds: networks at random .* are needed from at least 3 different seeds, got \(0, 1\)"),
    (["+test_cfg.seeds=(0,1,1)"], "at least 3 different seeds"),
    (["test_cfg.points={}"], "test_cfg.points: a probe needs a point"),
    (["test_cfg.points.block1.feature=map7"], r"test_cfg.points.block1.feature: ProbePretext has no features 'map7'.* 'map[01]'"),
    (["+test_cfg.seeds=3"], "test_cfg.seeds: networks at random .* got 3"),
    (["test_cfg.points=map1"], "test_cfg.points: a probe needs a point"),
    (["test_cfg.points.block1=map1"], "test_cfg.points.block1: a point is dict.* got 'map1'"),
    (["test_cfg.train_dataloader=None"], "test_cfg.train_dataloader: a probe learns from labelled training images"),
    (["+test_cfg.checkpoints={}/none.pth"], "test_cfg.checkpoints: no file '.*none.pth' to load weights from"),
    (["test_cfg.points.block1.pool=0"], "test_cfg.points.block1: a point is dict"),
    (["test_cfg.points.block1.pool=9"], "test_cfg.points.block1.pool: 'map0' has 8 x 8 locations here, and 9 x 9 cells would only repeat"),
    (["+test_cfg.points.block1.size=2"], "test_cfg.points.block1: a point is dict"),
    (["test_cfg.train_dataloader.dataset.data_root={}/test"], "test_cfg.train_dataloader.dataset: 20 images are also test images, such as"),
    (["+test_cfg.train_dataloader.dataset.metainfo={'classes': ('down', 'across')}"], "its classes are down, across"),
    (["test_cfg.train_dataloader.dataset.data_root={}/nowhere"], "test_cfg.train_dataloader.dataset.data_root: no folder of images"),
    (["+test_cfg.checkpoints=['{}/7.pth']"], "test_cfg.checkpoints: a checkpoint stands twice"),
    (["+test_cfg.checkpoints=['{}/8.pth','{}/none.pth']"], "test_cfg.checkpoints: no file '.*none.pth' to load weights from"),
    (["+model.fault=trains"], "looking at its features changed backbone.conv1.1.running_mean"),
    (["+model.fault=loads"], "at 'block1' the networks of the seeds 0 and 1 have the same features"),
])
def test_what_would_make_a_probe_lie_is_refused(build, folder, options, said):
    cfg = build(*(option.replace("{}", str(folder)) if "{}/" in option else option for option in options))
    with pytest.raises(ConfigError, match=said):
        engine.test(cfg, folder / "7.pth", work_dir=folder / "work")


def test_images_of_several_sizes_are_refused(build, folder):
    cv2.imwrite(str(folder / "train" / "across" / "00.png"), np.zeros((32, 48, 3), np.uint8))
    with pytest.raises(ConfigError, match="images of one size, but a batch has .*48x32.*Resize"):
        engine.test(build(), folder / "7.pth", work_dir=folder / "work")


def test_pooling_is_the_mean_over_a_grid(build):
    model = random_network(build().model, 0).eval()
    batch = {"inputs": [torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8) for _ in range(2)], "data_samples": [None, None]}
    data = model.data_preprocessor(batch)
    with torch.no_grad():
        maps = model(data["images"], mode="features")
    points = {"whole": Point("map0"), "grid": Point("map0", 2), "one": Point("map1", 1), "vector": Point("vector", 5)}
    vectors, _ = features_of(model, batch, points)
    assert torch.equal(vectors["whole"], maps["map0"].flatten(1))
    corner = maps["map0"][:, :, :4, 4:].mean((2, 3))         # of a map of 8x8: above right
    torch.testing.assert_close(vectors["grid"].view(2, 8, 2, 2)[..., 0, 1], corner)
    torch.testing.assert_close(vectors["one"], maps["map1"].mean((2, 3)))
    assert torch.equal(vectors["vector"], maps["vector"])


def test_a_change_of_any_parameter_or_buffer_is_seen(build):
    model = random_network(build().model, 0)
    model.backbone.conv2[0].weight.data[0] = torch.nan          # as of a run that diverged; it is the probe that refuses it
    with frozen(model):
        pass
    for value in (model.backbone.conv2[0].bias, model.backbone.conv2[1].running_var, model.data_preprocessor.mean):
        with pytest.raises(ConfigError, match="a frozen encoder"), frozen(model):
            value.view(-1)[0] += 1


def test_a_random_network_does_not_load_what_its_config_starts_from():
    cfg = Config(dict(model=dict(type="ImageClassifier", num_classes=2,
                                 backbone=dict(type="ResNet", depth=18, pretrained="file/that/is/not/there.pth")))).model
    first, again, other = (random_network(cfg, seed).backbone.conv1.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_points_are_read_as_they_stand():
    assert read_points(dict(a=dict(feature="map1", pool=2), b=dict(feature="z"))) == {"a": Point("map1", 2), "b": Point("z", None)}


PRETEXT = """
_base_ = {base!r}
custom_imports = dict(imports=["probe_parts"])
model = dict(type="ProbePretext", backbone=dict(type="ProbeNet"))
test_cfg = dict(points=dict(block2=dict(feature="map1", pool=2)))
train_cfg = dict(type="EpochLoop", max_epochs=1)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1))
"""


def test_a_card_on_the_base_for_pretext_passes_the_pre_flight_of_training_and_of_probing(folder, monkeypatch):
    (folder / "cifar10").mkdir()
    for split in ("train", "test"):
        (folder / split).rename(folder / "cifar10" / split)
    monkeypatch.setenv("VISIONKIT_DATA", str(folder))
    (folder / "card.py").write_text(PRETEXT.format(base=str(Path(__file__).parents[2] / "configs" / "_base_" / "cifar10_pretext.py")))
    cfg = engine.load_config(folder / "card.py")
    for training in (True, False):
        preflight(cfg, training)
    (folder / "cifar10" / "train" / "across" / "00.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"^test_cfg.train_dataloader.dataset.*00.png"):
        preflight(cfg, training=False)


def test_tta_and_amp_are_refused(build, folder):
    with pytest.raises(ConfigError, match="test_cfg.type: tta and amp need TestLoop"):
        engine.test(build(), folder / "7.pth", work_dir=folder / "work", amp=True)
