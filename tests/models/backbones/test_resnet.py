import pytest
import torch
from torch import nn

from visionkit.models.backbones import ResNet
from visionkit.ops import DeformConv2dPack
from visionkit.registry import ConfigError
from visionkit.testing import check_backbone

V1, V2 = {"type": "DeformConv2dPack", "offset_groups": 4}, {"type": "ModulatedDeformConv2dPack", "offset_groups": 2}
LAST = (False, False, False, True)


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
    as_in_torchvision = ResNet(50, out_stages=(5,), strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), dilate_first=False)
    assert [block.conv2.dilation for block in as_in_torchvision.layer4] == [(1, 1), (2, 2), (2, 2)]


@pytest.mark.parametrize("depth", [18, 50])
def test_frozen_normalisation_within_the_convolution_is_the_one_after_it(depth):
    torch.manual_seed(0)
    plain, frozen = ResNet(depth, out_stages=(3,)).eval(), ResNet(depth, out_stages=(3,), norm="FrozenBN")
    for name, value in plain.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.dim() == 1:
            value.add_(torch.randn_like(value) * 0.2)
    frozen.load_state_dict(plain.state_dict())
    images, gradients = torch.randn(2, 3, 64, 64), []
    for resnet in (plain, frozen.train()):
        resnet(images)[0].square().mean().backward()
        gradients.append([module.weight.grad for module in resnet.modules() if isinstance(module, nn.Conv2d)])
    torch.testing.assert_close(frozen(images)[0], plain(images)[0], rtol=1e-4, atol=1e-4)           # measured 2e-06
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


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
    with pytest.raises(ConfigError, match=r"of this ResNet: under no prefix .* Nearest: under '' 100 of 265"):
        ResNet(50, pretrained=str(tmp_path / "resnet18.pth")).init_weights()


def test_networks_of_another_depth_are_refused_in_both_directions(tmp_path):
    """Each name of depth 18 is one of depth 50 with another shape, and one of depth 34 with the same shape."""
    for depth, said in ((50, r"of another shape \(ResNet <- checkpoint\) .*layer1.0.conv1.weight \(64, 64, 3, 3\) <- \(64, 64, 1, 1\)"),
                        (34, r"not in this ResNet \(\d+\): layer1\.2\.conv1\.weight")):
        torch.save(ResNet(depth).state_dict(), tmp_path / "deeper.pth")
        with pytest.raises(ConfigError, match=said):
            ResNet(18, pretrained=str(tmp_path / "deeper.pth")).init_weights()


def test_the_trunk_of_a_self_supervised_run_fills_a_deformable_network(tmp_path):
    """`backbone.*` beside `head.*` and `puzzle.*`; offsets, which a plain network has not, stay zero, but half of them is an error."""
    donor, path = ResNet(18), str(tmp_path / "epoch_10.pth")
    tensors = {f"backbone.{name}": value for name, value in donor.state_dict().items()}
    tensors |= {"head.weight": torch.zeros(100, 512), "puzzle.permutations": torch.zeros(100, 9)}
    torch.save({"state_dict": tensors, "meta": {"epoch": 10}}, path)
    resnet = ResNet(18, pretrained=path, out_stages=(3, 4), dcn=V1, stage_with_dcn=(False, False, True, False))
    resnet.init_weights()
    assert all(torch.equal(value, donor.state_dict()[name]) for name, value in resnet.state_dict().items() if "offset" not in name)
    assert not any(value.any() for name, value in resnet.state_dict().items() if "offset" in name)
    torch.save({**tensors, "backbone.layer3.0.conv2.conv_offset.weight": torch.zeros(72, 256, 3, 3)}, path)
    with pytest.raises(ConfigError, match=r"missing in the checkpoint \(3\): layer3.0.conv2.conv_offset.bias"):
        resnet.init_weights()


