import copy
import json
import random
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch import nn

from visionkit.datasets import ImageTokens
from visionkit.engine.preflight import (
    check_classes,
    check_components,
    check_keys,
    check_sections,
    check_tokens,
    load_first,
    preflight,
)
from visionkit.models.base import Model
from visionkit.registry import DATASETS, HEADS, HOOKS, MODELS, TRANSFORMS, ConfigError


@DATASETS.register_module()
class PreflightScenes:
    def __init__(self, pipeline=()):
        self.pipeline = pipeline


CONFIG = dict(
    model=dict(type="ImagePreprocessor", pad_divisor=32),
    train_dataloader=dict(batch_size=2, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=True),
                          dataset=dict(type="ConcatDataset", datasets=[
                              dict(type="PreflightScenes", pipeline=[dict(type="Resize", scale=(8, 8))])])),
    train_cfg=dict(by_epoch=True, max_epochs=1),
    optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1e-3), clip_grad=dict(max_norm=10)),
    param_scheduler=[dict(type="LinearLR", start_factor=0.1, by_epoch=False), dict(type="CosineAnnealingLR", T_max=3)],
    val_evaluator=dict(type="CocoMetric"),
    default_hooks=dict(timer=dict(type="IterTimerHook"), logger=None),
    custom_hooks=[dict(type="EMAHook", priority=49)],
    visualizer=dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")]),
    log_processor=dict(by_epoch=True),
)


def changed(**changes):
    """The config with some dotted keys changed."""
    cfg = Config(copy.deepcopy(CONFIG))
    cfg.merge_from_dict({key.replace("__", "."): value for key, value in changes.items()}, allow_list_keys=True)
    return cfg


def test_a_good_config_passes():
    check_keys(changed())
    check_components(changed())


@pytest.mark.parametrize("key, said", [
    ("model__type=ImagePreprocesor", r"^model\.type: no model named 'ImagePreprocesor'. Did you mean 'ImagePreprocessor'"),
    ("train_dataloader__dataset__type=ConcatDatset", r"^train_dataloader\.dataset\.type: .*Did you mean 'ConcatDataset'"),
    ("train_dataloader__dataset__datasets__0__pipeline__0__type=Resizze",
     r"^train_dataloader\.dataset\.datasets\[0\]\.pipeline\[0\]\.type: no transform .*'Resize'"),
    ("train_dataloader__sampler__type=DefaultSamplr", r"^train_dataloader\.sampler\.type: no sampler .*'DefaultSampler'"),
    ("optim_wrapper__optimizer__type=AdamWW", r"^optim_wrapper\.optimizer\.type: no optimizer .*'AdamW'"),
    ("param_scheduler__1__type=CosineAnealingLR", r"^param_scheduler\[1\]\.type: .*'CosineAnnealingLR'"),
    ("val_evaluator__type=CoccoMetric", r"^val_evaluator\.type: no metric .*'CocoMetric'"),
    ("default_hooks__timer__type=IterTimeHook", r"^default_hooks\.timer\.type: no hook .*'IterTimerHook'"),
    ("custom_hooks__0__type=EMAHok", r"^custom_hooks\[0\]\.type: no hook .*'EMAHook'"),
    ("visualizer__vis_backends__0__type=LocalBackend", r"^visualizer\.vis_backends\[0\]\.type: no vis.* .*'LocalVisBackend'"),
])
def test_a_misspelt_type_is_found_at_any_depth(key, said):
    key, _, value = key.partition("=")
    with pytest.raises(ConfigError, match=said):
        check_components(changed(**{key: value}))


