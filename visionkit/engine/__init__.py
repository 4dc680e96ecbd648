"""Running a config: read it, check it, train, test."""
from visionkit.engine import hooks, loops, optim  # noqa: F401  (they register themselves)
from visionkit.engine.config import load_config
from visionkit.engine.launch import test, train

__all__ = ["load_config", "test", "train"]
