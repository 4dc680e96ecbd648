"""visionkit: a plugin-based computer vision toolkit for PyTorch."""
__version__ = "0.1.0"
__all__ = ["Detector", "__version__"]


def __getattr__(name: str):
    if name == "Detector":                                   # imported late, so that `import visionkit` stays light
        from visionkit.engine.inference import Detector
        return Detector
    raise AttributeError(f"module 'visionkit' has no attribute {name!r}")