@pytest.mark.parametrize("key, said", [
    ("model__pad_divisr", r"^model\.pad_divisr: ImagePreprocessor has no argument .*'pad_divisor'"),
    ("train_dataloader__batchsize", r"^train_dataloader\.batchsize: DataLoader has no argument .*'batch_size'"),
    ("train_dataloader__sampler__shufle", r"^train_dataloader\.sampler\.shufle: DefaultSampler .*'shuffle'"),
    ("train_dataloader__dataset__datasets__0__pipeline__0__scal", r"pipeline\[0\]\.scal: Resize .*'scale'"),
    ("train_cfg__max_epoch", r"^train_cfg\.max_epoch: EpochLoop has no argument .*'max_epochs'"),
    ("optim_wrapper__optimizer__weight_decy", r"^optim_wrapper\.optimizer\.weight_decy: AdamW .*'weight_decay'"),
    ("optim_wrapper__clip_gradient", r"^optim_wrapper\.clip_gradient: OptimWrapper .*'clip_grad'"),
    ("param_scheduler__1__eta_mni", r"^param_scheduler\[1\]\.eta_mni: CosineAnnealing.*'eta_min'"),
    ("val_evaluator__metrics_", r"^val_evaluator\.metrics_: CocoMetric .*'metric'"),
    ("default_hooks__timer__interval", r"^default_hooks\.timer\.interval: IterTimerHook has no argument"),
    ("log_processor__window_sise", r"^log_processor\.window_sise: LogProcessor .*'window_size'"),
])
def test_a_wrong_argument_is_found_at_any_depth(key, said):
    with pytest.raises(ConfigError, match=said):
        check_components(changed(**{key: 1}))


def test_a_dict_that_its_owner_interprets_by_itself_is_left_alone():
    check_components(Config(dict(model=dict(
        type="PreflightOwner", norm=dict(type="BN", requires_grad=True), style=dict(type="anything", goes=1),
        head=dict(type="PreflightOwner", not_compared=1)))))  # a head by its key, but registered as a model


@pytest.mark.parametrize("key, meant", [("optim_wraper", "optim_wrapper"), ("custom_hook", "custom_hooks"),
                                            ("train_dataloder", "train_dataloader"), ("param_schedulers", "param_scheduler")])
def test_a_top_level_key_that_nearly_means_something_is_refused(key, meant):
    with pytest.raises(ConfigError, match=f"^{key}: nothing reads this key. Did you mean '{meant}'"):
        check_keys(changed(**{key: 1}))


def test_names_of_the_users_own_are_fine(monkeypatch):
    said = []
    monkeypatch.setattr("visionkit.engine.preflight.print_log", lambda text, **_: said.append(text))
    pipeline = CONFIG["train_dataloader"]["dataset"]["datasets"][0]["pipeline"]
    check_keys(changed(data_root="data/x", classes=("a",), train_pipeline=pipeline, image_size=(8, 8)))
    assert not said
    check_keys(changed(evaluation=dict(type="CocoMetric", per_class=False)))
    assert said == ["config: nothing reads `evaluation`, so its CocoMetric is not used"]


# ----------------------------------------------------------------------------------------------------- builds and data

@HEADS.register_module()
class PreflightHead(nn.Module):
    def __init__(self, num_classes=2):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        self.linear = nn.Linear(3, num_classes)


@MODELS.register_module()
class PreflightModel(Model):
    def __init__(self, head):
        super().__init__()
        self.head = HEADS.make(head, at="head")

    def forward(self, images):
        return self.head.linear(images.tensor.mean((2, 3)))

    def loss(self, images, samples):
        return {"loss": self(images).sum()}

    def predict(self, images, samples):
        return samples


@MODELS.register_module()
class PreflightOwner(nn.Module):
    def __init__(self, norm, style, head):
        super().__init__()


@TRANSFORMS.register_module()
class PreflightNoise:
    def __init__(self, key="img"):
        self.key = key

    def __call__(self, results):
        results[self.key] = results[self.key] + np.uint8(random.random() * 2)
        return results


@pytest.fixture
def folder(tmp_path):
    """Three images of 32x24 with a box each, in COCO's format."""
    (tmp_path / "images").mkdir()
    for index in range(3):
        cv2.imwrite(str(tmp_path / "images" / f"{index}.png"), np.full((24, 32, 3), 60 * index, np.uint8))
    write(tmp_path)
    return tmp_path


