import math

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import Tensor, nn

from visionkit.models.detectors import DETR, PackedDETR
from visionkit.models.layers import SinePositionEncoding
from visionkit.registry import MODELS, ConfigError
from visionkit.structures import ImageBatch, ImageList, InstanceData, PackedSequence, Sample
from visionkit.testing import check_model

STRIDE, CHANNELS = 8, 12


class Patches(nn.Module):
    """The smallest backbone of tokens: a linear layer on each patch of 8x8 pixels."""
    returns_tokens, out_channels, strides = True, (CHANNELS,), (STRIDE,)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, CHANNELS, STRIDE, STRIDE)

    def forward(self, images: ImageList) -> PackedSequence:
        maps = [self.embed(image) for image in images.images]
        return PackedSequence.pack([level.flatten(1).T for level in maps], [tuple(level.shape[1:]) for level in maps])


class Map(Patches):
    """The same as a map [B, C, h, w] of images of one size."""
    returns_tokens = False

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.embed(images),)


SETTINGS = {"num_classes": 3, "num_queries": 5, "channels": 32, "num_heads": 4, "hidden_channels": 32, "encoder_layers": 2,
            "decoder_layers": 2, "dropout": 0.0}


def build(**changes) -> PackedDETR:
    torch.manual_seed(0)
    return PackedDETR(**{"backbone": Patches()} | SETTINGS | changes)


def images(*sizes) -> ImageList:
    generator = torch.Generator().manual_seed(1)
    return ImageList.pad([torch.randn(3, *size, generator=generator) for size in sizes], divisor=STRIDE)


def sample(size, boxes=((0.1, 0.1, 0.5, 0.6), (0.5, 0.3, 0.9, 0.8)), labels=(0, 2)) -> Sample:
    height, width = size
    sample = Sample(metainfo={"img_id": 1, "img_shape": size, "ori_shape": (2 * height, 2 * width), "scale_factor": (0.5, 0.5)})
    boxes = torch.tensor(boxes).view(-1, 4) * torch.tensor([width, height, width, height])
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor(labels, dtype=torch.int64))
    return sample


def with_moonvit(**changes) -> nn.Module:
    """Tokens of 2x2 patches of 4 pixels, so that images are padded to multiples of 8."""
    torch.manual_seed(0)
    return MODELS.build({
        "type": "PackedDETR",
        "data_preprocessor": {"type": "NativeResolutionPreprocessor", "multiple": STRIDE},
        "backbone": {"type": "MoonViT", "patch_size": 4, "channels": 16, "num_layers": 2, "num_heads": 2, "hidden_channels": 32,
                     "position_grid": (4, 4)},
    } | SETTINGS | changes)


SIZES = (40, 64), (16, 24), (33, 50)
UNUSED = ("transformer.decoder.layers.0.self_attention*",)                  # its input is zeros: all queries say the same to each other


@pytest.mark.parametrize("changes", [{}, {"neck": {"type": "MLPProjector", "out_channels": 20}, "pre_norm": True,
                                          "checkpointing": {"policy": "sqrt"}}], ids=["patches side by side", "with a projector"])
def test_with_moonvit_it_keeps_the_model_contract(changes):
    check_model(with_moonvit(**changes), num_classes=3, image_sizes=SIZES, unused=UNUSED)


@torch.no_grad()
def test_with_moonvit_an_image_among_others_gives_what_it_gives_alone():
    """The same of what is detected, in pixels. Measured: 0 of scores, 0 of boxes."""
    model = with_moonvit().eval()
    inputs = [torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8) for size in SIZES]
    samples = [sample(size) for size in SIZES]
    together = model.test_step({"inputs": inputs, "data_samples": samples})
    for image, truth, found in zip(inputs, SIZES, together, strict=True):
        (alone,) = model.test_step({"inputs": [image], "data_samples": [sample(truth)]})
        torch.testing.assert_close(alone.pred_instances.scores, found.pred_instances.scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(alone.pred_instances.bboxes, found.pred_instances.bboxes, rtol=0, atol=1e-4)


@torch.no_grad()
def test_an_image_among_others_gives_what_it_gives_alone():
    """Measured: no difference."""
    model, batch = build().eval(), images(*SIZES)
    together = model(batch)
    for index in range(len(batch)):
        alone = model(ImageList(batch.images[index:index + 1], batch.sizes[index:index + 1]))
        for ours, others in zip(alone, together, strict=True):
            torch.testing.assert_close(ours.logits[0], others.logits[index], rtol=0, atol=1e-5)
            torch.testing.assert_close(ours.boxes[0], others.boxes[index], rtol=0, atol=1e-5)


@torch.no_grad()
def test_images_in_another_order_give_the_same_in_that_order():
    model, batch = build().eval(), images(*SIZES)
    turned = model(ImageList(batch.images[::-1], batch.sizes[::-1]))[-1]
    torch.testing.assert_close(turned.logits.flip(0), model(batch)[-1].logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_on_images_of_one_size_it_is_detr():
    """With positions at the middle of each token. Measured: 4e-07 of the logits, 6e-08 of the boxes."""
    packed = build().eval()
    torch.manual_seed(0)
    detr = DETR(Map(), **SETTINGS).eval()
    detr.position = SinePositionEncoding(32, offset=-0.5)
    state = packed.state_dict()
    state["project.weight"] = state["project.weight"][:, :, None, None]
    detr.load_state_dict(state)
    batch = images((40, 64), (40, 64))
    ours, theirs = packed(batch)[-1], detr(ImageBatch.stack(batch.images))[-1]
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.boxes, theirs.boxes, rtol=0, atol=1e-6)


def test_every_layer_sees_the_tokens_and_queries_and_nothing_else():
    model, batch = build(), images(*SIZES)
    tokens, queries, layers, rows = 5 * 8 + 2 * 3 + 5 * 7, 3 * 5, 2, []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, inputs, output: rows.append(inputs[0].shape[:-1].numel()))
    model.eval()(batch)
    assert set(rows) == {tokens, queries, queries * layers}                 # the read-out reads all layers at once
    assert rows.count(tokens) == 1 + layers * 6 + layers * 2                # projection; encoder; keys and values of the decoder


