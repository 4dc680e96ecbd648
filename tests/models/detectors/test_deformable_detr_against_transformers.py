"""Deformable DETR against the one of HF transformers, with the same random weights."""
import pytest
import torch

from visionkit.engine.convert import convert
from visionkit.registry import MODELS
from visionkit.structures import ImageBatch, InstanceData, Sample

transformers = pytest.importorskip("transformers", reason="the oracle is transformers' Deformable DETR: pip install -e '.[test]'")
pytest.importorskip("timm", reason="the oracle's backbone is timm's: pip install -e '.[test]'")

PLAIN, REFINE = {}, {"with_box_refine": True}
TWO_STAGE = {"with_box_refine": True, "two_stage": True}


def theirs(variant, depth, channels, feedforward, layers, queries, num_classes, levels):
    """HF's, with a head of its own for every layer where boxes are refined: its default ties them to the first."""
    config = transformers.DeformableDetrConfig(
        backbone_config={"model_type": "timm_backbone", "backbone": f"resnet{depth}", "num_channels": 3, "features_only": True,
                         "use_pretrained_backbone": False, "out_indices": [2, 3, 4]},
        d_model=channels, encoder_layers=layers, decoder_layers=layers, encoder_ffn_dim=feedforward, decoder_ffn_dim=feedforward,
        num_queries=queries, two_stage_num_proposals=queries, num_feature_levels=levels, num_labels=num_classes, auxiliary_loss=True,
        tie_word_embeddings=not variant, **variant)
    model = transformers.DeformableDetrForObjectDetection(config).eval()
    if "with_box_refine" in variant:
        model.model.decoder.bbox_embed = model.bbox_embed
    if "two_stage" in variant:
        model.model.decoder.class_embed = model.class_embed
    return model


def ours(variant, depth, channels, feedforward, layers, queries, num_classes, levels):
    # transformers weighs class and costs 1, 5, 2, the paper 2, 5, 2
    return MODELS.build({
        "type": "DeformableDETR", "num_classes": num_classes, "num_queries": queries, "encoder_layers": layers,
        "decoder_layers": layers, "hidden_channels": feedforward, "max_per_image": queries, **variant,
        "backbone": {"type": "ResNet", "depth": depth, "norm": "FrozenBN", "out_stages": (3, 4, 5)},
        "neck": {"type": "ChannelMapper", "out_channels": channels, "num_levels": levels},
        "matcher": {"type": "HungarianMatcher", "class_cost": 1.0},
        "set_loss": {"type": "SetPredictionLoss", "class_weight": 1.0},
    }).eval()