def write(folder, names=("cat", "dog"), crowd=0):
    (folder / "train.json").write_text(json.dumps({
        "images": [{"id": 10 + index, "file_name": f"{index}.png", "width": 32, "height": 24} for index in range(3)],
        "annotations": [{"id": index + 1, "image_id": 10 + index, "category_id": 1, "bbox": [2, 2, 8, 8], "area": 64, "iscrowd": crowd}
                        for index in range(3)],
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(names)]}))


def runnable(folder, **changes):
    dataset = dict(type="CocoDataset", data_root=str(folder), ann_file="train.json", data_prefix=dict(img="images"),
                   metainfo=dict(classes=("cat", "dog")),
                   pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSample")])
    loader = dict(batch_size=1, num_workers=0, dataset=dataset, sampler=dict(type="DrawSampler", shuffle=False))
    cfg = Config(dict(
        model=dict(type="PreflightModel", head=dict(type="PreflightHead", num_classes=2)),
        train_dataloader=copy.deepcopy(loader), val_dataloader=copy.deepcopy(loader), test_dataloader=copy.deepcopy(loader),
        train_cfg=dict(by_epoch=True, max_epochs=2), val_cfg=dict(), test_cfg=dict(),
        val_evaluator=dict(type="CocoMetric"), test_evaluator=[dict(type="CocoMetric")],
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)), default_hooks=dict(timer=dict(type="IterTimerHook")),
        param_scheduler=[dict(type="LinearLR", start_factor=0.1, end=1, convert_to_iter_based=True), dict(type="CosineAnnealingLR")],
        default_scope="visionkit"))
    cfg.merge_from_dict({key.replace("__", "."): value for key, value in changes.items()}, allow_list_keys=True)
    return cfg


@pytest.mark.parametrize("training", [True, False])
def test_a_config_that_runs_passes_in_seconds_and_leaves_no_trace(folder, training):
    cfg = runnable(folder)
    before = copy.deepcopy(cfg.to_dict())
    torch.manual_seed(3)
    expected = torch.get_rng_state()
    start = time.perf_counter()
    preflight(cfg, training)
    assert time.perf_counter() - start < 30                  # 0.3 s where nothing else runs
    assert torch.equal(torch.get_rng_state(), expected)
    assert cfg.to_dict() == before


def fails(cfg, said, training=True):
    with pytest.raises(ConfigError, match=said) as caught:
        preflight(cfg, training)
    return caught.value


def test_a_value_that_a_constructor_refuses_names_its_place(folder):
    fails(runnable(folder, model__head__num_classes=0), r"^model\.head: PreflightHead: num_classes must be at least 1, got 0")
    fails(runnable(folder, val_evaluator__metric="boxes"), r"^val_evaluator\.metric: .*'boxes'")
    fails(runnable(folder, test_evaluator__0__backend="x"), r"^test_evaluator\[0\]\.backend: ", training=False)
    fails(runnable(folder, optim_wrapper__optimizer__lr=-1), r"^optim_wrapper: .*learning rate: -1")
    fails(runnable(folder, param_scheduler__0__start_factor=7), r"^param_scheduler\[0\]: .*[Ss]tart")
    fails(runnable(folder, train_dataloader__batch_size=0), r"^train_dataloader: .*batch_size")
    fails(runnable(folder, train_dataloader__persistent_workers=True), r"^train_dataloader: persistent_workers")


def test_a_missing_argument_is_found_by_building(folder):
    cfg = runnable(folder)
    del cfg.model["head"]
    fails(cfg, r"^model: PreflightModel needs the argument 'head'")


@pytest.mark.parametrize("needed", ["dataset", "sampler"])
def test_a_loader_without_what_it_needs_is_named(folder, needed):
    cfg = runnable(folder)
    del cfg.val_dataloader[needed]
    fails(cfg, f"^val_dataloader: a loader needs a `{needed}`")


def test_hooks_are_built(folder):
    @HOOKS.register_module(name="PreflightHook", force=True)
    class PreflightHook:
        def __init__(self, interval=1):
            if interval < 1:
                raise ValueError("interval must be 1 or more")
    fails(runnable(folder, custom_hooks=[dict(type="PreflightHook", priority=40, interval=0)]), r"^custom_hooks\[0\]: .*interval must be 1")
    fails(runnable(folder, default_hooks__timer=dict(type="PreflightHook", interval=0)), r"^default_hooks\.timer: .*interval must")


