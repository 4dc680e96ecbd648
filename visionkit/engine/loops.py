"""Training loops that go on in the middle of an epoch."""
from __future__ import annotations

from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from visionkit.registry import LOOPS


@LOOPS.register_module()
class EpochLoop(EpochBasedTrainLoop):
    """Train epoch by epoch, validating in between."""


@LOOPS.register_module()
class IterLoop(IterBasedTrainLoop):
    """Train for a number of iterations, validating in between."""