def test_a_token_stands_where_its_middle_lies_in_the_image_without_its_padding():
    model = build()
    batch = images((12, 16))                                                # 2x2 tokens, of which the lower ones are half padding
    positions = model.positions(model.backbone(batch), batch.sizes).view(2, 2, 32)
    y, x = 2 * math.pi * torch.tensor([4 / 12, 12 / 12]), 2 * math.pi * torch.tensor([4 / 16, 12 / 16])
    torch.testing.assert_close(positions[:, 0, 0], y.sin())                 # the first pair has the period of the image
    torch.testing.assert_close(positions[:, 1, 1], y.cos())
    torch.testing.assert_close(positions[0, :, 16], x.sin())
    torch.testing.assert_close(positions[1, :, 17], x.cos())


def test_the_loss_is_that_of_every_layer_and_an_image_without_objects_counts():
    batch = images(*SIZES[:2])
    losses = build(decoder_layers=3).loss(batch, [sample(SIZES[0]), sample(SIZES[1], (), ())])
    assert set(losses) == {f"loss_{term}{layer}" for term in ("class", "box", "giou") for layer in ("", "_0", "_1")}
    assert all(loss.isfinite() for loss in losses.values())


def test_it_learns_two_images_of_different_sizes_by_heart():
    model, batch = build(encoder_layers=1, decoder_layers=1), images(*SIZES[:2])
    samples = [sample(SIZES[0]), sample(SIZES[1], ((0.2, 0.4, 0.8, 0.9),), (1,))]
    optimizer = build_optim_wrapper(model, {"optimizer": {"type": "AdamW", "lr": 2e-3}, "clip_grad": {"max_norm": 1.0}})
    for _ in range(100):
        total, _ = model.parse_losses(model.loss(batch, samples))
        optimizer.update_params(total)
    model.eval()
    for truth, found in zip(samples, model.predict(batch, samples), strict=True):
        instances, expected = found.pred_instances, truth.gt_instances
        best = instances[:len(expected.labels)]
        assert best.scores.min() > 0.5
        order, wanted = best.labels.argsort(), expected.labels.argsort()
        assert torch.equal(best.labels[order], expected.labels[wanted])
        torch.testing.assert_close(best.bboxes[order], 2 * expected.bboxes[wanted], rtol=0, atol=8)     # pixels of the original


def test_a_backbone_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="PackedDETR reads tokens, and Map gives maps"):
        build(backbone=Map())
    vit = {"type": "ViT", "patch_size": 8, "channels": 16, "num_layers": 1, "num_heads": 2, "hidden_channels": 16}
    with pytest.raises(ConfigError, match="have no grids; let the backbone return patches alone"):
        build(backbone=vit | {"returned": "all"})(images((16, 24)))
    build(backbone=vit)(images((16, 24)))


@pytest.mark.parametrize("model", ["DETR", "CPC", "DeepInfoMax"])
def test_models_of_maps_refuse_tokens_and_images_without_a_canvas(model):
    settings = SETTINGS if model == "DETR" else {}
    vit = {"type": "ViT", "patch_size": 8, "channels": 16, "num_layers": 1, "num_heads": 2, "hidden_channels": 16}
    small = {"type": "StridedConvs", "channels": (8, 8)}
    with pytest.raises(ConfigError, match=f"model.data_preprocessor: {model} computes on images in one tensor"):
        MODELS.build({"type": model, "backbone": small} | settings)(images((32, 32)), [], mode="loss")
    if model == "DETR":                          # the others read of the constructor's maps what tokens do not have
        with pytest.raises(ConfigError, match="model.backbone: DETR reads maps, and ViT gives tokens; .* PackedDETR"):
            MODELS.build({"type": model, "backbone": vit} | settings)(images((32, 32)), [], mode="loss")
