import torch

from visionkit.registry import MODELS
from visionkit.structures import ImageBatch


def test_a_model_gives_its_backbone_maps_as_features():
    model = MODELS.make({"type": "DETR", "backbone": {"type": "ResNet", "depth": 18, "out_stages": (3, 4)}, "num_classes": 2,
                         "channels": 32, "encoder_layers": 1, "decoder_layers": 1}, at="model").eval()
    images = ImageBatch(torch.randn(2, 3, 64, 64), [(64, 64)] * 2)
    found = model(images, mode="features")
    assert list(found) == ["map0", "map1"]
    for level, wanted in zip(found.values(), model.backbone(images.tensor), strict=True):
        assert torch.equal(level, wanted)
