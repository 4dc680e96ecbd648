"""Every backbone, detector and transform of ours keeps the contract that a plugin's must, from the day it is registered."""
import copy
import inspect

import pytest
import torch

from visionkit.engine.test_time import TestTimeAugmentation, mirrored_back
from visionkit.ops import roi_align
from visionkit.registry import BACKBONES, MODELS, TRANSFORMS, ConfigError
from visionkit.structures import ImageBatch, InstanceData, PackedSequence, Sample
from visionkit.testing import check_backbone, check_model, check_op, check_token_backbone, check_transform
from visionkit.transforms import build_pipeline

# What a constructor cannot do without, or what shows more of the component.
TINY = {"channels": 16, "num_layers": 2, "num_heads": 2, "hidden_channels": 24, "position_grid": (4, 4)}
BACKBONE_ARGUMENTS = {"ResNet": {"depth": 18}, "MoonViT": TINY, "ViT": TINY}
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
DETECTORS["PackedDETR"] = DETECTORS["DETR"] | {
    "data_preprocessor": {"type": "NativeResolutionPreprocessor", "multiple": 16},
    "backbone": {"type": "MoonViT", "patch_size": 8, **TINY},
}
DETECTORS["DetrPanoptic"] = DETECTORS["DETR"] | {"backbone": {"type": "ResNet", "depth": 18, "norm": "GN"}, "num_things": 2}
# The decoder's input is zeros (DETR, sec. 3.2), so in its first layer all queries have the same to say to each other, whatever the weights.
WITHOUT_GRADIENT = dict.fromkeys(("DETR", "DetrPanoptic", "PackedDETR"), ("*decoder.layers.0.self_attention.*",))
TRANSFORM_ARGUMENTS = {
    "Albumentations": {"transforms": [{"type": "HorizontalFlip"}, {"type": "RandomCrop", "height": 32, "width": 40}]},
    "RandomCrop": {"size": (40, 32)},
    "RandomResizedCrop": {"size": (40, 32)},
    "Resize": {"scale": (96, 40)},
    "ResizeToTokenLimit": {"limit": 6},
}
START_OR_END = {"LoadImageFromFile", "LoadAnnotations", "LoadPanopticAnnotations", "PackSample", "TestTimeAug"}      # take or give more


def ours(registry):
    return sorted(name for name in registry.names() if name in registry.module_dict
                  and registry.module_dict[name].__module__.startswith("visionkit."))


@pytest.mark.parametrize("name", ours(BACKBONES))
def test_every_backbone_keeps_its_contract(name):
    backbone = BACKBONES.build({"type": name, **BACKBONE_ARGUMENTS.get(name, {})})
    check = check_token_backbone if getattr(backbone, "returns_tokens", False) else check_backbone
    check(backbone)


@pytest.mark.parametrize("name", ours(BACKBONES))
def test_every_backbone_has_the_switch_for_checkpointing(name):
    for policy in ("none", "every", "sqrt", "selective"):
        backbone = BACKBONES.build({"type": name, **BACKBONE_ARGUMENTS.get(name, {}), "checkpointing": {"policy": policy}})
        assert backbone.checkpointing.policy == policy
    with pytest.raises(ConfigError, match="^checkpointing: .*'evry'. Did you mean 'every'"):
        BACKBONES.build({"type": name, **BACKBONE_ARGUMENTS.get(name, {}), "checkpointing": "evry"})


@pytest.mark.parametrize("name", [name for name in ours(BACKBONES) if name != "ResNet"])         # which has tests of its own
@pytest.mark.parametrize("policy", ["every", "sqrt", "selective"])
def test_checkpointing_changes_neither_features_nor_gradients_nor_statistics(policy, name):
    """Those of the images, too; difference 0.0."""
    config = {"type": name, **BACKBONE_ARGUMENTS.get(name, {})}
    plain, checkpointing = BACKBONES.build(config), BACKBONES.build({**config, "checkpointing": policy})
    checkpointing.load_state_dict(plain.state_dict())
    side = 2 * plain.strides[-1] if getattr(plain, "returns_tokens", False) else 64
    values, outcomes = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)), []
    for backbone in (plain, checkpointing):
        images = values.clone().requires_grad_()
        features = backbone(images)
        features = [features.tokens] if isinstance(features, PackedSequence) else features
        sum(feature.square().mean() for feature in features).backward()
        outcomes.append([*features, images.grad, *(parameter.grad for parameter in backbone.parameters()), *backbone.buffers()])
    assert all(torch.equal(value, other) for value, other in zip(*outcomes, strict=True))


