"""Every format's key set becomes ours: each key once, each of our tensors filled, with values that compute the same."""
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from visionkit.engine.checkpoint import CheckpointError
from visionkit.engine.checkpoint_formats import CATEGORIES, FORMATS, BinByBin, ClassRows, Drop, PairsFromHalves, Request, Rule
from visionkit.engine.convert import Name, convert, plan, recognise
from visionkit.models.backbones import MoonViT, ResNet
from visionkit.models.necks import MLPProjector
from visionkit.registry import MODELS, ConfigError

torchvision = pytest.importorskip("torchvision", reason="most key sets here are torchvision's or begin with one: pip install torchvision")

D, HIDDEN, QUERIES, CLASSES = 32, 24, 7, 5
LAYERS = {"encoder_layers": 2, "decoder_layers": 3, "hidden_channels": HIDDEN, "num_heads": 4}


def state_of(parts):
    """One state dict of modules and tensors, each under its own prefix; no norm, bias or statistic in it is as it was made."""
    state = {}
    for prefix, part in parts.items():
        tensors = {"": part} if isinstance(part, torch.Tensor) else part.state_dict()
        state |= {f"{prefix}.{key}".strip("."): value for key, value in tensors.items()}
    for key, value in state.items():
        if value.ndim == 1:
            value.uniform_(0.5, 1.5) if key.endswith("running_var") else value.add_(torch.randn_like(value) * 0.1)
    return state


def check_account(state, done, model):
    """Each key of `state` was taken by one rule or left out for one reason, and each tensor of ours came from somewhere."""
    used = [key for keys in (*done.mapped.values(), *done.dropped.values()) for key in keys]
    assert sorted(used) == sorted(state)
    part = getattr(model, done.format.part, model) if done.format.part else model
    assert set(done.state_dict) == {name for name in part.state_dict() if not name.endswith("num_batches_tracked")}
    part.load_state_dict(done.state_dict)                                          # strictly
    return done