def test_mmengines_form_names_the_prefix(tmp_path):
    torch.manual_seed(0)
    student, teacher = ResNet(18, out_stages=(2,)), ResNet(18, out_stages=(2,))
    torch.save({f"{prefix}.{name}": value for prefix, network in (("student", student), ("teacher", teacher))
                for name, value in network.state_dict().items()}, tmp_path / "two.pth")
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "two.pth"), "prefix": "teacher"}
    resnet = ResNet(18, out_stages=(2,), init_cfg=init_cfg)
    resnet.init_weights()
    assert torch.equal(resnet.conv1.weight, teacher.conv1.weight)
    with pytest.raises(ConfigError, match="2 times, under 'student.', 'teacher.'; say which with the backbone's init_cfg"):
        ResNet(18, out_stages=(2,), pretrained=str(tmp_path / "two.pth")).init_weights()
    with pytest.raises(ConfigError, match="nothing of a ResNet under the prefix 'teachr.'. Did you mean 'teacher.'?"):
        ResNet(18, out_stages=(2,), init_cfg={**init_cfg, "prefix": "teachr."}).init_weights()


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
    ({"depth": 18, "stage_with_dcn": (True,)}, "one value for each of stages 2 to 5"),
    ({"depth": 18, "stage_with_dcn": LAST}, "give both or neither; got dcn=None"),
    ({"depth": 18, "dcn": V1}, "give both or neither"),
    ({"depth": 18, "dcn": V1, "stage_with_dcn": LAST, "out_stages": (3, 4)}, r"a stage beyond the last of out_stages=\(3, 4\)"),
    ({"depth": 18, "dcn": {"type": "DeformConv2dPak"}, "stage_with_dcn": LAST}, "^dcn.type: no op named 'DeformConv2dPak'"),
    ({"depth": 18, "dcn": {"type": "DeformConv2d"}, "stage_with_dcn": LAST}, "take DeformConv2dPack, which computes its own"),
    ({"depth": 18, "init_cfg": {"type": "Kaiming"}}, r"^init_cfg: a backbone takes .*type='Pretrained', checkpoint=...\), got"),
    ({"depth": 18, "init_cfg": {"type": "Pretrained", "checkpoint": "a.pth", "prefx": ""}}, "^init_cfg.prefx: .* Did you mean 'prefix'"),
    ({"depth": 18, "pretrained": "a.pth", "init_cfg": {"type": "Pretrained", "checkpoint": "a.pth"}}, "say the same; leave one out"),
    ({"depth": 34, "stride_in_1x1": True}, "the blocks of depth 34 have no 1x1 convolution"),
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


@pytest.mark.parametrize("arguments", [{"dcn": V1, "stage_with_dcn": LAST}, {"dcn": V2, "stage_with_dcn": (False, False, True, True)},
                                       {"checkpointing": True}], ids=["DCNv1", "DCNv2", "checkpointing"])
def test_deformable_and_checkpointed_networks_keep_the_backbone_contract(arguments):
    check_backbone(ResNet(18, **arguments))


@pytest.mark.parametrize("depth, norm", [(18, "GN"), (50, "BN"), (50, "FrozenBN")])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["channels_first", "channels_last"])
def test_a_fresh_deformable_network_is_the_plain_one_to_the_bit(depth, norm, memory_format):
    """Difference 0.0."""
    dilated = {"strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2), "zero_init_residual": False, "norm": norm}
    plain, deformable = ResNet(depth, **dilated), ResNet(depth, **dilated, dcn=V1, stage_with_dcn=(False, False, True, True))
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.5, 1.0)
    deformable.load_state_dict(plain.state_dict())                                     # strict: only the offset branches may be missing
    images = torch.randn(2, 3, 64, 96).to(memory_format=memory_format)
    with torch.no_grad():
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(deformable.eval()(images), plain.eval()(images), strict=True))


def test_the_release_has_72_offset_channels_of_dilation_2_in_each_of_three_blocks():
    """Spec of DCNv1: res5a, b, c branch2b, 3x3, dilation 2, stride 1, four groups, no bias; the offset branch alike, with a bias."""
    resnet = ResNet(50, strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), dcn=V1, stage_with_dcn=LAST)
    convolutions = [module for module in resnet.modules() if isinstance(module, DeformConv2dPack)]
    assert convolutions == [block.conv2 for block in resnet.layer4]
    for conv in convolutions:
        assert conv.weight.shape == (512, 512, 3, 3)
        assert conv.bias is None
        assert conv.conv_offset.weight.shape == (72, 512, 3, 3)
        assert conv.conv_offset.bias.shape == (72,)
        assert (conv.stride, conv.padding, conv.dilation) == (1, 2, 2)
        assert (conv.conv_offset.stride, conv.conv_offset.padding, conv.conv_offset.dilation) == ((1, 1), (2, 2), (2, 2))


@pytest.mark.parametrize("dcn", [V1, V2], ids=["DCNv1", "DCNv2"])
def test_offset_branches_start_at_zero_and_learn_in_the_first_step(dcn):
    """Spec 03, item 6: a gradient, and other weights after the step."""
    resnet = ResNet(18, dcn=dcn, stage_with_dcn=(False, False, True, True), zero_init_residual=False)
    branches = {name: value for name, value in resnet.named_parameters() if "conv_offset" in name}
    assert len(branches) == 8
    assert not any(value.any() for value in branches.values())
    assert resnet.layer4[0].conv2.weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)     # as the other convolutions
    optimizer = torch.optim.SGD(resnet.parameters(), lr=0.1)
    sum(feature.square().mean() for feature in resnet(torch.randn(2, 3, 64, 64))).backward()
    assert all(value.grad.any() for value in branches.values())
    optimizer.step()
    assert all(value.any() for value in branches.values())


