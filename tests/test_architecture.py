"""The house rules that a machine can check: which way imports go, what names are used, which Python is enough."""
import ast
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from visionkit.registry import registries

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("visionkit/**/*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("configs/**/*.py")])


def lint_imports(folder):
    command = [sys.executable, "-c", "import importlinter.cli as cli; cli.lint_imports_command()", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture
def house(tmp_path):
    """A copy of the package, to break."""
    shutil.copytree(ROOT / "visionkit", tmp_path / "visionkit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    return tmp_path


def test_imports_only_go_down():
    pytest.importorskip("importlinter")
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


def test_imports_that_go_up_sideways_or_from_a_new_room_are_seen(house):
    pytest.importorskip("importlinter")
    for room, line in {"ops/nms.py": "import visionkit.structures", "models/necks/fpn.py": "import visionkit.models.heads.rpn",
                       "models/__init__.py": "import visionkit.datasets", "evaluation/__init__.py": "import visionkit.transforms",
                       "newroom.py": "import torch"}.items():
        with house.joinpath("visionkit", room).open("a") as file:
            file.write(f"\n{line}\n")
    done = lint_imports(house)
    assert done.returncode != 0
    for seen in ("visionkit.ops.nms -> visionkit.structures", "visionkit.models.necks.fpn -> visionkit.models.heads.rpn",
                 "visionkit.models -> visionkit.datasets", "visionkit.evaluation -> visionkit.transforms", "newroom"):
        assert seen in done.stdout


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_is_python_3_10_and_says_what_it_is(source):
    tree = ast.parse(source.read_text(encoding="utf-8"), feature_version=(3, 10))
    assert ast.get_docstring(tree), "a file opens with a docstring: its one subject, in one line"
    assert source.stem not in ("utils", "util", "misc", "common", "helpers")


def test_no_component_of_ours_swallows_arguments():
    ours = {component for registry in registries() if registry.names() for component in registry.module_dict.values()
            if component.__module__.startswith("visionkit.")}
    assert len(ours) > 10
    for component in ours:
        kinds = [parameter.kind for parameter in inspect.signature(component).parameters.values()]
        assert inspect.Parameter.VAR_KEYWORD not in kinds, f"{component.__name__} takes **kwargs: name and type every argument"


def test_importing_visionkit_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", "import visionkit, sys; print(*sys.modules)"], cwd=ROOT, capture_output=True, text=True)
    assert not {"torch", "mmengine", "numpy", "cv2"} & set(done.stdout.split())
