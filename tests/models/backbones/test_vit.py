import pytest
import torch

from visionkit.engine.convert import plan
from visionkit.models.backbones import ViT
from visionkit.models.layers import global_mean
from visionkit.structures import ImageBatch, ImageList

TINY = dict(channels=16, num_layers=2, num_heads=2, hidden_channels=24, position_grid=(4, 4))


def build(**settings):
    torch.manual_seed(0)
    return ViT(**{**TINY, **settings}).eval()


def images(*sizes):
    generator = torch.Generator().manual_seed(0)
    return ImageList(tuple(torch.randn(3, *size, generator=generator) for size in sizes))


@torch.no_grad()
def test_it_computes_what_timms_does():
    """vit_tiny_patch16_224 with random weights. Measured: 3.5e-6 of values up to 4.7."""
    timm = pytest.importorskip("timm", reason="the oracle is timm's: pip install -e '.[test]'")
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224").eval()
    for value in theirs.state_dict().values():
        value.add_(torch.randn_like(value) * 0.1 if value.ndim == 1 else torch.randn_like(value) * 0.05)
    ours = build(channels=192, num_layers=12, num_heads=3, hidden_channels=768, position_grid=(14, 14), returned="all")
    done = plan(theirs.state_dict(), ours)
    ours.load_state_dict(done.state_dict)
    assert done.name == "vit"
    assert done.dropped == {"the classifier; a backbone has none": ["head.weight", "head.bias"]}
    batch = torch.randn(1, 3, 224, 224)
    expected = theirs.forward_features(batch).flatten(0, 1)
    assert (ours(batch).tokens - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_the_class_token_and_the_patches_can_be_had_by_themselves():
    given = images((32, 48), (16, 16))
    everything, patches, alone = (build(returned=what)(given) for what in ("all", "patches", "class"))
    assert everything.grids is None
    assert everything.lengths == (7, 2)
    assert patches.grids == ((2, 3), (1, 1))
    assert torch.equal(everything.split()[0][1:], patches.split()[0])
    assert torch.equal(everything.tokens[[0, 7]], alone.tokens)
    assert torch.equal(global_mean(alone), alone.tokens)
    without = build(class_token=False)
    assert without.positions.shape == (1, 16, 16)
    assert without(given).grids == patches.grids


@torch.no_grad()
def test_an_image_alone_gives_what_it_gives_among_others_and_in_a_padded_batch():
    """Measured: 1.8e-7 of values up to 3.6."""
    model, given = build(), images((32, 48), (16, 16), (64, 16))
    together = model(given)
    assert torch.equal(model(ImageBatch.stack(list(given.images), divisor=16)).tokens, together.tokens)
    for image, tokens in zip(given.images, together.split(), strict=True):
        torch.testing.assert_close(model(ImageList((image,))).tokens, tokens, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings, said", [(dict(returned="maps"), "must be 'patches', 'class' or 'all', got 'maps'"),
                                            (dict(returned="class", class_token=False), "returned='class' needs class_token=True"),
                                            (dict(num_heads=3), "16 channels cannot be split among 3 heads")])
def test_what_cannot_be_built_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        build(**settings)