def test_the_number_by_which_the_best_is_kept_is_one_that_validation_reports(folder):
    hook = dict(type="CheckpointHook", save_best="coco/bbox_map50")
    fails(runnable(folder, default_hooks__checkpoint=hook), r"^default_hooks\.checkpoint\.save_best: .*'coco/bbox_mAP_50'")
    hook = dict(type="EarlyStoppingHook", monitor="bbox_mAP")
    fails(runnable(folder, custom_hooks=[hook]), r"^custom_hooks\[0\]\.monitor: .*'coco/bbox_mAP'")
    preflight(runnable(folder, default_hooks__checkpoint=dict(type="CheckpointHook", save_best=["auto", "coco/bbox_AR_100"])))


def test_weights_to_start_from_are_looked_for(folder):
    fails(runnable(folder, load_from="weights.pth"), r"^load_from: no file 'weights\.pth'")


@pytest.mark.parametrize("backbone, said", [
    (dict(pretrained="trunk.pth"), r"^model\.backbone\.pretrained: no file 'trunk\.pth'"),
    (dict(init_cfg=dict(type="Pretrained", checkpoint="trunk.pth")), r"^model\.backbone\.init_cfg\.checkpoint: no file 'trunk\.pth'")])
def test_the_weights_of_a_part_are_looked_for_where_it_is_trained(folder, backbone, said):
    cfg = runnable(folder, model__backbone=dict(type="ResNet", depth=18, **backbone))
    with pytest.raises(ConfigError, match=said):
        check_sections(cfg, training=True)
    check_sections(cfg, training=False)                      # a test has them from its checkpoint
    check_sections(runnable(folder, model__backbone=dict(pretrained="torchvision://resnet18")), training=True)


@pytest.mark.parametrize("absent, training, said", [
    ("train_cfg", True, "^train_cfg: train_dataloader, train_cfg, optim_wrapper belong together"),
    ("val_evaluator", True, "^val_evaluator: .*belong together"),
    ("test_dataloader", False, "^test_dataloader: .*belong together"),
    ("model", True, "^model: the config has no `model`")])
def test_sections_that_belong_together_are_all_there(folder, absent, training, said):
    fails(runnable(folder, **{absent: None}), said, training)


def test_training_without_validation_is_fine(folder):
    preflight(runnable(folder, val_dataloader=None, val_cfg=None, val_evaluator=None))


def test_a_missing_annotation_file_is_named(folder):
    fails(runnable(folder, val_dataloader__dataset__ann_file="valid.json"), r"^val_dataloader\.dataset\.ann_file: .*valid\.json")


def test_missing_images_are_counted_and_named(folder):
    (folder / "images" / "1.png").unlink()
    error = fails(runnable(folder), r"^train_dataloader\.dataset: 1 of 3 image files do not exist: .*1\.png \(image id 11\)")
    assert "data_prefix" in str(error)
    fails(runnable(folder, train_dataloader__dataset__data_prefix=dict(img="pictures")), "3 of 3 image files")


def test_missing_images_are_told_where_others_replace_them(folder, monkeypatch):
    said = []
    monkeypatch.setattr("visionkit.engine.preflight.print_log", lambda text, **_: said.append(text))
    (folder / "images" / "1.png").unlink()
    preflight(runnable(folder, train_dataloader__dataset__on_error="skip", val_dataloader=None, val_cfg=None, val_evaluator=None))
    assert "1 of 3 image files do not exist" in said[0]


def test_classes_that_the_annotation_file_does_not_have_are_an_error_with_both_sides(folder):
    write(folder, names=("Cat", "Dogs"))
    error = fails(runnable(folder), r"^train_dataloader\.dataset\.metainfo\.classes: .*'cat'.*Did you mean 'Cat'")
    assert "Dogs" in str(error)


