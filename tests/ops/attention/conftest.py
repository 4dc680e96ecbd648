"""The formula of attention, for all of its kernels."""
import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def reference():
    """The module `reference.py` beside this file."""
    spec = importlib.util.spec_from_file_location("attention_reference", Path(__file__).with_name("reference.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tile(monkeypatch):
    """Set the tile of the portable form."""
    from visionkit.ops.attention import flash
    return lambda queries, keys: monkeypatch.setattr(flash, "_TILE", (queries, keys))
