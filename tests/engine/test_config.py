"""Configs: reading, options from the command line, and what is refused."""
import sys

import pytest

from visionkit.engine.config import apply_option, load_config
from visionkit.registry import ConfigError


@pytest.fixture
def settings():
    return {"model": {"backbone": {"type": "ResNet", "depth": 50}}, "pipeline": [{"type": "Load"}, {"type": "Flip", "prob": 0.5}],
            "sizes": (1, 2), "load_from": None}


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("option, keys, value", [
    ("model.backbone.depth=18", ("model", "backbone", "depth"), 18),
    ("pipeline.1.prob=1e-3", ("pipeline", 1, "prob"), 1e-3),
    ("pipeline.-1.type=Crop", ("pipeline", -1, "type"), "Crop"),
    ("sizes.1=5", ("sizes", 1), 5),
    ("load_from=work/a=b.pth", ("load_from",), "work/a=b.pth"),
    ("load_from=none", ("load_from",), None),
    ("load_from=True", ("load_from",), True),
    ("model.backbone={'type': 'VGG'}", ("model", "backbone"), {"type": "VGG"}),
    ("sizes=[3, 'a', (1, 2)]", ("sizes",), [3, "a", (1, 2)]),
    ("+model.neck.type=FPN", ("model", "neck"), {"type": "FPN"}),
    ("+pipeline.2={'type': 'Pack'}", ("pipeline", 2), {"type": "Pack"}),
])
def test_an_option_sets_a_value(settings, option, keys, value):
    apply_option(settings, option)
    for key in keys:
        settings = settings[key]
    assert settings == value
    assert type(settings) is type(value)


@pytest.mark.parametrize("option, message", [
    ("model.backbone.dept=18", r"model\.backbone\.dept: .*no such key\. Did you mean 'depth'\?.*'\+model\.backbone\.dept=18'"),
    ("optimizer.lr=1", r"optimizer: .*no such key"),
    ("pipeline.2.prob=1", r"pipeline: .*list of 2.*no element '2'"),
    ("pipeline.first.prob=1", r"no element 'first'"),
    ("model.backbone.depth.x=1", r"model\.backbone\.depth: .*50, which has no keys"),
    ("model.backbone.depth", "takes key=value"),
    ("model..depth=1", "takes key=value"),
    ("sizes=[a, b]", "needs quotes"),
])
def test_an_option_that_does_not_fit_is_refused(settings, option, message):
    with pytest.raises(ConfigError, match=message):
        apply_option(settings, option)


def test_a_config_is_read_with_its_base_and_options_on_top(tmp_path):
    write(tmp_path, "base.py", "train_cfg = dict(type='EpochLoop', max_epochs=2, val_interval=1)")
    path = write(tmp_path, "card.py", '"""Card."""\nimport os\nfrom pathlib import Path\n_base_ = "base.py"\n'
                                      "train_cfg = dict(max_epochs=3)\nfolder = Path('a') / 'b'\nname = os.sep\n")
    cfg = load_config(path, ["train_cfg.val_interval=7"])
    assert cfg.train_cfg == {"type": "EpochLoop", "max_epochs": 3, "val_interval": 7}
    assert cfg.folder == "a/b"
    assert cfg.default_scope == "visionkit"
    assert cfg.filename == str(path)


def test_the_text_of_a_config_reads_back_as_the_same_config(tmp_path):
    path = write(tmp_path, "card.py", "a = dict(b=[dict(c=1.5), (1, 'x')], **{'1': None})\nd = \"it's\\n\"\n")
    cfg = load_config(path, ["+a.e=-3e-5"])
    again = load_config(write(tmp_path, "again.py", cfg.pretty_text))
    assert again.to_dict() == cfg.to_dict()


def test_json_is_read_and_yaml_is_not(tmp_path):
    assert load_config(write(tmp_path, "card.json", '{"a": {"b": 1}}')).a.b == 1
    trap = write(tmp_path, "card.yaml", "a: !!python/object/apply:os.mkdir ['%s']" % (tmp_path / "ran"))
    with pytest.raises(ConfigError, match=r"\.py or \.json"):
        load_config(trap)
    with pytest.raises(ConfigError, match=r"\.py or \.json"):
        load_config(write(tmp_path, "card.py", "_base_ = ['card.yaml']"))
    assert not (tmp_path / "ran").exists()


def test_a_missing_config_names_its_neighbours(tmp_path):
    write(tmp_path, "faster_rcnn.py", "")
    with pytest.raises(ConfigError, match=r"no config file .*faster_rcn\.py'\. Did you mean '.*faster_rcnn\.py'"):
        load_config(tmp_path / "faster_rcn.py")
    with pytest.raises(ConfigError, match=r"no config file .*bas\.py"):
        load_config(write(tmp_path, "card.py", "_base_ = 'bas.py'"))


@pytest.mark.parametrize("value", ["print", "int", "object()"])
def test_a_value_that_is_not_plain_is_refused_with_its_place(tmp_path, value):
    with pytest.raises(ConfigError, match=r"model\.parts\[0\]\.type: a config holds plain values"):
        load_config(write(tmp_path, "card.py", f"model = dict(parts=[dict(type={value})])"))


@pytest.mark.parametrize("text, message", [("a = (", "SyntaxError"), ("a = undefined", "NameError.*undefined"),
                                               ("custom_imports = dict(imports=['not_there'])", "ImportError")])
def test_a_config_that_fails_is_named_with_its_error(tmp_path, text, message):
    with pytest.raises(ConfigError, match=f"(?s)card.py' cannot be read: {message}"):
        load_config(write(tmp_path, "card.py", text))


def test_an_option_may_name_modules_to_import(tmp_path, monkeypatch):
    (tmp_path / "parts_of_mine.py").write_text("imported = True")
    monkeypatch.syspath_prepend(tmp_path)
    card = write(tmp_path, "card.py", "a = 1")
    assert "parts_of_mine" not in sys.modules
    load_config(card, ["+custom_imports={'imports': ['parts_of_mine']}"])
    assert sys.modules.pop("parts_of_mine").imported
    with pytest.raises(ConfigError, match=r"^custom_imports\.imports: .*not_there"):
        load_config(card, ["+custom_imports={'imports': ['not_there']}"])
    with pytest.raises(ConfigError, match=r"^custom_imports: this is dict\(imports=\[...\]\), the names of modules, got \['os'\]"):
        load_config(card, ["+custom_imports=['os']"])