def close(ours, theirs):
    """Equal but for rounding, 1e-5 of the largest value."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


# -------------------------------------------------------------------------------------------------------------------- ResNets

def frozen_body(depth=18):
    """A ResNet as torchvision's detectors and the authors of DETR have it: without statistics to count and without classifier."""
    body = getattr(torchvision.models, f"resnet{depth}")(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    del body.fc
    return body


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize("depth", [18, 50])
def test_a_resnet_computes_the_same(library, depth):
    name = f"resnet{depth}"
    if library == "timm":
        theirs = pytest.importorskip("timm", reason="the ResNet to convert is timm's: pip install timm").create_model(name)
    else:
        theirs = getattr(torchvision.models, name)()
    state = state_of({"": theirs})
    detector = MODELS.build(faster_rcnn(num_classes=CLASSES, depth=depth))
    done = check_account(state, plan(state, detector), detector)
    assert done.name == "resnet"
    assert done.dropped["the classifier; a backbone has none"] == ["fc.weight", "fc.bias"]
    images = torch.randn(2, 3, 64, 96)
    layers = nn.Sequential(*[child for child in theirs.eval().children()][:-2])
    with torch.inference_mode():
        close(detector.backbone.eval()(images)[-1], layers(images))


def test_stages_that_are_not_built_are_left_out_and_blocks_that_do_not_fit_are_not():
    state = torchvision.models.resnet34().state_dict()
    short = ResNet(34, out_stages=(2, 3))
    done = plan(state, short)
    short.load_state_dict(done.state_dict)
    assert all(key.startswith(("layer3", "layer4")) for key in done.dropped["the config's backbone ends before this stage"])
    deeper = torchvision.models.resnet18().state_dict()
    deeper["layer3.2.conv1.weight"] = deeper["layer3.1.conv1.weight"]              # as ResNet-101 beside ResNet-50
    with pytest.raises(CheckpointError, match=r"not in the config's model \(1\):\n    layer3.2.conv1.weight"):
        plan(deeper, ResNet(18))


def test_offsets_of_deformable_convolutions_start_at_zero():
    ours = ResNet(18, dcn={"type": "DeformConv2dPack"}, stage_with_dcn=(False, False, False, True))
    done = plan(torchvision.models.resnet18().state_dict(), ours)
    ours.load_state_dict(done.state_dict)
    assert [len(names) for reason, names in done.added.items() if "offsets" in reason] == [4]
    assert not ours.layer4[0].conv2.conv_offset.weight.any()


# --------------------------------------------------------------------------------------------------------------- Faster R-CNN

class FixedPooling(nn.Module):
    """In place of RoI pooling, so that two heads are given the same features."""

    def __init__(self, pooled):
        super().__init__()
        self.pooled = pooled

    def forward(self, features, boxes):
        return self.pooled


def faster_rcnn(num_classes, depth=50):
    return {"type": "FasterRCNN", "backbone": {"type": "ResNet", "depth": depth, "norm": "FrozenBN"},
            "neck": {"type": "FPN", "num_levels": 5}, "rpn": {"type": "RPN"}, "roi": {"type": "RoIBoxHead", "num_classes": num_classes}}


@pytest.fixture(scope="module")
def torchvision_faster_rcnn():
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    state_of({"": model})
    return model


@pytest.mark.parametrize("classes, kept", [("coco80", CATEGORIES["coco80"]), (None, range(1, 91))])
def test_torchvisions_faster_rcnn_computes_the_same(torchvision_faster_rcnn, classes, kept):
    theirs, kept = torchvision_faster_rcnn, list(kept)
    state = theirs.state_dict()
    ours = MODELS.build(faster_rcnn(num_classes=len(kept))).eval()
    done = check_account(state, plan(state, ours, classes=classes), ours)
    assert done.name == "torchvision-faster-rcnn"
    images, pooled = torch.randn(1, 3, 64, 96), torch.rand(2, 256, 7, 7)
    ours.roi.pooling = FixedPooling(pooled)
    with torch.inference_mode():
        pyramid = list(theirs.backbone(images).values())
        for mine, their in zip(ours.neck(ours.backbone(images)), pyramid, strict=True):
            close(mine, their)
        logits, deltas = theirs.rpn.head(pyramid)
        objectness = ours.rpn(pyramid)
        for level in range(5):
            close(objectness.logits[level], logits[level].permute(0, 2, 3, 1).flatten(1))
            anchors = deltas[level].permute(0, 2, 3, 1).reshape(1, -1, 4)
            close(objectness.deltas[level], anchors)
        scores, boxes = theirs.roi_heads.box_predictor(theirs.roi_heads.box_head(pooled))
        mine = ours.roi(pyramid, [torch.zeros(2, 4)])
    close(mine[0], scores[:, [*kept, 0]])
    close(mine[1], boxes.view(2, 91, 4)[:, kept])


def test_the_names_of_torchvisions_published_file_are_known_too(torchvision_faster_rcnn):
    state = torchvision_faster_rcnn.state_dict()
    published = {key.replace("rpn.head.conv.0.0.", "rpn.head.conv.").replace("blocks.0.0.", "blocks.0.").replace("blocks.1.0.", "blocks.1.")
                 .replace("blocks.2.0.", "blocks.2.").replace("blocks.3.0.", "blocks.3."): value for key, value in state.items()}
    assert set(published) != set(state)
    ours = MODELS.build(faster_rcnn(num_classes=90))
    older, newer = convert(published, ours), convert(state, ours)
    assert all(torch.equal(older[name], newer[name]) for name in newer)


def mmdet_faster_rcnn(shared_fc):
    """MMDetection's key set, written down; its backbone, with counters, has the names of torchvision's."""
    backbone = torchvision.models.resnet18()
    del backbone.fc
    return state_of({
        "backbone": backbone,
        **{f"neck.lateral_convs.{index}.conv": nn.Conv2d(channels, 256, 1) for index, channels in enumerate((64, 128, 256, 512))},
        **{f"neck.fpn_convs.{index}.conv": nn.Conv2d(256, 256, 3) for index in range(4)},
        "rpn_head.rpn_conv": nn.Conv2d(256, 256, 3), "rpn_head.rpn_cls": nn.Conv2d(256, 3, 1), "rpn_head.rpn_reg": nn.Conv2d(256, 12, 1),
        "roi_head.bbox_head.shared_fcs.0": shared_fc, "roi_head.bbox_head.shared_fcs.1": nn.Linear(1024, 1024),
        "roi_head.bbox_head.fc_cls": nn.Linear(1024, CLASSES + 1), "roi_head.bbox_head.fc_reg": nn.Linear(1024, CLASSES * 4)})


def test_mmdetections_faster_rcnn_fills_ours():
    shared_fc = nn.Linear(256 * 49, 1024)
    state = mmdet_faster_rcnn(shared_fc)
    ours = MODELS.build(faster_rcnn(CLASSES, depth=18))
    done = check_account(state, plan(state, ours), ours)
    assert done.name == "mmdet-faster-rcnn"
    assert list(done.dropped) == ["counts batches for averaging without momentum, which is not done here"]
    pooled = torch.rand(2, 256, 7, 7)
    expected = shared_fc(pooled.flatten(1))                                        # channel by channel, as MMDetection flattens
    close(ours.roi.hidden[0](pooled.permute(0, 2, 3, 1).flatten(1)), expected)
    for mine, theirs in (("rpn.classify.weight", "rpn_head.rpn_cls.weight"), ("roi.classify.bias", "roi_head.bbox_head.fc_cls.bias"),
                         ("roi.regress.weight", "roi_head.bbox_head.fc_reg.weight"),
                         ("neck.lateral.2.bias", "neck.lateral_convs.2.conv.bias"),
                         ("neck.output.3.weight", "neck.fpn_convs.3.conv.weight"), ("backbone.layer4.1.bn2.running_var",) * 2):
        assert torch.equal(done.state_dict[mine], state[theirs])


# ----------------------------------------------------------------------------------------------------------------------- DETR

class TheirDETR:
    """The modules of a DETR, with torch's own transformer layers; forward without positions and padding."""

    def __init__(self, depth=18, encoder_layers=2, decoder_layers=3, rows=CLASSES + 1):
        self.body = frozen_body(depth)
        self.project = nn.Conv2d(512 if depth < 50 else 2048, D, 1)
        self.queries = nn.Embedding(QUERIES, D)
        self.encoder = [nn.TransformerEncoderLayer(D, 4, HIDDEN, 0.0, batch_first=True) for _ in range(encoder_layers)]
        self.decoder = [nn.TransformerDecoderLayer(D, 4, HIDDEN, 0.0, batch_first=True) for _ in range(decoder_layers)]
        self.norm = nn.LayerNorm(D)
        self.classify = nn.Linear(D, rows)
        self.regress = [nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 4)]

    def transform(self, tokens, queries):
        for layer in self.encoder:
            tokens = layer(tokens)
        outputs = []
        for layer in self.decoder:
            queries = layer(queries, tokens)
            outputs.append(self.norm(queries))
        return outputs

    def official(self):
        """Under the authors' names, which are those of torch's layers."""
        return {"backbone.0.body": self.body, "input_proj": self.project, "query_embed": self.queries,
                **{f"transformer.encoder.layers.{index}": layer for index, layer in enumerate(self.encoder)},
                **{f"transformer.decoder.layers.{index}": layer for index, layer in enumerate(self.decoder)},
                "transformer.decoder.norm": self.norm, "class_embed": self.classify,
                **{f"bbox_embed.layers.{index}": layer for index, layer in enumerate(self.regress)}}

    def mmdet(self):
        """Under MMDetection's names, written down."""
        parts = {"backbone": self.body, "neck.convs.0.conv": self.project, "query_embedding": self.queries,
                 "decoder.post_norm": self.norm, "bbox_head.fc_cls": self.classify, "bbox_head.reg_ffn.layers.0.0": self.regress[0],
                 "bbox_head.reg_ffn.layers.1": self.regress[1], "bbox_head.fc_reg": self.regress[2]}
        for index, layer in enumerate(self.encoder):
            parts |= {f"encoder.layers.{index}.{name}": part for name, part in {
                "self_attn.attn": layer.self_attn, "ffn.layers.0.0": layer.linear1, "ffn.layers.1": layer.linear2,
                "norms.0": layer.norm1, "norms.1": layer.norm2}.items()}
        for index, layer in enumerate(self.decoder):
            parts |= {f"decoder.layers.{index}.{name}": part for name, part in {
                "self_attn.attn": layer.self_attn, "cross_attn.attn": layer.multihead_attn, "ffn.layers.0.0": layer.linear1,
                "ffn.layers.1": layer.linear2, "norms.0": layer.norm1, "norms.1": layer.norm2, "norms.2": layer.norm3}.items()}
        return parts