def test_an_annotation_file_without_a_box_that_counts_is_an_error(folder):
    write(folder, crowd=1)
    fails(runnable(folder), r"^train_dataloader\.dataset: no box is left to train on in 3 images\. Classes: cat, dog")


def test_images_alone_need_no_box(folder):
    write(folder, crowd=1)
    cfg = runnable(folder)
    cfg.train_dataloader.dataset.pipeline = [dict(type="LoadImageFromFile"), dict(type="PackSample")]
    preflight(cfg)


@pytest.mark.parametrize("field, said", [("gt_instances", "with LoadAnnotations before PackSample"), ("gt_label", "such as ImageFolder"),
                                         ("depth", "let its pipeline load them")])
def test_what_a_model_learns_from_is_in_the_samples(folder, monkeypatch, field, said):
    monkeypatch.setattr(MODELS.get("PreflightModel"), "learns_from", (field,), raising=False)
    cfg = runnable(folder)
    cfg.train_dataloader.dataset.pipeline = [dict(type="LoadImageFromFile"), dict(type="PackSample")]
    fails(cfg, rf"^train_dataloader\.dataset: PreflightModel learns from {field}, which the samples here do not have; .*{said}")
    preflight(cfg, training=False)
    monkeypatch.setattr(MODELS.get("PreflightModel"), "learns_from", ("gt_instances",))
    preflight(runnable(folder))


def test_the_models_number_of_classes_is_compared_with_the_datas(folder):
    fails(runnable(folder, model__head__num_classes=80),
          r"^model\.head\.num_classes: the model has 80 classes, but train_dataloader\.dataset has 2 \(cat, dog\); set num_classes=2")


def test_a_default_number_of_classes_is_compared_too(folder):
    write(folder, names=("cat", "dog", "newt"))
    classes = dict(metainfo=dict(classes=("cat", "dog", "newt")))
    cfg = runnable(folder, train_dataloader__dataset=classes, val_dataloader__dataset=classes)
    del cfg.model.head["num_classes"]
    fails(cfg, r"^model\.head\.num_classes: the model has 2 classes, but .* has 3")


def test_a_backbones_number_of_classes_is_its_own_affair():
    cfg = dict(type="X", backbone=dict(type="Y", num_classes=1000), head=dict(type="Z", num_classes=2))
    check_classes(cfg, nn.Module(), {("train_dataloader", "dataset"): ("cat", "dog")})


def test_validation_with_other_classes_than_training_is_an_error(folder):
    fails(runnable(folder, val_dataloader__dataset__metainfo=dict(classes=("dog", "cat"))),
          r"^val_dataloader\.dataset: its classes are dog, cat, but those of train_dataloader\.dataset are cat, dog")


def test_the_first_sample_goes_through_the_pipeline_and_the_error_names_the_transform(folder):
    cfg = runnable(folder)
    cfg.train_dataloader.dataset.pipeline.insert(1, dict(type="PreflightNoise", key="image"))
    fails(cfg, r"^train_dataloader\.dataset\.pipeline\[1\]: KeyError: 'image'")


def test_an_unreadable_first_image_is_named(folder):
    (folder / "images" / "0.png").write_bytes(b"no image")
    fails(runnable(folder), r"^train_dataloader\.dataset\.pipeline\[0\]: cannot read the image .*0\.png \(image id 10")


def test_data_sets_within_a_wrapper_are_checked(folder):
    inner = runnable(folder).train_dataloader.dataset
    cfg = runnable(folder)
    cfg.train_dataloader.dataset = dict(type="ConcatDataset", datasets=[inner, copy.deepcopy(inner)])
    preflight(cfg)
    cfg.train_dataloader.dataset.datasets[1].data_prefix = dict(img="elsewhere")
    fails(cfg, r"^train_dataloader\.dataset\.datasets\[1\]: 3 of 3 image files")


@pytest.mark.parametrize("key, value", [
    ("train_dataloader__dataset", "CocoDataset"), ("train_dataloader__sampler", "DrawSampler"), ("train_cfg", "EpochLoop"),
    ("optim_wrapper", "OptimWrapper"), ("optim_wrapper__optimizer", "SGD"), ("param_scheduler", "LinearLR"),
    ("val_evaluator", "CocoMetric"), ("train_dataloader", "loader"), ("model", "PreflightModel")])