def test_a_plain_checkpoint_may_lack_the_offset_branches_but_nothing_else():
    plain = ResNet(18).state_dict()
    resnet = ResNet(18, dcn=V1, stage_with_dcn=(False, False, True, True))
    nn.init.ones_(resnet.layer4[0].conv2.conv_offset.bias)
    resnet.load_state_dict(plain)
    assert not resnet.layer4[0].conv2.conv_offset.bias.any()                           # what the plain network is
    whole = resnet.state_dict()
    for absent in ("layer4.0.conv2.weight", "layer4.0.conv2.conv_offset.bias"):
        with pytest.raises(RuntimeError, match=f'Missing key.*"{absent}"'):
            resnet.load_state_dict({key: value for key, value in whole.items() if key != absent})
    with pytest.raises(RuntimeError, match='Unexpected key.*"layer4.0.conv2.conv_offset.weight"'):
        ResNet(18).load_state_dict(whole)


def test_a_plain_checkpoint_fits_also_inside_a_larger_model():
    model = nn.ModuleDict({"backbone": ResNet(18, dcn=V1, stage_with_dcn=LAST)})
    model.load_state_dict({f"backbone.{key}": value for key, value in ResNet(18).state_dict().items()})


def test_the_stride_may_be_in_the_first_1x1_convolution_of_a_stage():
    caffe, ours = ResNet(50, stride_in_1x1=True), ResNet(50)
    for stage in (caffe.layer2, caffe.layer3, caffe.layer4):
        assert (stage[0].conv1.stride, stage[0].conv2.stride) == ((2, 2), (1, 1))
    assert ours.layer2[0].conv2.stride == (2, 2)
    images = torch.zeros(1, 3, 65, 95)
    assert [feature.shape for feature in caffe(images)] == [feature.shape for feature in ours(images)]


@pytest.mark.parametrize("policy", ["every", "sqrt", "selective"])
@pytest.mark.parametrize("options", [{}, {"frozen_stages": 3}, {"dcn": V1, "stage_with_dcn": LAST, "norm": "FrozenBN"},
                                     {"dcn": V2, "stage_with_dcn": LAST}], ids=["all", "frozen", "DCNv1", "DCNv2"])
def test_checkpointing_changes_neither_features_nor_gradients_nor_statistics(options, policy):
    """Difference 0.0. Where the norm is in the convolution, what is kept selectively must not be overwritten."""
    torch.manual_seed(0)
    kept = ResNet(18, **options, zero_init_residual=False)
    again = ResNet(18, **options, checkpointing={"policy": policy})
    again.load_state_dict(kept.state_dict())
    assert again.state_dict().keys() == kept.state_dict().keys()
    images, features = torch.randn(1, 3, 64, 64), []
    for resnet in (kept, again):
        features.append(resnet(images))
        sum(feature.square().mean() for feature in features[-1]).backward()
    assert all(torch.equal(value, other) for value, other in zip(*features, strict=True))
    for (name, value), other in zip(kept.named_parameters(), again.parameters(), strict=True):
        assert (value.grad is None) == (other.grad is None), name
        assert value.grad is None or torch.equal(value.grad, other.grad), name
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in kept.state_dict().items())


def test_checkpointing_runs_each_block_again_in_the_backward_pass():
    resnet = ResNet(18, checkpointing=True)
    runs = []
    resnet.layer3[0].conv1.register_forward_hook(lambda *_: runs.append(1))
    loss = sum(feature.square().mean() for feature in resnet(torch.randn(1, 3, 64, 64)))
    assert len(runs) == 1
    loss.backward()
    assert len(runs) == 2


def test_torchvisions_checkpoint_loads_strictly_into_a_dilated_deformable_network():
    peer = pytest.importorskip("torchvision", reason="the peer to compare with is not installed", exc_type=ImportError).models
    theirs = peer.resnet50(replace_stride_with_dilation=(False, False, True)).eval()
    dilated = {"strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2), "dcn": V1, "stage_with_dcn": LAST}
    ours = ResNet(50, out_stages=(5,), **dilated).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert theirs.layer4[0].conv2.dilation == (1, 1)                                   # theirs begins the dilation a block later
    theirs.layer4[0].conv2.dilation = theirs.layer4[0].conv2.padding = (2, 2)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        features = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
        features = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(features))))
        torch.testing.assert_close(ours(images)[0], features)


@pytest.mark.parametrize("dcn", [V1, V2], ids=["DCNv1", "DCNv2"])
def test_frozen_normalisation_within_a_deformable_convolution_changes_nothing(dcn):
    """Against the convolution and then the norm, in float64; and the gradients."""
    torch.manual_seed(0)
    resnet = ResNet(18, out_stages=(2,), norm="FrozenBN", dcn=dcn, stage_with_dcn=(True, False, False, False)).double()
    block = resnet.layer1[0]
    nn.init.normal_(block.conv2.conv_offset.weight, std=0.05)
    nn.init.uniform_(block.bn2.running_var, 0.5, 2.0)
    nn.init.normal_(block.bn2.running_mean)
    x = torch.randn(1, 64, 8, 10, dtype=torch.float64)
    parameters = list(block.conv2.parameters())
    results = []
    for output in (block.bn2.after(block.conv2, x), block.bn2(block.conv2(x))):
        results.append([output, *torch.autograd.grad(output.square().sum(), parameters)])
    assert len(results[0]) == 4
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    assert block.conv2.bias is None
