"""Every backbone, detector and transform of ours keeps the contract that a plugin's must, from the day it is registered."""
import pytest
import torch

from visionkit.ops import roi_align
from visionkit.registry import BACKBONES, MODELS, TRANSFORMS
from visionkit.testing import check_backbone, check_model, check_op, check_transform

# What a constructor cannot do without, or what shows more of the component.
BACKBONE_ARGUMENTS = {"ResNet": {"depth": 18}}
DETECTORS = {"FasterRCNN": {
    "backbone": {"type": "ResNet", "depth": 18},
    "neck": {"type": "FPN", "out_channels": 16},
    "rpn": {"type": "RPN", "pre_nms": (100, 100), "post_nms": (50, 50)},
    "roi": {"type": "RoIBoxHead", "num_classes": 3, "hidden_channels": (32,)},
}, "DETR": {
    "backbone": {"type": "ResNet", "depth": 18, "norm": "GN", "out_stages": (3,)},
    "num_classes": 3, "num_queries": 10, "channels": 16, "num_heads": 2, "hidden_channels": 32, "encoder_layers": 1, "decoder_layers": 2,
    "dropout": 0.0,
}, "DeformableDETR": {
    "backbone": {"type": "ResNet", "depth": 18, "norm": "GN", "out_stages": (3, 4)},
    "neck": {"type": "ChannelMapper", "out_channels": 32},
    "num_classes": 3, "num_queries": 10, "num_heads": 2, "hidden_channels": 32, "encoder_layers": 1, "decoder_layers": 2, "dropout": 0.0,
}}
DETECTORS["RFCN"] = {
    "backbone": {"type": "ResNet", "depth": 18, "out_stages": (4, 5), "strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2)},
    "rpn": {"type": "RPN", "anchor_scales": (2,), "hidden_channels": 32, "pre_nms": (100, 100), "post_nms": (50, 50)},
    "roi": {"type": "PositionSensitiveHead", "num_classes": 3, "bins": 3, "hidden_channels": 32},
}
DETECTORS["DetrPanoptic"] = DETECTORS["DETR"] | {"backbone": {"type": "ResNet", "depth": 18, "norm": "GN"}, "num_things": 2}
# The decoder's input is zeros (DETR, sec. 3.2), so in its first layer all queries have the same to say to each other, whatever the weights.
WITHOUT_GRADIENT = dict.fromkeys(("DETR", "DetrPanoptic"), ("*decoder.layers.0.self_attention.*",))
TRANSFORM_ARGUMENTS = {
    "Albumentations": {"transforms": [{"type": "HorizontalFlip"}, {"type": "RandomCrop", "height": 32, "width": 40}]},
    "RandomCrop": {"size": (40, 32)},
    "Resize": {"scale": (96, 40)},
}
START_OR_END = {"LoadImageFromFile", "LoadAnnotations", "LoadPanopticAnnotations", "PackSample", "TestTimeAug"}      # take or give more


def ours(registry):
    return sorted(name for name in registry.names() if name in registry.module_dict
                  and registry.module_dict[name].__module__.startswith("visionkit."))


@pytest.mark.parametrize("name", ours(BACKBONES))
def test_every_backbone_keeps_its_contract(name):
    check_backbone(BACKBONES.build({"type": name, **BACKBONE_ARGUMENTS.get(name, {})}))


@pytest.mark.parametrize("name", [name for name in ours(MODELS) if name != "ImagePreprocessor"])
def test_every_detector_keeps_its_contract(name):
    torch.manual_seed(0)
    check_model(MODELS.build({"type": name, **DETECTORS.get(name, {})}), num_classes=3, masks=name == "DetrPanoptic",
                unused=WITHOUT_GRADIENT.get(name, ()))


@pytest.mark.parametrize("name", [name for name in ours(TRANSFORMS) if name not in START_OR_END])
def test_every_transform_keeps_its_contract(name):
    if name == "Albumentations":
        pytest.importorskip("albumentations")
    check_transform(TRANSFORMS.build({"type": name, **TRANSFORM_ARGUMENTS.get(name, {})}))


def test_roi_align_keeps_the_contract_of_an_op():
    boxes = torch.tensor([[0, 1.3, 0.7, 6.1, 5.2], [1, 2.2, 2.9, 4.4, 7.8], [1, 0.1, 0.2, 7.5, 3.1]])
    features = torch.randn(2, 2, 8, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    check_op(lambda features, boxes: roi_align(features, boxes, 2, 1.0, 2, True), [features, boxes],
             empty=[features, boxes[:0]])
