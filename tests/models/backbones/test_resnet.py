import pytest
import torch
from torch import nn

from visionkit.models.backbones import ResNet
from visionkit.testing import check_backbone


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN"])
def test_resnet_keeps_the_backbone_contract(norm):
    check_backbone(ResNet(18, norm=norm))


def test_channels_and_strides_follow_the_stages_asked_for():
    resnet = ResNet(50, out_stages=(3, 5))
    assert resnet.out_channels == (512, 2048)
    assert resnet.strides == (8, 32)
    assert [feature.shape[1:] for feature in resnet(torch.zeros(1, 3, 64, 96))] == [(512, 8, 12), (2048, 2, 3)]


def test_stages_beyond_the_last_one_returned_are_not_built_and_not_missed():
    short = ResNet(18, out_stages=(2, 3))
    check_backbone(short)
    assert not hasattr(short, "layer3")
    short.load_state_dict({**ResNet(18).state_dict(), "fc.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}, strict=True)


def test_dilated_last_stage_keeps_stride_16_with_dilation_in_its_three_3x3_convolutions():
    resnet = ResNet(50, out_stages=(4, 5), strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2))
    assert resnet.strides == (16, 16)
    assert [feature.shape[2:] for feature in resnet(torch.zeros(1, 3, 64, 96))] == [(4, 6), (4, 6)]
    dilated = [module for module in resnet.modules() if isinstance(module, nn.Conv2d) and module.dilation == (2, 2)]
    assert len(dilated) == 3


def test_frozen_stages_are_not_trained_and_keep_their_statistics():
    resnet = ResNet(18, frozen_stages=3).train()
    before = {name: value.clone() for name, value in resnet.state_dict().items()}
    sum(feature.square().mean() for feature in resnet(torch.randn(2, 3, 64, 64))).backward()
    for name, parameter in resnet.named_parameters():
        frozen = name.startswith(("conv1", "bn1", "layer1", "layer2"))
        assert parameter.requires_grad != frozen, name
        assert (parameter.grad is None) == frozen, name
    moved = {name for name, value in resnet.state_dict().items() if "running" in name and not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith(("layer3", "layer4")) for name in moved)


def test_frozen_norm_never_trains():
    resnet = ResNet(18, norm="FrozenBN").train()
    statistics = resnet.bn1.running_mean.clone()
    resnet(torch.randn(2, 3, 64, 64))
    assert torch.equal(resnet.bn1.running_mean, statistics)
    assert not resnet.bn1.weight.requires_grad
    assert resnet.conv1.weight.requires_grad


def test_blocks_start_as_the_identity():
    resnet = ResNet(18)
    assert not any(block.bn2.weight.any() for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4) for block in layer)


def test_pretrained_weights_are_loaded_before_training(tmp_path):
    donor = ResNet(18)
    torch.save({**donor.state_dict(), "fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}, tmp_path / "resnet18.pth")
    resnet = ResNet(18, pretrained=str(tmp_path / "resnet18.pth"))
    resnet.init_weights()
    assert torch.equal(resnet.layer4[1].conv2.weight, donor.layer4[1].conv2.weight)
    with pytest.raises(ValueError, match="does not hold the weights of this ResNet"):
        ResNet(50, pretrained=str(tmp_path / "resnet18.pth")).init_weights()


def test_blocks_that_are_never_trained_do_not_start_as_the_identity():
    assert ResNet(18, norm="FrozenBN").layer4[1].bn2.weight.all()
    frozen = ResNet(18, frozen_stages=2)
    assert frozen.layer1[1].bn2.weight.all()
    assert not frozen.layer2[1].bn2.weight.any()


@pytest.mark.parametrize("arguments, message", [
    ({"depth": 20}, "depths 18, 34, 50, 101; got 20"),
    ({"depth": 18, "norm": "LN"}, "norm must be one of BN, FrozenBN, GN; got 'LN'"),
    ({"depth": 18, "out_stages": (1, 2)}, r"numbers of 2 to 5 \(C2 to C5\), got \(1, 2\)"),
    ({"depth": 18, "frozen_stages": 6}, "frozen_stages must be 0"),
    ({"depth": 18, "strides": (1, 2)}, "one value for each of stages 2 to 5"),
])
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResNet(**arguments)


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_torchvisions_checkpoint_loads_strictly_and_gives_its_features(depth):
    peer = pytest.importorskip("torchvision", reason="the peer to compare with is not installed", exc_type=ImportError).models
    theirs = getattr(peer, f"resnet{depth}")().eval()
    ours = ResNet(depth).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        features = theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images)))))
        for ours_at, layer in zip(ours(images), (nn.Identity(), theirs.layer2, theirs.layer3, theirs.layer4), strict=True):
            features = layer(features)
            torch.testing.assert_close(ours_at, features)