@pytest.mark.parametrize("name", [name for name in ours(MODELS) if ".detectors." in MODELS.get(name).__module__])
def test_every_detector_keeps_its_contract(name):
    torch.manual_seed(0)
    check_model(MODELS.build({"type": name, **DETECTORS.get(name, {})}), num_classes=3, masks=name == "DetrPanoptic",
                unused=WITHOUT_GRADIENT.get(name, ()))


def checkpointed(config):
    """`config` with every switch `checkpointing` that its model and backbone have."""
    switches = [(MODELS, config), (BACKBONES, config["backbone"])]
    model, backbone = ({**part, "checkpointing": True} if "checkpointing" in inspect.signature(registry.get(part["type"])).parameters
                       else part for registry, part in switches)
    return {**model, "backbone": backbone}


@pytest.mark.parametrize("name", DETECTORS)
def test_checkpointing_keeps_less_and_gives_the_same_loss_and_gradients(name):
    """With dropout where the detector has it; difference 0.0."""
    config = {"type": name, **DETECTORS[name], **({"dropout": 0.1} if "dropout" in DETECTORS[name] else {})}
    plain, checkpointing = MODELS.build(config), MODELS.build(checkpointed(config))
    checkpointing.load_state_dict(plain.state_dict())
    boxes = torch.tensor([[4.0, 4, 40, 40], [50, 10, 80, 60]])
    outcomes = []
    for model in (plain, checkpointing):
        sample = Sample(metainfo={"img_id": 0, "img_shape": (64, 96), "ori_shape": (64, 96), "scale_factor": (1.0, 1.0)})
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 2]), masks=torch.ones(2, 64, 96, dtype=torch.bool))
        sample.ignored_instances = sample.gt_instances[:0]
        batch = ImageBatch(torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)), [(64, 96)])
        kept = []
        torch.manual_seed(0)
        note = lambda tensor, kept=kept: kept.append(tensor.numel()) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = sum(model.loss(batch, [sample]).values())
        loss.backward()
        outcomes.append((sum(kept), [loss, *(p.grad for p in model.parameters() if p.grad is not None)]))
    (all_kept, expected), (few_kept, ours) = outcomes
    assert few_kept < 0.8 * all_kept
    assert all(torch.equal(value, other) for value, other in zip(ours, expected, strict=True))


@pytest.mark.parametrize("name", [name for name in DETECTORS if name != "DetrPanoptic"])
def test_views_of_every_detector_are_merged(name):
    """Where an object is found in the flipped image and in the image as it is, once; here all that an untrained model finds."""
    torch.manual_seed(0)
    model = MODELS.build({"type": name, **DETECTORS[name]}).eval()
    views = TestTimeAugmentation(scales=(1.0, 0.5), nms={"type": "nms", "iou": 1.0}, max_per_image=10**6)
    pipeline = build_pipeline(views.pipeline([{"type": "Resize", "scale": (96, 64)}, {"type": "PackSample"}]))
    image = torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8).numpy()
    packed = pipeline({"img": image, "img_id": 0, "ori_shape": (48, 64), "img_shape": (48, 64)})
    with torch.no_grad():
        alone = [model.test_step({key: [values[view]] for key, values in copy.deepcopy(packed).items()})[0] for view in range(4)]
        (merged,) = views.predict(model.test_step, {key: [[value] for value in values] for key, values in packed.items()})
    boxes = torch.cat([mirrored_back(one.pred_instances.bboxes, one) for one in alone])
    assert [one.flip for one in alone] == [False, True, False, True]
    assert 0 < len(merged.pred_instances) <= len(boxes)
    distances = (merged.pred_instances.bboxes[:, None] - boxes).abs().amax(2)
    assert (distances.min(1)[0] < 1e-3).all()
    assert merged.pred_instances.bboxes.max() <= 64


@pytest.mark.parametrize("name", [name for name in ours(TRANSFORMS)
                                  if name not in START_OR_END and not issubclass(TRANSFORMS.get(name), torch.nn.Module)])    # nor puzzles
def test_every_transform_keeps_its_contract(name):
    if name == "Albumentations":
        pytest.importorskip("albumentations")
    check_transform(TRANSFORMS.build({"type": name, **TRANSFORM_ARGUMENTS.get(name, {})}))


def test_roi_align_keeps_the_contract_of_an_op():
    boxes = torch.tensor([[0, 1.3, 0.7, 6.1, 5.2], [1, 2.2, 2.9, 4.4, 7.8], [1, 0.1, 0.2, 7.5, 3.1]])
    features = torch.randn(2, 2, 8, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    check_op(lambda features, boxes: roi_align(features, boxes, 2, 1.0, 2, True), [features, boxes],
             empty=[features, boxes[:0]])
