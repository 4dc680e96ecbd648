"""Panoptic DETR beside the one of Hugging Face transformers, with the same random weights."""
import re

import pytest
import torch
from torch import Tensor, nn

from visionkit.engine.convert import convert
from visionkit.registry import MODELS
from visionkit.structures import ImageBatch, InstanceData, Sample

transformers = pytest.importorskip("transformers", reason="the oracle is transformers' DETR: pip install -e '.[test]'")
pytest.importorskip("timm", reason="the oracle's backbone is timm's: pip install -e '.[test]'")

SMALL = {"num_classes": 5, "num_queries": 12, "channels": 64, "num_heads": 8, "hidden_channels": 48, "encoder_layers": 2,
         "decoder_layers": 2}


def pair(depth: int = 18, auxiliary_losses: bool = True, **settings) -> tuple[nn.Module, nn.Module]:
    """Ours and theirs with the same random weights and statistics, in eval mode."""
    torch.manual_seed(0)
    layers = {"encoder_layers": settings.get("encoder_layers", 6), "decoder_layers": settings.get("decoder_layers", 6)}
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), settings.get("num_heads", 8))
    hidden = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), settings.get("hidden_channels", 2048))
    theirs = transformers.DetrForSegmentation(transformers.DetrConfig(
        backbone=f"resnet{depth}", num_labels=settings["num_classes"], num_queries=settings.get("num_queries", 100),
        d_model=settings.get("channels", 256), auxiliary_loss=auxiliary_losses, **layers, **heads, **hidden))
    for name, value in theirs.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.dim() == 2:
            nn.init.xavier_uniform_(value)                                  # theirs starts so small that the image hardly matters
        elif value.dim() == 1 and not (auxiliary_losses and re.search(r"decoder.*(final_layer_norm|\.layernorm)", name)):
            value.add_(torch.randn_like(value) * 0.1)
    ours = MODELS.build({"type": "DetrPanoptic", "backbone": {"type": "ResNet", "depth": depth, "norm": "FrozenBN", "frozen_stages": 2},
                         "num_things": 3, "query_chunk": 5, "auxiliary_losses": auxiliary_losses, **settings})
    ours.load_state_dict(convert(theirs.state_dict(), ours))
    return ours.eval(), theirs.eval()


def batch(sizes: list[tuple[int, int]], classes: int, counts: list[int]) -> tuple[ImageBatch, list[Sample], dict[str, Tensor]]:
    """The same images, objects and masks for both."""
    generator = torch.Generator().manual_seed(1)
    images = ImageBatch.stack([torch.randn(3, *size, generator=generator) for size in sizes])
    samples, labels = [], []
    for (height, width), count in zip(sizes, counts, strict=True):
        center, side = torch.rand(2, count, 2, generator=generator)
        boxes = torch.cat([center * 0.5 + 0.25, side * 0.4 + 0.05], 1)
        corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1) * torch.tensor([width, height] * 2)
        sample = Sample(metainfo={"img_shape": (height, width), "ori_shape": (2 * height, 2 * width), "scale_factor": (0.5, 0.5)})
        sample.gt_instances = InstanceData(bboxes=corners, labels=torch.randint(0, classes, (count,), generator=generator),
                                           masks=torch.rand(count, height, width, generator=generator) < 0.3)
        samples.append(sample)
        labels.append({"class_labels": sample.gt_instances.labels, "boxes": boxes, "masks": sample.gt_instances.masks})
    return images, samples, {"pixel_values": images.tensor, "pixel_mask": images.valid().long(), "labels": labels}


def check(ours: nn.Module, theirs: nn.Module, sizes: list[tuple[int, int]], counts: list[int]) -> None:
    images, samples, inputs = batch(sizes, ours.num_classes, counts)
    with torch.no_grad():
        expected = theirs(**inputs)
        scene = ours(images)
        masks = torch.stack([ours.masks(scene, index, torch.arange(expected.logits.shape[1])) for index in range(len(sizes))])
        losses = ours.loss(images, samples)
    torch.testing.assert_close(scene.decoded.layers[-1].logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(scene.decoded.layers[-1].boxes, expected.pred_boxes, rtol=0, atol=1e-5)
    torch.testing.assert_close(masks, expected.pred_masks, rtol=0, atol=1e-4)
    assert sum(losses.values()).item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert losses["loss_mask"].item() == pytest.approx(expected.loss_dict["loss_mask"].item(), rel=1e-5)
    assert losses["loss_dice"].item() == pytest.approx(expected.loss_dict["loss_dice"].item(), rel=1e-5)


# With auxiliary losses, transformers 5 hands the *normalised* output of a decoder layer on to the next, which neither the paper nor the
# authors' code does. It makes no difference where these norms are as initialised, so there they stay so; the first case moves them all.
@pytest.mark.parametrize("auxiliary_losses", [False, True])
def test_a_padded_batch_has_the_masks_and_loss_of_transformers(auxiliary_losses):
    """Spec 11, items 2 and 3. Measured: masks differ by 5.6e-6, logits by 1.7e-6; the loss, 10.4146, is the same to all digits."""
    check(*pair(auxiliary_losses=auxiliary_losses, **SMALL), sizes=[(64, 90), (83, 48), (30, 96)], counts=[3, 0, 5])


def test_so_has_a_batch_without_padding():
    check(*pair(auxiliary_losses=False, **SMALL), sizes=[(64, 96)] * 2, counts=[2, 1])


@pytest.mark.slow
def test_the_published_size_agrees_too():
    """R50, 250 classes, 6 + 6 layers, 100 queries. Measured: masks differ by 5.1e-6, logits by 1.9e-6; the loss is 13.1719 for both."""
    ours, theirs = pair(depth=50, num_classes=250, auxiliary_losses=False)
    check(ours, theirs, sizes=[(160, 213), (144, 240)], counts=[7, 2])
    frozen = sum(parameter.numel() for name, parameter in ours.named_parameters() if name.startswith("backbone") and parameter.dim() == 1)
    assert sum(parameter.numel() for parameter in ours.parameters()) - frozen == 42_899_288                 # 42.90 M
    assert sum(parameter.numel() for parameter in theirs.parameters()) == 42_899_288
