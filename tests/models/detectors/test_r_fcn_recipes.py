"""The recipe cards of R-FCN and of the Deformable ConvNets say what the papers and their code do."""
from pathlib import Path

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from visionkit.engine import load_config
from visionkit.models.backbones.resnet import FrozenBatchNorm2d
from visionkit.ops import DeformConv2dPack, ModulatedDeformConv2dPack
from visionkit.registry import MODELS

CONFIGS = Path(__file__).parents[3] / "configs"
CARDS = ("r_fcn/r_fcn_r50_voc", "r_fcn/r_fcn_r101_voc", "r_fcn/r_fcn_r101_coco", "r_fcn/deformable_r_fcn_r101_coco",
         "faster_rcnn/deformable_faster_rcnn_r101_coco")


def build(card: str):
    """The model, without memory for its weights, and its config."""
    config = load_config(CONFIGS / f"{card}.py")
    with torch.device("meta"):
        return MODELS.make(config.model, at="model"), config


def rates(card: str) -> dict[str, float]:
    """The learning rate of every parameter that has one, as a multiple of the card's."""
    model, config = build(card)
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: group["lr"] / config.optim_wrapper.optimizer.lr for group in optimizer.param_groups
            for parameter in group["params"]}


@pytest.mark.parametrize("card", CARDS)
def test_c5_has_stride_16_and_is_dilated_in_three_convolutions(card):
    """Spec 02, item 3: stride 16, dilation 2 in 3 convolutions."""
    model, _ = build(card)
    assert model.backbone.strides == (16, 16)
    dilated = [name for name, module in model.backbone.named_modules()
               if isinstance(module, nn.Conv2d | DeformConv2dPack) and module.dilation in (2, (2, 2)) and "offset" not in name]
    assert dilated == [f"layer4.{block}.conv2" for block in range(3)]
    assert model.rpn.conv.in_channels == 1024
    assert model.rpn.conv.out_channels == 512


@pytest.mark.parametrize("card", CARDS)
def test_the_stem_stage_2_and_every_normalisation_are_frozen(card):
    model, _ = build(card)
    norms = [module for module in model.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(isinstance(module, FrozenBatchNorm2d) and not module.weight.requires_grad for module in norms)
    frozen = {name.split(".")[0] for name, parameter in model.backbone.named_parameters() if not parameter.requires_grad and "conv" in name}
    assert frozen == {"conv1", "layer1"}


@pytest.mark.parametrize("card, class_channels, anchors", [("r_fcn/r_fcn_r101_voc", 1029, 9), ("r_fcn/r_fcn_r101_coco", 3969, 12),
                                                          ("r_fcn/deformable_r_fcn_r101_coco", 3969, 12)])
def test_r_fcns_channels_are_the_papers(card, class_channels, anchors):
    """1029 and 392 for VOC, 3969 and 392 for COCO."""
    model, _ = build(card)
    assert (model.roi.conv_new.in_channels, model.roi.conv_new.out_channels) == (2048, 1024)
    assert model.roi.classify.maps.out_channels == class_channels
    assert model.roi.regress.maps.out_channels == 392
    assert model.rpn.anchors.per_position == anchors
    assert model.roi.hard_per_image == 128


def test_vocs_recipe_doubles_the_rate_of_biases():
    multiples = rates("r_fcn/r_fcn_r101_voc")
    assert multiples["roi.conv_new.weight"] == 1
    assert {name for name, rate in multiples.items() if rate == 2} == {name for name in multiples if name.endswith("bias")}
    assert set(multiples.values()) == {1, 2}


@pytest.mark.parametrize("card", ["r_fcn/r_fcn_r101_coco", "r_fcn/deformable_r_fcn_r101_coco"])
def test_the_new_convolution_learns_three_times_as_fast(card):
    multiples = rates(card)
    assert {name for name, rate in multiples.items() if rate != 1} == {"roi.conv_new.weight", "roi.conv_new.bias"}
    assert multiples["roi.conv_new.weight"] == pytest.approx(3)
    if "deformable" in card:
        assert multiples["backbone.layer4.0.conv2.conv_offset.weight"] == 1
        assert multiples["roi.classify.offset.weight"] == 1


@pytest.mark.parametrize("card", CARDS)
def test_anchors_that_cross_the_border_are_left_out(card):
    """Sec. 3.3 of Faster R-CNN; with a pyramid they are not."""
    model, _ = build(card)
    assert not model.rpn.cross_boundary
    assert build("faster_rcnn/faster_rcnn_r50_fpn_coco")[0].rpn.cross_boundary


def test_faster_r_cnn_learns_background_from_near_objects():
    """Spec of the plain recipe: 128 regions, a quarter positive at most, background from IoU 0.1 to 0.5."""
    roi = build("faster_rcnn/deformable_faster_rcnn_r101_coco")[0].roi
    assert (roi.matcher.positive, roi.matcher.negative, roi.matcher.background_from) == (0.5, 0.5, 0.1)
    assert (roi.sampler.num, roi.sampler.positive_fraction) == (128, 0.25)


@pytest.mark.parametrize("card, images", [("r_fcn/r_fcn_r101_coco", 8), ("faster_rcnn/deformable_faster_rcnn_r101_coco", 4)])
def test_the_schedule_is_the_releases(card, images):
    """8 epochs over each image and its mirror image, the rate falling after 5.333. Gradients there are sums over a batch, of 8 images or
    of 4, at a rate of 5e-4 with a decay of 5e-4; here they are means over 8."""
    config = load_config(CONFIGS / f"{card}.py")
    settings, iterations = config.optim_wrapper.optimizer, config.train_cfg.max_epochs * 14659
    assert config.train_cfg.max_epochs == 2 * 8
    assert config.param_scheduler[1].milestones[0] / iterations == pytest.approx(5.333 / 8, abs=1e-4)
    assert settings.lr / 8 == pytest.approx(5e-4)
    assert settings.lr * settings.weight_decay * images / 8 == pytest.approx(5e-4 * 5e-4)


def test_only_the_fully_connected_offsets_learn_at_a_hundredth():
    """Spec 03, item 8: 0.01, of two parameters."""
    multiples = rates("faster_rcnn/deformable_faster_rcnn_r101_coco")
    assert {name for name, rate in multiples.items() if rate != 1} == {"roi.pooling.offset.weight", "roi.pooling.offset.bias"}
    assert multiples["roi.pooling.offset.weight"] == pytest.approx(0.01)
    assert multiples["backbone.layer4.0.conv2.conv_offset.weight"] == 1
    model, _ = build("faster_rcnn/deformable_faster_rcnn_r101_coco")
    assert model.roi.pooling.offset.weight.shape == (98, 12544)
    assert [layer.out_features for layer in model.roi.hidden] == [1024, 1024]


def test_dcnv2_stands_in_c3_to_c5_and_its_offsets_learn_at_a_tenth():
    model, _ = build("faster_rcnn/faster_rcnn_r50_fpn_dcnv2_coco")
    where = {name.split(".")[0] for name, module in model.backbone.named_modules() if isinstance(module, ModulatedDeformConv2dPack)}
    assert where == {"layer2", "layer3", "layer4"}
    slow = {name for name, rate in rates("faster_rcnn/faster_rcnn_r50_fpn_dcnv2_coco").items() if rate == pytest.approx(0.1)}
    assert len(slow) == 2 * (4 + 6 + 3)
    assert all("conv_offset" in name for name in slow)
