"""A backbone, a transform and an op for visionkit. Importing the package registers them."""
from starter_plugin.backbone import StarterNet
from starter_plugin.blur_pool import BlurPool, blur_pool
from starter_plugin.translate import RandomTranslate

__all__ = ["BlurPool", "RandomTranslate", "StarterNet", "blur_pool"]