@torch.no_grad()
def randomise(model):
    """Weights that leave nothing at its start: sampling offsets, heads, and the statistics of batch normalisation."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict(keep_vars=True).items():
        noise = torch.randn(value.shape, generator=generator)
        if "running_var" in name:
            value.copy_(1 + noise.abs())
        elif "bn" in name or "downsample.1" in name or "norm" in name or value.dim() == 1:
            value.add_(0.1 * noise)
        elif "backbone" not in name:
            value.copy_(noise / value[0].numel() ** 0.5)
    if hasattr(model.model, "enc_output"):
        # What an unusable pixel scores is one constant. Training makes it low; here it is, so that none is taken.
        constant = model.model.enc_output_norm(model.model.enc_output.bias)
        model.class_embed[-1].weight[0].sub_(constant * (5 / constant.square().sum()))


def batch():
    """Two images of odd sizes, padded, with two objects and one."""
    generator = torch.Generator().manual_seed(1)
    images = ImageBatch.stack([torch.randn(3, *size, generator=generator) for size in ((83, 150), (128, 97))], divisor=32)
    samples, labels = [], []
    for (height, width), boxes, classes in zip(images.sizes, ([(0.3, 0.4, 0.2, 0.5), (0.7, 0.6, 0.5, 0.3)], [(0.5, 0.5, 0.8, 0.6)]),
                                               ([0, 3], [4]), strict=True):
        boxes, classes = torch.tensor(boxes), torch.tensor(classes)
        sample = Sample(metainfo={"img_shape": (height, width), "ori_shape": (height, width), "scale_factor": (1.0, 1.0)})
        corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
        sample.gt_instances = InstanceData(bboxes=corners * torch.tensor([width, height, width, height]), labels=classes)
        samples.append(sample)
        labels.append({"class_labels": classes, "boxes": boxes})
    return images, samples, labels


def compare(variant, **sizes):
    torch.manual_seed(0)
    their_model, our_model = theirs(variant, **sizes), ours(variant, **sizes)
    randomise(their_model)
    our_model.load_state_dict(convert(their_model.state_dict(), our_model))
    images, samples, labels = batch()
    with torch.no_grad():
        found = their_model(images.tensor, pixel_mask=images.valid().long(), labels=labels)
        first_stage, layers = our_model(images)
        losses = our_model.loss(images, samples)
    logits, boxes = layers[-1]
    if first_stage is not None:                             # queries are in the order of their scores, where two may be all but equal
        order = torch.cdist(found.pred_boxes, boxes).argmin(-1, keepdim=True)
        logits, boxes = (values.gather(1, order.expand_as(values)) for values in (logits, boxes))
    differences = {"logits": (logits - found.logits).abs().max(), "boxes": (boxes - found.pred_boxes).abs().max()}
    proposal_loss = sum(value for key, value in losses.items() if key.endswith("_proposal"))
    differences["loss"] = (sum(losses.values()) - proposal_loss - found.loss).abs() / found.loss
    if first_stage is not None:
        # HF's loss leaves the first stage out; this is what its own terms make of it.
        from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

        criterion = DeformableDetrImageLoss(DeformableDetrHungarianMatcher(1, 5, 2), sizes["num_classes"], 0.25, ["labels", "boxes"])
        coarse = {"logits": found.enc_outputs_class, "pred_boxes": found.enc_outputs_coord_logits.sigmoid()}
        terms = criterion(coarse, [{**label, "class_labels": torch.zeros_like(label["class_labels"])} for label in labels])
        expected = terms["loss_ce"] + 5 * terms["loss_bbox"] + 2 * terms["loss_giou"]
        differences["proposal logits"] = (first_stage.logits - coarse["logits"]).abs().max()
        differences["proposal boxes"] = (first_stage.boxes - coarse["pred_boxes"]).abs().max()
        differences["proposal loss"] = (proposal_loss - expected).abs() / expected
    return {name: value.item() for name, value in differences.items()}


SMALL = {"depth": 18, "channels": 64, "feedforward": 96, "layers": 2, "queries": 12, "num_classes": 5, "levels": 4}
PUBLISHED = {"depth": 50, "channels": 256, "feedforward": 1024, "layers": 6, "queries": 300, "num_classes": 91, "levels": 4}


@pytest.mark.parametrize("variant", [PLAIN, REFINE, TWO_STAGE], ids=["plain", "refine", "two stage"])
def test_it_computes_what_transformers_computes(variant):
    """Measured: logits within 2e-6, those of the first stage within 4e-6, boxes within 4e-7, losses within 2e-7 of their values."""
    differences = compare(variant, **SMALL)
    assert max(differences.values()) <= 1e-4, differences
    assert max(value for name, value in differences.items() if "loss" in name) <= 1e-5, differences


@pytest.mark.slow
@pytest.mark.parametrize("variant", [PLAIN, TWO_STAGE], ids=["plain", "two stage"])
def test_the_published_architecture_computes_what_transformers_computes(variant):
    """Measured: logits within 5e-6, boxes within 8e-7, losses within 3e-7 of their values."""
    differences = compare(variant, **PUBLISHED)
    assert max(differences.values()) <= 1e-4, differences