def test_a_name_instead_of_a_dict_is_told(folder, key, value):
    place = key.replace("__", r"\.")
    fails(runnable(folder, **{key: value}), rf"^{place}: a component is dict\(type='{value}', ...\) here, got the text '{value}'")


def test_weights_that_are_no_path_are_told(folder):
    fails(runnable(folder, load_from=3), r"^load_from: this is the path of a checkpoint, got 3")


@pytest.mark.parametrize("key, training", [("train_dataloader", True), ("val_dataloader", True), ("test_dataloader", False)])
@pytest.mark.parametrize("steps", [[], [dict(type="LoadImageFromFile")]], ids=["none", "one"])
def test_a_pipeline_that_does_not_end_with_a_sample_is_told(folder, key, training, steps):
    cfg = runnable(folder)
    cfg[key].dataset.pipeline = steps
    fails(cfg, rf"^{key}\.dataset\.pipeline: a model takes dict\(inputs=.*the pipeline ends with a dict of .*PackSample", training)


def test_a_process_without_images_is_fine():
    """Of more processes than images."""
    assert load_first([0], iter(()), ("val_dataloader", "dataset")) is None


@pytest.mark.parametrize("batch_size, more, said", [
    (2, {}, "3 images in batches of 2 leave 1 for the last one, and PreflightModel learns from at least 2 at a time; .*drop_last=True"),
    (1, {}, r"batch_size: PreflightModel learns from at least 2 images at a time, got 1"), (2, {"drop_last": True}, None), (3, {}, None),
    (2, {"sampler": dict(type="InfiniteDrawSampler")}, None)])
def test_the_last_batch_is_large_enough(folder, monkeypatch, batch_size, more, said):
    """Told at once, not at the end of an epoch."""
    monkeypatch.setattr(MODELS.get("PreflightModel"), "least_images", 2)
    cfg = runnable(folder, param_scheduler=None, train_cfg=dict(_delete_=True, type="IterLoop", max_iters=4))
    cfg.train_dataloader.update(batch_size=batch_size, **more)
    if said:
        fails(cfg, rf"^train_dataloader.*{said}")
    else:
        preflight(cfg)


@pytest.mark.parametrize("multiple, merge", [(40, (2, 2)), (28, (3, 3))])
def test_images_are_filled_up_to_whole_tokens(multiple, merge):
    backbone = dict(type="MoonViT", channels=8, num_layers=1, num_heads=2, hidden_channels=8, position_grid=(2, 2), merge=merge)
    model = MODELS.build(dict(type="ImageClassifier", num_classes=2, backbone=backbone,
                              data_preprocessor=dict(type="NativeResolutionPreprocessor", multiple=multiple)))
    said = rf"^model\.data_preprocessor\.multiple: a token of MoonViT is {14 * merge[0]} pixels .*set it to {14 * merge[0]}"
    with pytest.raises(ConfigError, match=said):
        check_tokens(model, None, ("train_dataloader",))


def test_packs_count_the_patches_that_the_model_makes():
    """Or a limit on memory is passed without a word: patches of 28 pixels are a quarter of those of 14."""
    def check(**settings):
        model = MODELS.build(dict(type="ImageClassifier", num_classes=2, data_preprocessor=dict(type="NativeResolutionPreprocessor"),
                                  backbone=dict(type="MoonViT", channels=8, num_layers=1, num_heads=2, hidden_channels=8,
                                                position_grid=(2, 2))))
        batches = SimpleNamespace(length=ImageTokens(**settings))
        check_tokens(model, batches, ("train_dataloader",))

    check()
    for wrong in (dict(patch_size=28), dict(merge=1), dict(patch_size=7, merge=4)):
        with pytest.raises(ConfigError, match=r"^train_dataloader\.batch_sampler\.length: the model cuts patches of 14 pixels .* of 28, "
                                              r".*take dict\(type='ImageTokens', patch_size=14, merge=2\)"):
            check(**wrong)
