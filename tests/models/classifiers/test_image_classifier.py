import copy
import math

import pytest
import torch
import torch.nn.functional as F

from visionkit.models.heads import ClassificationHead
from visionkit.registry import MODELS, ConfigError
from visionkit.structures import ImageBatch, ImageList, Sample

BACKBONE = dict(type="ResNet", depth=18, out_stages=(2, 3))


def build(**changes):
    torch.manual_seed(0)
    return MODELS.build({"type": "ImageClassifier", "backbone": BACKBONE, "num_classes": 3, **changes})


def batch(labels, seed=0, size=32):
    images = torch.randn(len(labels), 3, size, size, generator=torch.Generator().manual_seed(seed))
    samples = [Sample(metainfo={"img_id": i}) for i in range(len(labels))]
    for sample, label in zip(samples, labels, strict=True):
        sample.gt_label = torch.tensor(label)
    return ImageBatch(images, [(size, size)] * len(labels)), samples


def test_the_loss_is_the_cross_entropy_and_every_parameter_gets_a_gradient():
    model = build()
    images, samples = batch([0, 2, 1, 1])
    logits = copy.deepcopy(model)(images)
    loss = model(images, samples, mode="loss")["loss_class"]
    torch.testing.assert_close(loss, -logits.log_softmax(1)[range(4), [0, 2, 1, 1]].mean())
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.head.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_it_learns_four_images_by_heart_and_predicts_their_labels():
    model = build()
    images, samples = batch([0, 2, 1, 1])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(12):
        optimizer.zero_grad()
        model.loss(images, samples)["loss_class"].backward()
        optimizer.step()
    predicted = model.eval().predict(images, samples)
    assert [one.pred_scores.argmax().item() for one in predicted] == [0, 2, 1, 1]
    assert all(one.pred_scores.sum().item() == pytest.approx(1) for one in predicted)


def test_smoothed_labels_are_worked_out_by_hand():
    """Logits 0 and log 3: probabilities 1/4 and 3/4; a smoothing of 0.2 asks for 0.1 and 0.9."""
    loss = ClassificationHead(2, 2, label_smoothing=0.2).loss(torch.tensor([[0.0, math.log(3)]]), torch.tensor([1]))
    assert loss.item() == pytest.approx(-0.1 * math.log(1 / 4) - 0.9 * math.log(3 / 4))


def test_padding_is_no_part_of_the_mean():
    head = ClassificationHead(2, 3)
    features = torch.randn(1, 2, 4, 4)
    features[..., 2:] = 100                                  # what lies on the padding
    valid = torch.zeros(1, 16, 16, dtype=torch.bool)
    valid[..., :8] = True
    torch.testing.assert_close(head(features, valid), F.linear(features[..., :2].mean((2, 3)), head.linear.weight, head.linear.bias))
    torch.testing.assert_close(head(features), head(features.mean((2, 3))))
    model = build().eval()
    small = torch.randn(1, 3, 32, 32)
    padded = ImageBatch(F.pad(small, (0, 32)), [(32, 32)])
    marked = model(padded)
    assert not torch.allclose(marked, model(ImageBatch(padded.tensor, [(32, 64)])))


def test_a_frozen_backbone_keeps_weights_and_statistics():
    model = build(frozen=True).train()
    before = copy.deepcopy(model.backbone.state_dict())
    images, samples = batch([0, 1])
    model.loss(images, samples)["loss_class"].backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert model.head.linear.weight.grad is not None
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())


def test_features_are_the_maps_of_the_backbone():
    features = build().eval()(batch([0])[0], mode="features")
    assert {name: tuple(value.shape) for name, value in features.items()} == {"map0": (1, 64, 8, 8), "map1": (1, 128, 4, 4)}


@pytest.mark.parametrize("changes, said", [
    (dict(num_classes=None), "a classifier needs num_classes, or a head"), (dict(num_classes=0), "head: .*num_classes must be at least 1"),
    (dict(head=dict(type="ClassificationHead", label_smoothing=1)), "head: .*label_smoothing and dropout lie within"),
    (dict(head=dict(type="ClasificationHead")), "head.type: no head named")])
def test_what_cannot_be_built_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        build(**changes)


def test_a_head_brings_its_own_number_of_classes():
    assert build(num_classes=None, head=dict(type="ClassificationHead", num_classes=7)).head.num_classes == 7


def test_labels_that_are_missing_or_unknown_are_told():
    model = build()
    images, samples = batch([0, 3])
    with pytest.raises(ValueError, match=r"knows the labels 0 to 2, and the images have \[0, 3\]"):
        model.loss(images, samples)
    with pytest.raises(ValueError, match="image 5 has none"):
        model.loss(images, [samples[0], Sample(metainfo={"img_id": 5})])


# --------------------------------------------------------------------------------------------------------------- token backbones

TOKENS = dict(channels=16, num_layers=1, num_heads=2, hidden_channels=24, position_grid=(4, 4))


def native(labels, sizes=((28, 56), (56, 28), (28, 28), (56, 84))):
    _, samples = batch(labels)
    generator = torch.Generator().manual_seed(0)
    return ImageList(tuple(torch.randn(3, *size, generator=generator) for size in sizes[:len(labels)])), samples


@pytest.mark.parametrize("backbone", [dict(type="MoonViT", **TOKENS), dict(type="MoonViT", merge=None, **TOKENS),
                                      dict(type="ViT", patch_size=14, returned="class", **TOKENS)], ids=["merged", "plain", "class token"])
def test_images_of_their_own_sizes_are_learnt_by_heart(backbone):
    model = build(backbone=backbone)
    images, samples = native([0, 2, 1, 1])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        model.loss(images, samples)["loss_class"].backward()
        optimizer.step()
    assert [one.pred_scores.argmax().item() for one in model.eval().predict(images, samples)] == [0, 2, 1, 1]


def test_the_logits_of_an_image_are_those_of_its_mean_token_whatever_lies_beside_it():
    model = build(backbone=dict(type="MoonViT", **TOKENS)).eval()
    images, _ = native([0, 2, 1, 1])
    logits = model(images)
    for index, image in enumerate(images.images):
        tokens = model.backbone(ImageList((image,))).tokens
        torch.testing.assert_close(logits[index], model.head.linear(tokens.mean((0, 1))))
    features = model(images, mode="features")
    assert {name: tuple(value.shape) for name, value in features.items()} == {"mean": (4, 4 * 16)}
    torch.testing.assert_close(features["mean"].unflatten(1, (4, 16))[1], model.backbone(images).split()[1].mean(0))


def test_a_backbone_that_makes_maps_refuses_images_of_their_own_sizes():
    images, samples = native([0, 1])
    for ask in (lambda: build().loss(images, samples), lambda: build()(images, mode="features")):
        with pytest.raises(ValueError, match="ResNet makes maps of a batch in one tensor.*ImagePreprocessor"):
            ask()
