import pytest
import torch
from torch import nn

from visionkit.models.backbones import MoonViT
from visionkit.models.necks import MLPProjector
from visionkit.registry import BACKBONES, NECKS
from visionkit.structures import ImageBatch, ImageList

TINY = dict(channels=32, num_layers=2, num_heads=2, hidden_channels=48, position_grid=(4, 4))
SIZES = [(56, 84), (28, 28), (112, 56)]


def build(**settings):
    torch.manual_seed(0)
    return MoonViT(**{**TINY, **settings}).eval()


def images(sizes=SIZES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return ImageList(tuple(torch.randn(3, *size, generator=generator) for size in sizes))


def test_the_published_size_has_as_many_parameters_as_published():
    """Spec 10, item 1: 416,866,032."""
    with torch.device("meta"):
        model = MoonViT()
    assert sum(parameter.numel() for parameter in model.parameters()) == 416_866_032
    assert (model.out_channels, model.strides, model.patches_per_token) == ((1152,), (28,), 4)


def test_a_token_is_four_patches_of_28_pixels_in_all():
    tokens = build()(images())
    assert tokens.grids == ((2, 3), (1, 1), (4, 2))
    assert tokens.tokens.shape == (6 + 1 + 8, 4, 32)
    plain = build(merge=None)(images())
    assert plain.grids == ((4, 6), (2, 2), (8, 4))
    assert plain.tokens.shape == (4 * 15, 32)
    assert torch.equal(tokens.tokens[0], plain.maps()[0][:, :2, :2].flatten(1).T)


def test_shapes_are_told_without_numbers():
    with torch.device("meta"):
        tokens = build()(ImageList((torch.empty(3, 56, 84), torch.empty(3, 28, 28))))
    assert tokens.grids == ((2, 3), (1, 1))
    assert (tokens.tokens.shape, tokens.tokens.device.type) == ((7, 4, 32), "meta")


@torch.no_grad()
def test_an_image_alone_gives_what_it_gives_among_others():
    """Spec 10, item 3. Measured: 0, in float32 and in float64."""
    model, given = build(), images()
    for image, tokens in zip(given.images, model(given).split(), strict=True):
        torch.testing.assert_close(model(ImageList((image,))).tokens, tokens, rtol=0, atol=1e-6)
    model, given = model.double(), ImageList(tuple(image.double() for image in given.images))
    for image, tokens in zip(given.images, model(given).split(), strict=True):
        torch.testing.assert_close(model(ImageList((image,))).tokens, tokens, rtol=0, atol=1e-12)


def test_gradients_of_a_pack_are_the_sums_of_those_of_its_images():
    """Spec 6, item 3, in float64. Measured: 6e-16 of the largest."""
    model, given = build().double(), ImageList(tuple(image.double() for image in images().images))
    model(given).tokens.square().sum().backward()
    packed = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    for image in given.images:
        model(ImageList((image,))).tokens.square().sum().backward()
    for ours, expected in zip(packed, (parameter.grad for parameter in model.parameters()), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12 * max(1.0, expected.abs().max().item()))


@torch.no_grad()
def test_permuting_images_permutes_outputs():
    """Measured: 0."""
    model, given, order = build(), images(), [2, 0, 1]
    permuted = model(ImageList(tuple(given.images[index] for index in order)))
    expected = model(given).select(order)
    assert permuted.grids == expected.grids
    torch.testing.assert_close(permuted.tokens, expected.tokens, rtol=0, atol=1e-6)


@torch.no_grad()
def test_changing_one_image_leaves_the_others_as_they_are_bit_by_bit():
    model, given = build(), images()
    changed = ImageList((given.images[0], given.images[1] + 1, given.images[2]))
    before, after = model(given).split(), model(changed).split()
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert (before[1] - after[1]).abs().max() > 0.1


def test_every_linear_layer_computes_on_as_many_tokens_as_there_are():
    model, seen = build(), []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[:-1].numel()))
    model(ImageBatch.stack([torch.zeros(3, *size) for size in SIZES], divisor=28))         # whose canvas has 8 x 6 patches an image
    assert seen == [4 * (6 + 1 + 8)] * 8


@torch.no_grad()
def test_swapping_rows_and_columns_changes_the_output():
    """Spec 10, item 4: the patches in the same order on a grid of 2 x 4 and of 4 x 2. Measured: 0.16."""
    model = build(merge=None)
    wide = images([(28, 56)]).images[0]
    patches = wide.unflatten(2, (4, 14)).unflatten(1, (2, 14)).permute(1, 3, 0, 2, 4).flatten(0, 1)        # [8, 3, 14, 14]
    tall = patches.unflatten(0, (4, 2)).permute(2, 0, 3, 1, 4).reshape(3, 56, 28)
    nn.init.zeros_(model.positions)                                                        # the rotations alone
    first, second = (model(ImageList((image,))) for image in (wide, tall))
    assert (first.grids, second.grids) == (((2, 4),), ((4, 2),))
    assert (first.tokens - second.tokens).abs().max() > 0.01


@torch.no_grad()
def test_an_image_batch_is_taken_apart_into_its_images():
    model, given = build(), images()
    batch = ImageBatch.stack(list(given.images), divisor=28)
    assert torch.equal(model(batch).tokens, model(given).tokens)


def test_weights_begin_as_published():
    model = build(channels=64, hidden_channels=2048, num_layers=1, position_grid=(32, 32))
    feed_forward = model.encoder.blocks[0].feed_forward
    assert feed_forward.linear1.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.02)
    assert feed_forward.linear2.weight.std().item() == pytest.approx((2 / 2048) ** 0.5, rel=0.02)
    assert not feed_forward.linear1.bias.any()
    assert model.positions.std().item() == pytest.approx(1, rel=0.02)
    assert build(position_grid=(32, 32), position_std=0.02).positions.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("settings, said", [
    (dict(channels=36), r"multiple of 4 \* num_heads = 8, got 36"), (dict(merge=(2, 1)), r"merge must be as many rows as columns")])
def test_what_cannot_be_built_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        build(**settings)


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="image 1 has 28x42 pixels, and patches fill multiples of 28 only"):
        build()(images([(28, 28), (28, 42)]))
    with pytest.raises(ValueError, match="image 0 has 2x512 patches, and a side has fewer than 512; crop it"):
        build()(ImageList((torch.zeros(3, 28, 512 * 14),)))


def test_a_checkpoint_of_a_model_with_this_backbone_begins_another(tmp_path):
    source = build()
    torch.save({"state_dict": {f"backbone.{name}": value for name, value in source.state_dict().items()}}, tmp_path / "model.pth")
    model = BACKBONES.build({"type": "MoonViT", **TINY, "pretrained": str(tmp_path / "model.pth")})
    model.init_weights()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in source.state_dict().items())


# ------------------------------------------------------------------------------------------------------------------- projector

def test_the_projector_takes_what_the_backbone_gives():
    backbone = build()
    neck = NECKS.make({"type": "MLPProjector", "out_channels": 20}, at="neck", in_channels=backbone.out_channels, strides=backbone.strides)
    projected = neck(backbone(images()))
    assert isinstance(neck, MLPProjector)
    assert projected.tokens.shape == (15, 20)
    assert projected.grids == ((2, 3), (1, 1), (4, 2))
    assert (neck.out_channels, neck.strides) == ((20,), (28,))
    with pytest.raises(ValueError, match="takes tokens of 4 patches, and the backbone gives tokens of 1"):
        neck(build(merge=None)(images()))
