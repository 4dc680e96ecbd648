import copy

import pytest
from mmengine.config import Config

import visionkit.models.base  # noqa: F401
from visionkit.engine.preflight import check_components, check_keys
from visionkit.registry import DATASETS, ConfigError


@DATASETS.register_module(force=True)
class Scenes:
    def __init__(self, pipeline=()):
        self.pipeline = pipeline


CONFIG = dict(
    model=dict(type="ImagePreprocessor", pad_divisor=32),
    train_dataloader=dict(batch_size=2, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=True),
                          dataset=dict(type="ConcatDataset", datasets=[
                              dict(type="Scenes", pipeline=[dict(type="Resize", scale=(8, 8))])])),
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


@pytest.mark.parametrize(("key", "said"), [
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
    ("visualizer__vis_backends__0__type=LocalBackend", r"^visualizer\.vis_backends\[0\]\.type: no vis_backend .*'LocalVisBackend'"),
])
def test_a_misspelt_type_is_found_at_any_depth(key, said):
    key, _, value = key.partition("=")
    with pytest.raises(ConfigError, match=said):
        check_components(changed(**{key: value}))


@pytest.mark.parametrize(("key", "said"), [
    ("model__pad_divisr", r"^model\.pad_divisr: ImagePreprocessor has no argument .*'pad_divisor'"),
    ("train_dataloader__batchsize", r"^train_dataloader\.batchsize: DataLoader has no argument .*'batch_size'"),
    ("train_dataloader__sampler__shufle", r"^train_dataloader\.sampler\.shufle: DefaultSampler .*'shuffle'"),
    ("train_dataloader__dataset__datasets__0__pipeline__0__scal", r"pipeline\[0\]\.scal: Resize .*'scale'"),
    ("train_cfg__max_epoch", r"^train_cfg\.max_epoch: EpochBasedTrainLoop has no argument .*'max_epochs'"),
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


@pytest.mark.parametrize(("key", "meant"), [("optim_wraper", "optim_wrapper"), ("custom_hook", "custom_hooks"),
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