def mask_head(finer):
    """What panoptic DETR adds, under its authors' names; `finer` channels of the backbone's stages, coarsest first."""
    wide = D + 4
    widths = [wide, wide, D // 2, D // 4, D // 8, D // 16]
    return {"bbox_attention.q_linear": nn.Linear(D, D), "bbox_attention.k_linear": nn.Linear(D, D),
            **{f"mask_head.lay{index + 1}": nn.Conv2d(widths[index], widths[index + 1], 3) for index in range(5)},
            **{f"mask_head.gn{index + 1}": nn.GroupNorm(1, widths[index + 1]) for index in range(5)},
            **{f"mask_head.adapter{index + 1}": nn.Conv2d(finer[index], widths[index + 2], 1) for index in range(3)},
            "mask_head.out_lay": nn.Conv2d(widths[-1], 1, 3)}


def detr(name="DETR", depth=18, num_classes=CLASSES, **settings):
    stages = {"out_stages": (5,)} if name == "DETR" else {}
    return MODELS.build({"type": name, "backbone": {"type": "ResNet", "depth": depth, "norm": "FrozenBN", **stages}, "channels": D,
                         "num_classes": num_classes, "num_queries": QUERIES, **LAYERS, **settings})


@pytest.mark.parametrize("form", ["detr", "mmdet-detr"])
def test_detr_computes_the_same(form):
    torch.manual_seed(0)
    theirs = TheirDETR()
    state = state_of(theirs.official() if form == "detr" else theirs.mmdet())
    ours = detr().eval()
    done = check_account(state, plan(state, ours), ours)
    assert done.name == form
    images, tokens, queries = torch.randn(1, 3, 64, 96), torch.randn(2, 11, D), torch.randn(2, QUERIES, D)
    body = nn.Sequential(*list(theirs.body.children())[:-1]).eval()
    with torch.inference_mode():
        close(ours.project(ours.backbone(images)[-1]), theirs.project(body(images)))
        for mine, their in zip(ours.transformer(tokens, queries)[0], theirs.transform(tokens, queries), strict=True):
            close(mine, their)                                                     # measured: 7e-7
        close(ours.classify(tokens), theirs.classify(tokens))
        close(ours.regress(tokens), theirs.regress[2](theirs.regress[1](theirs.regress[0](tokens).relu()).relu()))
    assert torch.equal(ours.queries.weight, theirs.queries.weight)


def test_the_authors_files_have_as_many_tensors_as_published():
    """Spec 11, item 1: 458 tensors, 490 with masks, each of which is ours under one name."""
    theirs = TheirDETR(depth=50, encoder_layers=6, decoder_layers=6, rows=92)
    state = state_of(theirs.official())
    assert len(state) == 458
    ours = detr(depth=50, num_classes=91, encoder_layers=6, decoder_layers=6)
    check_account(state, plan(state, ours), ours)
    panoptic = state_of({f"detr.{name}": part for name, part in theirs.official().items()} | mask_head((1024, 512, 256)))
    assert len(panoptic) == 490
    ours = detr("DetrPanoptic", depth=50, num_classes=91, num_things=80, encoder_layers=6, decoder_layers=6)
    done = check_account(panoptic, plan(panoptic, ours), ours)
    assert done.name == "detr-panoptic"
    for mine, their in (("mask_attention.key.bias", "bbox_attention.k_linear.bias"), ("mask_head.convs.4.weight", "mask_head.lay5.weight"),
                        ("mask_head.norms.1.bias", "mask_head.gn2.bias"), ("mask_head.adapters.2.weight", "mask_head.adapter3.weight")):
        assert torch.equal(done.state_dict[mine], panoptic[their])


def test_the_masks_of_a_panoptic_checkpoint_are_left_out_where_the_model_has_none():
    state = state_of({f"detr.{name}": part for name, part in TheirDETR().official().items()} | mask_head((256, 128, 64)))
    done = check_account(state, plan(state, ours := detr()), ours)
    assert len(done.dropped["the config's model has no masks"]) == 32


def test_learned_positions_and_pre_norm_are_part_of_detr():
    state = state_of(TheirDETR().official() | {"backbone.1.row_embed": nn.Embedding(50, D // 2),
                                               "backbone.1.col_embed": nn.Embedding(50, D // 2),
                                               "transformer.encoder.norm": nn.LayerNorm(D)})
    ours = detr(position="learned", pre_norm=True)
    check_account(state, plan(state, ours), ours)
    assert torch.equal(ours.position.rows.weight, state["backbone.1.row_embed.weight"])


# ------------------------------------------------------------------------------------------------------------ Deformable DETR

VARIANTS = {"plain": {}, "refine": {"with_box_refine": True}, "two stage": {"with_box_refine": True, "two_stage": True}}


def deformable_detr(num_classes=CLASSES, **settings):
    return MODELS.build({"type": "DeformableDETR", "backbone": {"type": "ResNet", "depth": 18, "norm": "FrozenBN", "out_stages": (3, 4, 5)},
                         "neck": {"type": "ChannelMapper", "out_channels": D, "num_levels": 4}, "num_classes": num_classes,
                         "num_queries": QUERIES, "num_points": 2, **LAYERS, **settings})


class TheirDeformableDETR:
    """The modules of a Deformable DETR."""

    def __init__(self, with_box_refine=False, two_stage=False, neck_bias=True):
        self.body = frozen_body()
        channels = {"lateral": (128, 256, 512), "extra": (512,)}
        self.neck = {kind: [(nn.Conv2d(width, D, 1 if kind == "lateral" else 3, bias=neck_bias), nn.GroupNorm(32, D)) for width in widths]
                     for kind, widths in channels.items()}
        self.levels = torch.randn(4, D)
        self.encoder = [{"attention": self._attention(), "layer": nn.TransformerEncoderLayer(D, 4, HIDDEN, 0.0)} for _ in range(2)]
        self.decoder = [{"attention": self._attention(), "layer": nn.TransformerDecoderLayer(D, 4, HIDDEN, 0.0)} for _ in range(3)]
        self.two_stage, self.with_box_refine = two_stage, with_box_refine
        self.first = {"features": nn.Linear(D, D), "features_norm": nn.LayerNorm(D), "query": nn.Linear(2 * D, 2 * D),
                      "query_norm": nn.LayerNorm(2 * D)} if two_stage else {}
        self.queries = {} if two_stage else {"queries": nn.Embedding(QUERIES, 2 * D), "reference": nn.Linear(D, 2)}
        heads = [(nn.Linear(D, CLASSES), [nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 4)])
                 for _ in range(3 + two_stage if with_box_refine else 1)]
        self.heads = heads if with_box_refine else heads * 3

    @staticmethod
    def _attention():
        return {"sampling_offsets": nn.Linear(D, 4 * 4 * 2 * 2), "attention_weights": nn.Linear(D, 4 * 4 * 2),
                "value_proj": nn.Linear(D, D), "output_proj": nn.Linear(D, D)}

    def official(self):
        parts = {"backbone.0.body": self.body, "transformer.level_embed": self.levels}
        for level, (conv, norm) in enumerate(self.neck["lateral"] + self.neck["extra"]):
            parts |= {f"input_proj.{level}.0": conv, f"input_proj.{level}.1": norm}
        for index, layer in enumerate(self.encoder):
            parts |= {f"transformer.encoder.layers.{index}.self_attn.{name}": part for name, part in layer["attention"].items()}
            parts |= {f"transformer.encoder.layers.{index}.{name}": getattr(layer["layer"], name)
                      for name in ("norm1", "norm2", "linear1", "linear2")}
        for index, layer in enumerate(self.decoder):
            parts |= {f"transformer.decoder.layers.{index}.cross_attn.{name}": part for name, part in layer["attention"].items()}
            module = layer["layer"]                                    # of torch, whose norm1 is that of the self-attention
            parts |= {f"transformer.decoder.layers.{index}.{name}": part for name, part in {
                "self_attn": module.self_attn, "norm2": module.norm1, "norm1": module.norm2, "norm3": module.norm3,
                "linear1": module.linear1, "linear2": module.linear2}.items()}
        names = {"features": "enc_output", "features_norm": "enc_output_norm", "query": "pos_trans", "query_norm": "pos_trans_norm"}
        parts |= {f"transformer.{names[name]}": part for name, part in self.first.items()}
        names = {"queries": "query_embed", "reference": "transformer.reference_points"}
        parts |= {names[name]: part for name, part in self.queries.items()}
        for prefix in ("", *["transformer.decoder."] * self.with_box_refine):      # the decoder holds its heads too where it refines
            for index, (classify, regress) in enumerate(self.heads):
                parts |= {f"{prefix}bbox_embed.{index}.layers.{number}": part for number, part in enumerate(regress)}
                if not prefix or self.two_stage:
                    parts |= {f"{prefix}class_embed.{index}": classify}
        return parts

    def mmdet(self):
        parts = {"backbone": self.body, "level_embed": self.levels}
        for kind, name in (("lateral", "convs"), ("extra", "extra_convs")):
            for index, (conv, norm) in enumerate(self.neck[kind]):
                parts |= {f"neck.{name}.{index}.conv": conv, f"neck.{name}.{index}.gn": norm}
        for index, layer in enumerate(self.encoder):
            module = layer["layer"]
            parts |= {f"encoder.layers.{index}.self_attn.{name}": part for name, part in layer["attention"].items()}
            parts |= {f"encoder.layers.{index}.{name}": part for name, part in {
                "ffn.layers.0.0": module.linear1, "ffn.layers.1": module.linear2, "norms.0": module.norm1, "norms.1": module.norm2}.items()}
        for index, layer in enumerate(self.decoder):
            module = layer["layer"]
            parts |= {f"decoder.layers.{index}.cross_attn.{name}": part for name, part in layer["attention"].items()}
            parts |= {f"decoder.layers.{index}.{name}": part for name, part in {
                "self_attn.attn": module.self_attn, "ffn.layers.0.0": module.linear1, "ffn.layers.1": module.linear2,
                "norms.0": module.norm1, "norms.1": module.norm2, "norms.2": module.norm3}.items()}
        names = {"features": "memory_trans_fc", "features_norm": "memory_trans_norm", "query": "pos_trans_fc",
                 "query_norm": "pos_trans_norm", "queries": "query_embedding", "reference": "reference_points_fc"}
        parts |= {names[name]: part for name, part in (self.first | self.queries).items()}
        for index, (classify, regress) in enumerate(self.heads):
            parts |= {f"bbox_head.cls_branches.{index}": classify}
            parts |= {f"bbox_head.reg_branches.{index}.{2 * number}": part for number, part in enumerate(regress)}
        return parts


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["deformable-detr", "mmdet-deformable-detr"])
def test_deformable_detr_gets_every_module_where_it_belongs(form, variant):
    torch.manual_seed(0)
    theirs = TheirDeformableDETR(**VARIANTS[variant], neck_bias=form == "deformable-detr")
    state = state_of(theirs.official() if form == "deformable-detr" else theirs.mmdet())
    ours = deformable_detr(**VARIANTS[variant]).eval()
    done = check_account(state, plan(state, ours), ours)
    assert done.name == form
    features, tokens, queries = torch.randn(1, 128, 4, 6), torch.randn(2, 11, D), torch.randn(2, QUERIES, D)
    with torch.inference_mode():
        conv, norm = theirs.neck["lateral"][0]
        close(ours.neck.lateral[0](features), norm(conv(features)))
        for mine, their in zip([*ours.encoder, *ours.decoder], [*theirs.encoder, *theirs.decoder], strict=True):
            reads = mine.attention if hasattr(mine, "attention") else mine.cross_attention
            for name, part in their["attention"].items():
                close(getattr(reads, name.removesuffix("_proj"))(tokens), part(tokens))
            close(mine.feed_forward(tokens), their["layer"].linear2(their["layer"].linear1(tokens).relu()))
        for mine, their in zip(ours.encoder, theirs.encoder, strict=True):
            close(mine.attention_norm(tokens), their["layer"].norm1(tokens))
            close(mine.feed_forward_norm(tokens), their["layer"].norm2(tokens))
        for mine, their in zip(ours.decoder, theirs.decoder, strict=True):
            layer = their["layer"]
            expected = layer.self_attn.eval()(queries.transpose(0, 1), queries.transpose(0, 1), queries.transpose(0, 1))[0].transpose(0, 1)
            close(mine.self_attention(queries, queries, queries), expected)
            for norm, expected in ((mine.self_attention_norm, layer.norm1), (mine.cross_attention_norm, layer.norm2),
                                   (mine.feed_forward_norm, layer.norm3)):
                close(norm(queries), expected(queries))
        for classify, regress, (scores, boxes) in zip(ours.classify, ours.regress, theirs.heads, strict=True):
            close(classify(tokens), scores(tokens))
            close(regress(tokens), boxes[2](boxes[1](boxes[0](tokens).relu()).relu()))
        if theirs.two_stage:
            close(ours.proposal_features(tokens), theirs.first["features_norm"](theirs.first["features"](tokens)))
            wide = torch.randn(2, 2 * D)
            close(ours.proposal_query(wide), theirs.first["query_norm"](theirs.first["query"](wide)))
        else:
            close(ours.reference_points(tokens), theirs.queries["reference"](tokens))
            assert torch.equal(ours.queries.weight, theirs.queries["queries"].weight)
    assert torch.equal(ours.level_embedding, theirs.levels)


def test_heads_of_their_own_do_not_fit_a_model_that_shares_one():
    state = state_of(TheirDeformableDETR(with_box_refine=True).mmdet() | {"neck.convs.0.conv": nn.Conv2d(128, D, 1)})
    with pytest.raises(CheckpointError, match=r"classify.1.weight and classify.0.weight, which are one tensor in the model"):
        plan(state, deformable_detr())


def test_two_keys_for_one_tensor_have_to_agree():
    state = state_of(TheirDeformableDETR(with_box_refine=True).official())
    state["transformer.decoder.bbox_embed.1.layers.0.bias"] = torch.zeros(D)
    with pytest.raises(CheckpointError, match=r"different values \(1\):\n    regress.1.layers.0.bias \(from transformer.decoder"):
        plan(state, deformable_detr(with_box_refine=True))


# --------------------------------------------------------------------------------------------------------------- transformers

def hugging_face(kind, tmp_path, **settings):
    """A model of transformers: its tensors as they are named in memory, and in a file that it saved."""
    transformers = pytest.importorskip("transformers", reason="the key sets are those of transformers: pip install 'transformers>=5'")
    pytest.importorskip("timm", reason="the backbone of transformers' DETR is timm's: pip install timm")
    from safetensors.torch import load_file
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder")
             for name, value in (("layers", LAYERS[f"{side}_layers"]), ("attention_heads", 4), ("ffn_dim", HIDDEN))}
    config = "DetrConfig" if kind.startswith("DetrFor") else "DeformableDetrConfig"
    config = getattr(transformers, config)(**{"backbone": "resnet18", "num_labels": CLASSES, "num_queries": QUERIES, "d_model": D, **sizes,
                                             **settings})
    model = getattr(transformers, kind)(config)
    model.save_pretrained(tmp_path)
    return model.state_dict(), load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("panoptic", [False, True], ids=["detection", "panoptic"])
