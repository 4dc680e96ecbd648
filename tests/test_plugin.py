"""A third-party distribution is installed as a user would install it, listed, contract-checked and trained."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "tests" / "plugin"
GUIDE = ROOT / "docs" / "plugins.md"


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    """The source folder of an installed copy of tests/plugin, and how to run Python where it is installed."""
    folder = tmp_path_factory.mktemp("starter")
    source, site = folder / "source", folder / "site"
    shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__"))       # a build leaves files behind
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "OMP_NUM_THREADS": "1",
                   "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("VISIONKIT_PLUGINS", None)

    def run(*arguments, status=0, cwd=ROOT, **variables):
        done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env={**environment, **variables},
                              capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", site, source)
    run.source, run.folder = source, folder
    return run


def short(folder):
    return ["--work-dir", folder, "--cfg-options", "train_dataloader.dataset.num_images=24", "val_dataloader.dataset.num_images=8",
            "train_dataloader.num_workers=0", "val_dataloader.num_workers=0", "train_cfg.max_epochs=1"]


def test_every_component_is_listed_as_the_guide_shows(starter):
    listing = starter("-m", "visionkit", "plugins", "--from", "visionkit-starter")
    assert len(listing.splitlines()) == 4
    assert listing in GUIDE.read_text()


@pytest.mark.slow
def test_its_own_tests_pass(starter):
    assert re.search(r"^6 passed", starter("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=starter.source), re.M)


@pytest.mark.slow
def test_a_config_that_names_it_trains_and_is_evaluated(starter, tmp_path):
    output = starter("tools/train.py", starter.source / "configs" / "starter_shapes.py", *short(tmp_path))
    assert "Average Precision" in output
    assert list(tmp_path.glob("epoch_1.pth"))


def test_without_the_plugin_the_config_says_what_is_missing(starter, tmp_path):
    config = starter.source / "configs" / "starter_shapes.py"
    output = starter("tools/train.py", config, *short(tmp_path), status=2, VISIONKIT_PLUGINS="")
    assert "model.backbone.type: no backbone named 'StarterNet'" in output
    assert "The plugin 'starter' of visionkit-starter was not loaded: VISIONKIT_PLUGINS leaves it out" in output


def test_a_broken_plugin_is_shown_and_does_not_stop_those_who_do_not_use_it(starter, tmp_path):
    broken = tmp_path / "site"
    shutil.copytree(starter.folder / "site", broken)
    (broken / "starter_plugin" / "backbone.py").write_text("import not_installed\n")
    source = "from visionkit.__main__ import main\nfrom visionkit.registry import BACKBONES\n" \
             "BACKBONES.build(dict(type='ResNet', depth=18))\nraise SystemExit(main(['plugins', '--kind', 'backbone']))"
    listing = starter("-c", source, status=1, PYTHONPATH=os.pathsep.join([str(broken), str(ROOT)]))
    assert "plugin 'starter' of visionkit-starter failed to import:" in listing
    assert "ModuleNotFoundError: No module named 'not_installed'" in listing


def test_installing_it_leaves_this_environment_alone(starter):
    assert "visionkit-starter" not in subprocess.run([sys.executable, "-m", "pip", "list"], capture_output=True, text=True).stdout
    assert not list(SOURCE.glob("*.egg-info"))
    assert not SOURCE.joinpath("build").exists()
