"""Running a config: read it, check it, train, test."""
from visionkit.engine import loops, noam, optim, packing, pictures, probing, test_time  # noqa: F401  (they register themselves)
from visionkit.engine.config import load_config
from visionkit.engine.hooks import Diverged, Stopped, resume_command
from visionkit.engine.launch import test, train

__all__ = ["Diverged", "Stopped", "load_config", "resume_command", "test", "train"]