def test_transformers_detr_fills_ours_from_memory_and_from_a_file(panoptic, tmp_path):
    channels = 64 if panoptic else D
    memory, file = hugging_face("DetrForSegmentation" if panoptic else "DetrForObjectDetection", tmp_path, d_model=channels,
                                encoder_attention_heads=8, decoder_attention_heads=8)
    ours = detr("DetrPanoptic" if panoptic else "DETR", channels=channels, **({"num_things": 3, "num_heads": 8} if panoptic else {}))
    assert set(memory) != set(file)
    of_memory, of_file = (check_account(state, plan(state, ours), ours) for state in (memory, file))
    assert of_memory.name == of_file.name == ("hf-detr-panoptic" if panoptic else "hf-detr")
    assert all(torch.equal(value, of_file.state_dict[name]) for name, value in of_memory.state_dict.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_deformable_detr_fills_ours_from_memory_and_from_a_file(variant, tmp_path):
    points = {"encoder_n_points": 2, "decoder_n_points": 2}
    memory, file = hugging_face("DeformableDetrForObjectDetection", tmp_path, **VARIANTS[variant], **points)
    ours = deformable_detr(**VARIANTS[variant])
    of_memory, of_file = (check_account(state, plan(state, ours), ours) for state in (memory, file))
    assert of_memory.name == of_file.name == "hf-deformable-detr"
    assert all(torch.equal(value, of_file.state_dict[name]) for name, value in of_memory.state_dict.items())
    if variant == "refine":                                                        # transformers 5 shares this variant's class heads
        assert of_file.added == {"repeated: transformers saves once what its layers share": [
            f"classify.{layer}.{name}" for layer in (1, 2) for name in ("weight", "bias")]}


def test_a_head_is_repeated_only_where_the_file_has_no_other(tmp_path):
    _, file = hugging_face("DeformableDetrForObjectDetection", tmp_path, with_box_refine=True, encoder_n_points=2, decoder_n_points=2)
    file["class_embed.1.weight"] = torch.zeros(CLASSES, D)
    with pytest.raises(CheckpointError, match=r"not in the checkpoint \(3\):\n    classify.1.bias\n    classify.2.weight"):
        plan(file, deformable_detr(with_box_refine=True))


# -------------------------------------------------------------------------------------------------------------------- MoonViT

def official_moonvit(prefix=""):
    """The authors' key set, written down: D channels, two blocks, a table of 4 x 4."""
    parts = {"patch_embed.proj": nn.Conv2d(3, D, 14), "patch_embed.pos_emb.weight": torch.randn(4, 4, D),
             "encoder.final_layernorm": nn.LayerNorm(D)}
    for index in range(2):
        parts |= {f"encoder.blocks.{index}.{name}": part for name, part in {
            "norm0": nn.LayerNorm(D), "norm1": nn.LayerNorm(D), "wqkv": nn.Linear(D, 3 * D), "wo": nn.Linear(D, D),
            "mlp.fc0": nn.Linear(D, HIDDEN), "mlp.fc1": nn.Linear(HIDDEN, D)}.items()}
    return {f"{prefix}{name}": part for name, part in parts.items()}


def kimi_vl(projector="multi_modal_projector", linears=("linear_1", "linear_2")):
    return state_of({**official_moonvit("vision_tower."), f"{projector}.pre_norm": nn.LayerNorm(D),
                     f"{projector}.{linears[0]}": nn.Linear(4 * D, 4 * D), f"{projector}.{linears[1]}": nn.Linear(4 * D, 10),
                     "language_model.model.norm": nn.LayerNorm(10), "language_model.lm_head": nn.Linear(10, 7, bias=False)})


def moonvit_and_projector():
    backbone = MoonViT(channels=D, num_layers=2, num_heads=4, hidden_channels=HIDDEN, position_grid=(4, 4))
    return nn.ModuleDict({"backbone": backbone, "neck": MLPProjector(backbone.out_channels, backbone.strides, 10)})


def test_the_authors_moonvit_fills_ours():
    """What it computes then is compared in tests/models/backbones/test_moonvit_against_transformers.py."""
    state = state_of(official_moonvit())
    ours = moonvit_and_projector()["backbone"]
    done = check_account(state, plan(state, ours), ours)
    assert done.name == "moonvit"
    for mine, theirs in (("positions", "patch_embed.pos_emb.weight"), ("encoder.norm.bias", "encoder.final_layernorm.bias"),
                         ("encoder.blocks.1.attention.qkv.weight", "encoder.blocks.1.wqkv.weight"),
                         ("encoder.blocks.0.attention.output.bias", "encoder.blocks.0.wo.bias"),
                         ("encoder.blocks.0.attention_norm.bias", "encoder.blocks.0.norm0.bias"),
                         ("encoder.blocks.0.feed_forward_norm.bias", "encoder.blocks.0.norm1.bias"),
                         ("encoder.blocks.1.feed_forward.linear2.weight", "encoder.blocks.1.mlp.fc1.weight")):
        assert torch.equal(done.state_dict[mine], state[theirs])


@pytest.mark.parametrize("form, state", [("kimi-vl", kimi_vl()), ("kimi-k25", kimi_vl("mm_projector", ("proj.0", "proj.2")))])
def test_kimis_encoder_and_projector_fill_ours_or_the_encoder_alone(form, state):
    ours = moonvit_and_projector()
    done = check_account(state, plan(state, ours), ours)
    assert done.name == form
    assert done.dropped["of the language model, which the config's model does not have"] == [
        "language_model.model.norm.weight", "language_model.model.norm.bias", "language_model.lm_head.weight"]
    second = [key for key in state if key.endswith(("linear_2.weight", "proj.2.weight"))]
    assert torch.equal(done.state_dict["neck.linear2.weight"], state[second[0]])
    encoder = plan(state, ours, "moonvit").state_dict
    assert all(torch.equal(value, done.state_dict[f"backbone.{name}"]) for name, value in encoder.items())


def test_rows_of_two_heads_go_from_halves_to_pairs():
    """Two heads of four channels: 0 with 2 and 1 with 3 before, 0 with 1 and 2 with 3 after; values stay."""
    model = nn.Module()
    model.num_heads = 2
    rows = torch.arange(24)
    assert PairsFromHalves("num_heads")(rows, Request({}, None, model)).tolist() == [
        0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15, *range(16, 24)]


def test_tensors_that_are_put_together_have_to_be_all_there_and_alike():
    keys = {f"{part}.layers.0.attn.{name}_proj.weight": torch.randn(D, D) for part in ("model.vision_tower",) for name in "qkv"}
    ours = moonvit_and_projector()
    with pytest.raises(CheckpointError, match=r"attention.qkv.weight is put together from 3 tensors, and there is only model.vision_tower"):
        plan(dict(list(keys.items())[:2]), ours, "hf-kimi-k25")
    keys["model.vision_tower.layers.0.attn.k_proj.weight"] = torch.randn(D, D + 1)
    with pytest.raises(CheckpointError, match=r"attention.qkv.weight <- .*k_proj.weight \[32, 33\], model.vision"):
        plan(keys, ours, "hf-kimi-k25")


# -------------------------------------------------------------------------------------------------------------------- classes

def test_coco80_are_the_categories_that_torchvision_names():
    names = torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
    assert CATEGORIES["coco80"] == tuple(index for index, name in enumerate(names) if name not in ("__background__", "N/A"))


def test_coco133_are_the_categories_of_the_panoptic_annotations():
    file = Path(os.environ.get("VISIONKIT_DATA", ""), "coco_panoptic", "panoptic_coco_categories.json")
    assert len(CATEGORIES["coco133"]) == 133
    if not file.is_file():
        pytest.skip("needs data/coco_panoptic; VISIONKIT_DATA names the folder that holds it")
    categories = json.loads(file.read_text())
    assert CATEGORIES["coco133"] == tuple(category["id"] for category in categories)
    assert [category["isthing"] for category in categories] == [1] * 80 + [0] * 53         # things first, as DetrPanoptic counts


def test_a_detr_of_91_classes_becomes_one_of_80_or_stays():
    torch.manual_seed(0)
    state = state_of(TheirDETR(rows=92).official())
    chosen = convert(state, detr(num_classes=80), classes="coco80")
    assert torch.equal(chosen["classify.weight"], state["class_embed.weight"][[*CATEGORIES["coco80"], 91]])
    assert chosen["classify.bias"][11] == state["class_embed.bias"][13]                    # the 12th class, stop sign, is category 13
    assert torch.equal(convert(state, detr(num_classes=91))["classify.bias"], state["class_embed.bias"])
    with pytest.raises(CheckpointError, match=r"(?s)classify.weight \[81, 32\] <- class_embed.weight \[92, 32\].*--classes \(coco80"):
        plan(state, detr(num_classes=80))
    with pytest.raises(CheckpointError, match="the classes asked for go up to number 200, and there are rows up to 90"):
        plan(state, detr(num_classes=133), classes="coco133")


def test_classes_are_refused_where_the_checkpoint_does_not_number_them_by_category():
    with pytest.raises(ConfigError, match="mmdet-detr have no rows by category number"):
        plan(state_of(TheirDETR().mmdet()), detr(), classes="coco80")
    with pytest.raises(ConfigError, match="no set of classes 'coco'. Did you mean 'coco80'"):
        plan(state_of(TheirDETR().official()), detr(), classes="coco")


@pytest.mark.parametrize("operation, expected", [
    (ClassRows("none"), [1, 3]), (ClassRows("last"), [1, 3, 5]), (ClassRows("first"), [1, 3, 0]),
    (ClassRows("first", keep_background=False), [1, 3]), (ClassRows("none", values=2), [2, 3]),
])
def test_rows_of_classes(operation, expected):
    categories = (1,) if operation.values > 1 else (1, 3)
    assert operation(torch.arange(6), Request({}, categories)).tolist() == expected


def test_columns_go_from_channel_by_channel_to_bin_by_bin():
    pooled = torch.randn(5, 2, 3, 3)
    weight = torch.randn(4, 18)
    moved = BinByBin("conv")(weight, Request({"conv": (7, 2, 3, 3)}, None))
    torch.testing.assert_close(pooled.permute(0, 2, 3, 1).flatten(1) @ moved.T, pooled.flatten(1) @ weight.T)


# --------------------------------------------------------------------------------------------------------------------- names

def test_names_stand_for_keys_with_numbers_choices_and_the_rest():
    name = Name.parse("a.{i}.{x,yy}.{p}")
    assert name.match("a.12.yy.bias") == ({"i": "12", "p": "bias"}, 1)
    assert name.match("a.12.z.bias") is None
    assert name.match("ba.12.x.bias") is None
    assert name.match("a.12.x.bias.c") is None
    assert Name.parse("b{i}_{p}.{s,t}").fill({"i": "12", "p": "bias"}, 1) == "b12_bias.t"
    assert Name.parse("a.{rest}").match("a.b.c") == ({"rest": "b.c"}, None)
    assert Name.parse("x{,_norm}").match("x_norm") == ({}, 1)


@pytest.mark.parametrize("form", FORMATS)
def test_the_tables_are_well_formed(form):
    for rule in FORMATS[form].rules:
        if isinstance(rule, Drop):
            assert rule.reason
        elif isinstance(rule, Rule):
            source, target = Name.parse(rule.source), Name.parse(rule.target)
            assert set(target.pattern.groupindex) - {"choice"} <= set(source.pattern.groupindex), rule
            assert not source.choice or not target.choice or len(source.choice) == len(target.choice), rule


def test_no_key_set_is_in_two_formats():
    states = [TheirDETR().official(), TheirDETR().mmdet(), TheirDeformableDETR().official(), TheirDeformableDETR().mmdet(),
              {f"detr.{name}": part for name, part in TheirDETR().official().items()} | mask_head((256, 128, 64))]
    states += [official_moonvit(), kimi_vl(), kimi_vl("mm_projector")]
    names = [recognise(state_of(state)) for state in states]                       # raises where there are two
    assert names == ["detr", "mmdet-detr", "deformable-detr", "mmdet-deformable-detr", "detr-panoptic", "moonvit", "kimi-vl", "kimi-k25"]


# -------------------------------------------------------------------------------------------------------------------- refusals

@pytest.fixture
def official():
    torch.manual_seed(0)
    return state_of(TheirDETR().official())


def test_a_key_outside_of_the_table_is_an_error_that_names_the_nearest_rule(official):
    official["transformer.encoder.layers.0.linear3.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"not in the format's table \(1\):\n    transformer.encoder.layers.0.linear3.weight "
                                              r"\(nearest rule: transformer.encoder.layers.\{i\}.linear\{1,2\}.\{p\}\)"):
        plan(official, detr())


def test_a_key_that_is_missing_is_an_error_that_names_ours(official):
    del official["transformer.decoder.layers.1.multihead_attn.in_proj_bias"]
    with pytest.raises(CheckpointError, match=r"(?s)in the model, and not in the checkpoint \(3\):\n"
                                              r"    transformer.decoder.layers.1.cross_attention.query.bias"):
        plan(official, detr())


def test_a_tensor_of_another_shape_is_an_error_that_names_both(official):
    official["query_embed.weight"] = torch.zeros(QUERIES + 1, D)
    with pytest.raises(CheckpointError, match=r"queries.weight \[7, 32\] <- query_embed.weight \[8, 32\]"):
        plan(official, detr())
    for size in ((7,), ()):
        official["transformer.encoder.layers.0.self_attn.in_proj_bias"] = torch.zeros(size)
        with pytest.raises(CheckpointError, match=r"self_attn.in_proj_bias \[7?\] is to be cut into 3 equal parts"):
            plan(official, detr())
    official["class_embed.bias"] = torch.tensor(1.0)
    with pytest.raises(CheckpointError, match=r"classify.bias \[6\] <- class_embed.bias \[\]: "):
        plan(official, detr())


def test_quantised_weights_are_no_weights(official):
    official["query_embed.weight"] = torch.zeros(QUERIES, D, dtype=torch.int8)
    with pytest.raises(CheckpointError, match=r"queries.weight \[7, 32\] <- .* \[7, 32\]: torch.int8 is not for torch.float32"):
        plan(official, detr())


def test_another_model_is_told_from_the_one_that_is_wanted(official):
    with pytest.raises(CheckpointError, match=r"\(detr: DETR of its authors\) cannot become that of the config's DeformableDETR"):
        plan(official, deformable_detr())


def test_an_unknown_checkpoint_lists_what_is_known():
    with pytest.raises(CheckpointError, match=r"(?s)in no known format. Its first keys are alpha, beta.*detr: DETR of its authors"):
        plan({"beta": torch.zeros(1), "alpha": torch.zeros(1)}, nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="no checkpoint format 'dertr'. Did you mean 'detr'"):
        plan({}, nn.Linear(1, 1), "dertr")


def test_data_parallel_prefixes_and_half_precision_are_no_obstacle(official):
    state = {f"module.{key}": value.half() for key, value in official.items()}
    converted = convert(state, detr())
    assert {value.dtype for value in converted.values()} == {torch.float32}
    assert torch.equal(converted["queries.weight"], official["query_embed.weight"].half().float())
