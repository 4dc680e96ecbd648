from pathlib import Path

import pytest
import torch
from starter_plugin import BlurPool, RandomTranslate, StarterNet, blur_pool

from visionkit.engine import load_config
from visionkit.registry import BACKBONES, MODELS, ConfigError
from visionkit.testing import check_backbone, check_model, check_op, check_transform

CONFIG = Path(__file__).parents[1] / "configs" / "starter_shapes.py"


def test_starter_net_keeps_the_contract_of_a_backbone():
    check_backbone(StarterNet(width=4))


def test_a_detector_on_starter_net_keeps_the_contract_of_a_model():
    config = load_config(CONFIG, ["model.backbone.width=4", "model.neck.out_channels=8"])
    check_model(MODELS.build(config.model), num_classes=4)


def test_random_translate_keeps_the_contract_of_a_transform():
    check_transform(RandomTranslate(max_fraction=0.5))


def test_blur_pool_keeps_the_contract_of_an_op():
    check_op(blur_pool, [torch.randn(2, 3, 5, 6, requires_grad=True)])


def test_blur_pool_keeps_a_constant_away_from_the_border():
    assert torch.equal(BlurPool()(torch.ones(1, 1, 6, 6))[0, 0, 1:, 1:], torch.ones(2, 2))


def test_the_downsampling_op_can_be_chosen():
    with pytest.raises(ConfigError, match=r"downsample.type: no op named 'BlurPol'. Did you mean 'BlurPool'\?"):
        BACKBONES.build({"type": "StarterNet", "downsample": {"type": "BlurPol"}})
