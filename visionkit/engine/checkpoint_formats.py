"""Whose checkpoints can be converted, and what their keys are called here: tables, read by `visionkit.engine.convert`.

In the name of a key stand placeholders: `{i}` and `{j}` for numbers, `{p}` for `weight` or `bias`, `{rest}` for anything. One part of a
name may be a choice, `{a,b,c}`. With a choice on both sides the first becomes the first, and so on; with a choice in the target alone the
tensor is cut into as many equal parts, row by row; with a choice in the source alone the tensors are put together, row by row.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Request:
    """What an operation may want to know."""
    shapes: Mapping[str, tuple[int, ...]]   # of every tensor of our model, by name
    categories: Sequence[int] | None        # numbers of the classes to keep, in this order; None: all
    model: nn.Module | None = None          # ours, or the part that the checkpoint is of


Operation = Callable[[Tensor, Request], Tensor]


@dataclass(frozen=True)
class ClassRows:
    """Rows that belong to classes: those asked for, and background after them, as it stands here.

    Args:
        background: whether the source's first or last row is background, or `none` of them.
        keep_background: whether our model has a row for it.
        values: rows of each class.
    """
    background: str
    keep_background: bool = True
    values: int = 1

    def __str__(self) -> str:
        moved = {"first": "background moved last" if self.keep_background else "background taken out"}.get(self.background, "")
        return " and ".join(filter(None, ["rows of the classes", moved]))

    def __call__(self, tensor: Tensor, request: Request) -> Tensor:
        rows = tensor.unflatten(0, (-1, self.values))                       # [classes, values, ...]
        count = len(rows)
        first = 1 if self.background == "first" else 0                      # a category keeps its number where background is number 0
        beyond = count - 1 if self.background == "last" else count
        kept = list(request.categories if request.categories is not None else range(first, beyond))
        outside = [number for number in kept if not first <= number < beyond]
        if outside:
            raise ValueError(f"the classes asked for go up to number {max(outside)}, and there are rows up to {beyond - 1}")
        if self.background != "none" and self.keep_background:
            kept.append(0 if first else beyond)
        return rows[kept].flatten(0, 1)


@dataclass(frozen=True)
class BinByBin:
    """Columns of a layer on pooled features: from channel by channel, (c, h, w), to bin by bin, (h, w, c).

    Args:
        channels_of: our weight whose input has as many channels as the pooled features.
    """
    channels_of: str

    def __str__(self) -> str:
        return "columns from (c, h, w) to (h, w, c)"

    def __call__(self, tensor: Tensor, request: Request) -> Tensor:
        channels = request.shapes[self.channels_of][1]
        return tensor.unflatten(1, (channels, -1)).transpose(1, 2).flatten(1)


@dataclass(frozen=True)
class PairsFromHalves:
    """Rows that rotary positions turn, of queries and keys: from channel p together with p + D / 2 in a head of D channels, to channel 2p
    together with 2p + 1.

    Args:
        heads: where our model has their number.
        turned: of the equal parts that the rows consist of, which are turned.
    """
    heads: str
    turned: tuple[bool, ...] = (True, True, False)           # queries, keys, values

    def __str__(self) -> str:
        return "rows put together, those of q and k from halves to pairs"

    def __call__(self, tensor: Tensor, request: Request) -> Tensor:
        heads = attrgetter(self.heads)(request.model)
        return torch.cat([part.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if turned else part
                          for part, turned in zip(tensor.chunk(len(self.turned)), self.turned, strict=True)])


@dataclass(frozen=True)
class Rule:
    """One name there, one name here.

    Args:
        source: name in the checkpoint.
        target: name in our model.
        operation: what is done to the tensor, if anything.
        unless_built: why it may be left out where our model has no name at all like the target, with the same choice.
    """
    source: str
    target: str
    operation: Operation | None = None
    unless_built: str = ""


@dataclass(frozen=True)
class Drop:
    """What is left out wherever it stands, and why."""
    source: str
    reason: str


@dataclass(frozen=True)
class Zeros:
    """What the checkpoint does not have because it is zero there, and why."""
    target: str
    reason: str


@dataclass(frozen=True)
class Repeat:
    """One tensor that several names here have, and the checkpoint once, and why.

    Args:
        target: names here; where the checkpoint gives any but `first`, nothing is repeated.
        first: the name that it is given under.
    """
    target: str
    first: str
    reason: str


@dataclass(frozen=True)
class Format:
    """The checkpoints of one project and model.

    Args:
        title: whose, for a reader.
        recognised_by: names of keys that are there, all of them, in no other format's checkpoints.
        rules: the first that fits a key is used.
        spellings: (other, own) pieces of keys, where the same project has two names for a thing; the rules have its own.
        part: the part of our model that the checkpoint is of; empty: the whole. The result is a checkpoint of that part.
        notes: what a table of keys cannot say.
    """
    title: str
    recognised_by: tuple[str, ...]
    rules: tuple[Rule | Drop | Zeros | Repeat, ...]
    spellings: tuple[tuple[str, str], ...] = ()
    part: str = ""
    notes: tuple[str, ...] = ()


# Category numbers of COCO 2017 in the order of its annotation files, which is that of the labels here.
_COCO_THINGS = tuple(sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}))
_COCO_STUFF = (92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145, 147, 148, 149, 151, 154, 155, 156,
               159, 161, 166, 168, 171, 175, 176, 177, 178, 180, 181, 184, 185, 186, 187, 188, 189, 190, 191, 192, 193, 194, 195, 196,
               197, 198, 199, 200)
CATEGORIES = {"coco80": _COCO_THINGS, "coco133": _COCO_THINGS + _COCO_STUFF}


_COUNTER = "counts batches for averaging without momentum, which is not done here"
_SHORTER = "the config's backbone ends before this stage"


def _resnet(source: str, target: str) -> tuple[Rule | Drop | Zeros, ...]:
    """A ResNet, whose parts have the same names in torchvision, timm, MMDetection and here."""
    return (
        Drop(f"{source}{{rest}}.num_batches_tracked", _COUNTER),
        Rule(f"{source}layer{{2,3,4}}.{{rest}}", f"{target}layer{{2,3,4}}.{{rest}}", unless_built=_SHORTER),
        Rule(f"{source}layer1.{{rest}}", f"{target}layer1.{{rest}}"),
        Rule(f"{source}{{conv1,bn1}}.{{rest}}", f"{target}{{conv1,bn1}}.{{rest}}"),
        Zeros(f"{target}{{rest}}.conv2.conv_offset.{{p}}", "offsets that do nothing until they are trained"),
    )


RESNET = Format(
    title="a ResNet of torchvision or timm",
    recognised_by=("conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight"),
    rules=(Drop("fc.{p}", "the classifier; a backbone has none"), *_resnet("", "")),
    part="backbone",
    notes=("Name the file in the config as model.backbone.pretrained. The image normalisation that goes with it is mean (123.675, 116.28, "
           "103.53) and standard deviation (58.395, 57.12, 57.375) in RGB; some of timm's models have others, as their cards tell.",),
)

TORCHVISION_FASTER_RCNN = Format(
    title="Faster R-CNN R50-FPN of torchvision, fasterrcnn_resnet50_fpn",
    recognised_by=("backbone.body.conv1.weight", "rpn.head.cls_logits.weight", "roi_heads.box_predictor.cls_score.weight"),
    rules=(
        *_resnet("backbone.body.", "backbone."),
        # The second spelling of each is that of files from before torchvision 0.13, the published weights among them.
        Rule("backbone.fpn.inner_blocks.{i}.0.{p}", "neck.lateral.{i}.{p}"),
        Rule("backbone.fpn.inner_blocks.{i}.{p}", "neck.lateral.{i}.{p}"),
        Rule("backbone.fpn.layer_blocks.{i}.0.{p}", "neck.output.{i}.{p}"),
        Rule("backbone.fpn.layer_blocks.{i}.{p}", "neck.output.{i}.{p}"),
        Rule("rpn.head.conv.0.0.{p}", "rpn.conv.{p}"),
        Rule("rpn.head.conv.{p}", "rpn.conv.{p}"),
        Rule("rpn.head.cls_logits.{p}", "rpn.classify.{p}"),
        Rule("rpn.head.bbox_pred.{p}", "rpn.regress.{p}"),
        Rule("roi_heads.box_head.fc6.weight", "roi.hidden.0.weight", BinByBin("rpn.conv.weight")),
        Rule("roi_heads.box_head.fc6.bias", "roi.hidden.0.bias"),
        Rule("roi_heads.box_head.fc7.{p}", "roi.hidden.1.{p}"),
        Rule("roi_heads.box_predictor.cls_score.{p}", "roi.classify.{p}", ClassRows("first")),
        Rule("roi_heads.box_predictor.bbox_pred.{p}", "roi.regress.{p}", ClassRows("first", keep_background=False, values=4)),
    ),
    notes=("torchvision pools half a pixel off, with roi_align(aligned=False), and rounds anchors to whole pixels; boxes differ by about "
           "a pixel until the model is trained a little further.",
           "torchvision's published detector has batch normalisation with eps 0 instead of 1e-5."),
)

_CHECK_PREPROCESSING = ("Look at data_preprocessor in the MMDetection config: models in caffe style have BGR images, other means, and the "
                        "stride in the first 1x1 convolution (ResNet(stride_in_1x1=True)), of which the keys say nothing.")

MMDET_FASTER_RCNN = Format(
    title="Faster R-CNN with FPN of MMDetection 3",
    recognised_by=("rpn_head.rpn_conv.weight", "roi_head.bbox_head.shared_fcs.0.weight", "neck.lateral_convs.0.conv.weight"),
    rules=(
        *_resnet("backbone.", "backbone."),
        Rule("neck.lateral_convs.{i}.conv.{p}", "neck.lateral.{i}.{p}"),
        Rule("neck.fpn_convs.{i}.conv.{p}", "neck.output.{i}.{p}"),
        Rule("rpn_head.rpn_{conv,cls,reg}.{p}", "rpn.{conv,classify,regress}.{p}"),
        Rule("roi_head.bbox_head.shared_fcs.0.weight", "roi.hidden.0.weight", BinByBin("rpn.conv.weight")),
        Rule("roi_head.bbox_head.shared_fcs.{i}.{p}", "roi.hidden.{i}.{p}"),
        Rule("roi_head.bbox_head.fc_{cls,reg}.{p}", "roi.{classify,regress}.{p}"),
    ),
    notes=(_CHECK_PREPROCESSING,
           "MMDetection takes more samples in larger bins, as roi.pooling with sampling_ratio=-1 does; here the default is 2 x 2."),
)


def _channel_mapper(source: str) -> tuple[Rule, ...]:
    """The projections of the backbone's three levels, and of a fourth made of the last."""
    return (Rule(f"{source}.{{0,1,2}}.{{j}}.{{p}}", "neck.lateral.{0,1,2}.{j}.{p}"),
            Rule(f"{source}.3.{{j}}.{{p}}", "neck.extra.0.{j}.{p}"))


def _deformable_attention(source: str, target: str) -> Rule:
    return Rule(f"{source}.{{sampling_offsets,attention_weights,value_proj,output_proj}}.{{p}}",
                f"{target}.{{sampling_offsets,attention_weights,value,output}}.{{p}}")


def _deformable_heads(prefix: str) -> tuple[Rule, ...]:
    """A class and a box head of each decoder layer; some variants have them a second time, within the decoder."""
    return (Rule(f"{prefix}class_embed.{{i}}.{{p}}", "classify.{i}.{p}", ClassRows("none")),
            Rule(f"{prefix}bbox_embed.{{i}}.layers.{{j}}.{{p}}", "regress.{i}.layers.{j}.{p}"))


DEFORMABLE_DETR = Format(
    title="Deformable DETR of its authors, all three variants",
    recognised_by=("transformer.level_embed", "transformer.encoder.layers.0.self_attn.sampling_offsets.weight", "class_embed.0.weight"),
    rules=(
        *_resnet("backbone.0.body.", "backbone."),
        *_channel_mapper("input_proj"),
        Rule("transformer.level_embed", "level_embedding"),
        Rule("query_embed.weight", "queries.weight"),
        Rule("transformer.reference_points.{p}", "reference_points.{p}"),
        Rule("transformer.enc_output{,_norm}.{p}", "proposal_features.{0,1}.{p}"),
        Rule("transformer.pos_trans{,_norm}.{p}", "proposal_query.{0,1}.{p}"),
        _deformable_attention("transformer.encoder.layers.{i}.self_attn", "encoder.{i}.attention"),
        Rule("transformer.encoder.layers.{i}.norm{1,2}.{p}", "encoder.{i}.{attention,feed_forward}_norm.{p}"),
        Rule("transformer.encoder.layers.{i}.linear{1,2}.{p}", "encoder.{i}.feed_forward.linear{1,2}.{p}"),
        Rule("transformer.decoder.layers.{i}.self_attn.in_proj_{p}", "decoder.{i}.self_attention.{query,key,value}.{p}"),
        Rule("transformer.decoder.layers.{i}.self_attn.out_proj.{p}", "decoder.{i}.self_attention.output.{p}"),
        _deformable_attention("transformer.decoder.layers.{i}.cross_attn", "decoder.{i}.cross_attention"),
        # norm1 follows the cross attention, although that comes second
        Rule("transformer.decoder.layers.{i}.norm{1,2,3}.{p}", "decoder.{i}.{cross_attention,self_attention,feed_forward}_norm.{p}"),
        Rule("transformer.decoder.layers.{i}.linear{1,2}.{p}", "decoder.{i}.feed_forward.linear{1,2}.{p}"),
        *_deformable_heads(""),
        *_deformable_heads("transformer.decoder."),
    ),
)


_DC5 = ("The keys of a DC5 model are those of the model without dilation: the config's backbone has to say which it is, with strides and "
        "dilations.")


def _detr(prefix: str) -> tuple[Rule | Drop | Zeros, ...]:
    """DETR as its authors name it."""
    encoder, decoder = f"{prefix}transformer.encoder.layers.{{i}}", f"{prefix}transformer.decoder.layers.{{i}}"
    return (
        *_resnet(f"{prefix}backbone.0.body.", "backbone."),
        Rule(f"{prefix}backbone.1.{{col,row}}_embed.weight", "position.{columns,rows}.weight"),
        Rule(f"{prefix}input_proj.{{p}}", "project.{p}"),
        Rule(f"{prefix}query_embed.weight", "queries.weight"),
        Rule(f"{encoder}.self_attn.in_proj_{{p}}", "transformer.encoder.layers.{i}.attention.{query,key,value}.{p}"),
        Rule(f"{encoder}.self_attn.out_proj.{{p}}", "transformer.encoder.layers.{i}.attention.output.{p}"),
        Rule(f"{encoder}.norm{{1,2}}.{{p}}", "transformer.encoder.layers.{i}.{attention,feed_forward}_norm.{p}"),
        Rule(f"{encoder}.linear{{1,2}}.{{p}}", "transformer.encoder.layers.{i}.feed_forward.linear{1,2}.{p}"),
        Rule(f"{decoder}.self_attn.in_proj_{{p}}", "transformer.decoder.layers.{i}.self_attention.{query,key,value}.{p}"),
        Rule(f"{decoder}.self_attn.out_proj.{{p}}", "transformer.decoder.layers.{i}.self_attention.output.{p}"),
        Rule(f"{decoder}.multihead_attn.in_proj_{{p}}", "transformer.decoder.layers.{i}.cross_attention.{query,key,value}.{p}"),
        Rule(f"{decoder}.multihead_attn.out_proj.{{p}}", "transformer.decoder.layers.{i}.cross_attention.output.{p}"),
        Rule(f"{decoder}.norm{{1,2,3}}.{{p}}", "transformer.decoder.layers.{i}.{self_attention,cross_attention,feed_forward}_norm.{p}"),
        Rule(f"{decoder}.linear{{1,2}}.{{p}}", "transformer.decoder.layers.{i}.feed_forward.linear{1,2}.{p}"),
        Rule(f"{prefix}transformer.{{encoder,decoder}}.norm.{{p}}", "transformer.{encoder,decoder}.norm.{p}"),
        Rule(f"{prefix}class_embed.{{p}}", "classify.{p}", ClassRows("last")),
        Rule(f"{prefix}bbox_embed.layers.{{i}}.{{p}}", "regress.layers.{i}.{p}"),
    )


DETR = Format(
    title="DETR of its authors",
    recognised_by=("query_embed.weight", "transformer.encoder.layers.0.self_attn.in_proj_weight", "class_embed.weight"),
    rules=_detr(""),
    notes=(_DC5,),
)


def _mask_head() -> tuple[Rule, ...]:
    """What panoptic DETR adds, as its authors and the files of transformers name it."""
    table = {"bbox_attention.{q,k}_linear.{p}": "mask_attention.{query,key}.{p}",
             "mask_head.lay{1,2,3,4,5}.{p}": "mask_head.convs.{0,1,2,3,4}.{p}",
             "mask_head.gn{1,2,3,4,5}.{p}": "mask_head.norms.{0,1,2,3,4}.{p}",
             "mask_head.adapter{1,2,3}.{p}": "mask_head.adapters.{0,1,2}.{p}",
             "mask_head.out_lay.{p}": "mask_head.output.{p}"}
    return tuple(Rule(source, target, unless_built="the config's model has no masks") for source, target in table.items())


DETR_PANOPTIC = Format(
    title="panoptic DETR of its authors",
    recognised_by=("detr.query_embed.weight", "bbox_attention.q_linear.weight", "mask_head.lay1.weight"),
    rules=(*_detr("detr."), *_mask_head()),
    notes=(_DC5,),
)

# What transformers 5 calls in memory what its files call otherwise.
_IN_MEMORY = ((".backbone.model.", ".backbone.conv_encoder.model."), (".o_proj.", ".out_proj."), (".mlp.fc", ".fc"))


def _hugging_face_detr(prefix: str) -> tuple[Rule | Drop | Zeros, ...]:
    """DETR as transformers names it."""
    encoder, decoder = f"{prefix}model.encoder.layers.{{i}}", f"{prefix}model.decoder.layers.{{i}}"
    return (
        *_resnet(f"{prefix}model.backbone.conv_encoder.model.", "backbone."),
        Rule(f"{prefix}model.input_projection.{{p}}", "project.{p}"),
        Rule(f"{prefix}model.query_position_embeddings.weight", "queries.weight"),
        Rule(f"{encoder}.self_attn.{{q,k,v,out}}_proj.{{p}}", "transformer.encoder.layers.{i}.attention.{query,key,value,output}.{p}"),
        Rule(f"{encoder}.{{self_attn,final}}_layer_norm.{{p}}", "transformer.encoder.layers.{i}.{attention,feed_forward}_norm.{p}"),
        Rule(f"{encoder}.fc{{1,2}}.{{p}}", "transformer.encoder.layers.{i}.feed_forward.linear{1,2}.{p}"),
        Rule(f"{decoder}.self_attn.{{q,k,v,out}}_proj.{{p}}", "transformer.decoder.layers.{i}.self_attention.{query,key,value,output}.{p}"),
        Rule(f"{decoder}.encoder_attn.{{q,k,v,out}}_proj.{{p}}",
             "transformer.decoder.layers.{i}.cross_attention.{query,key,value,output}.{p}"),
        Rule(f"{decoder}.{{self_attn,encoder_attn,final}}_layer_norm.{{p}}",
             "transformer.decoder.layers.{i}.{self_attention,cross_attention,feed_forward}_norm.{p}"),
        Rule(f"{decoder}.fc{{1,2}}.{{p}}", "transformer.decoder.layers.{i}.feed_forward.linear{1,2}.{p}"),
        Rule(f"{prefix}model.decoder.layernorm.{{p}}", "transformer.decoder.norm.{p}"),
        Rule(f"{prefix}class_labels_classifier.{{p}}", "classify.{p}", ClassRows("last")),
        Rule(f"{prefix}bbox_predictor.layers.{{i}}.{{p}}", "regress.layers.{i}.{p}"),
    )


HUGGING_FACE_DETR = Format(
    title="DETR of transformers, DetrForObjectDetection",
    recognised_by=("model.query_position_embeddings.weight", "class_labels_classifier.weight"),
    rules=_hugging_face_detr(""),
    spellings=_IN_MEMORY,
    notes=(_DC5,),
)

HUGGING_FACE_DETR_PANOPTIC = Format(
    title="panoptic DETR of transformers, DetrForSegmentation",
    recognised_by=("detr.model.query_position_embeddings.weight", "detr.class_labels_classifier.weight"),
    rules=(*_hugging_face_detr("detr."), *_mask_head()),
    spellings=(
        *_IN_MEMORY,
        ("bbox_attention.q_proj.", "bbox_attention.q_linear."),
        ("bbox_attention.k_proj.", "bbox_attention.k_linear."),
        ("mask_head.conv1.conv.", "mask_head.lay1."),
        ("mask_head.conv1.norm.", "mask_head.gn1."),
        ("mask_head.conv2.conv.", "mask_head.lay2."),
        ("mask_head.conv2.norm.", "mask_head.gn2."),
        ("mask_head.fpn_stages.0.fpn_adapter.", "mask_head.adapter1."),
        ("mask_head.fpn_stages.1.fpn_adapter.", "mask_head.adapter2."),
        ("mask_head.fpn_stages.2.fpn_adapter.", "mask_head.adapter3."),
        ("mask_head.fpn_stages.0.refine.conv.", "mask_head.lay3."),
        ("mask_head.fpn_stages.0.refine.norm.", "mask_head.gn3."),
        ("mask_head.fpn_stages.1.refine.conv.", "mask_head.lay4."),
        ("mask_head.fpn_stages.1.refine.norm.", "mask_head.gn4."),
        ("mask_head.fpn_stages.2.refine.conv.", "mask_head.lay5."),
        ("mask_head.fpn_stages.2.refine.norm.", "mask_head.gn5."),
        ("mask_head.output_conv.", "mask_head.out_lay."),
    ),
    notes=(_DC5,),
)

HUGGING_FACE_DEFORMABLE_DETR = Format(
    title="Deformable DETR of transformers, DeformableDetrForObjectDetection",
    recognised_by=("model.level_embed", "model.encoder.layers.0.self_attn.sampling_offsets.weight"),
    rules=(
        *_resnet("model.backbone.conv_encoder.model.", "backbone."),
        *_channel_mapper("model.input_proj"),
        Rule("model.level_embed", "level_embedding"),
        Rule("model.query_position_embeddings.weight", "queries.weight"),
        Rule("model.reference_points.{p}", "reference_points.{p}"),
        Rule("model.enc_output{,_norm}.{p}", "proposal_features.{0,1}.{p}"),
        Rule("model.pos_trans{,_norm}.{p}", "proposal_query.{0,1}.{p}"),
        _deformable_attention("model.encoder.layers.{i}.self_attn", "encoder.{i}.attention"),
        Rule("model.encoder.layers.{i}.{self_attn,final}_layer_norm.{p}", "encoder.{i}.{attention,feed_forward}_norm.{p}"),
        Rule("model.encoder.layers.{i}.fc{1,2}.{p}", "encoder.{i}.feed_forward.linear{1,2}.{p}"),
        Rule("model.decoder.layers.{i}.self_attn.{q,k,v,out}_proj.{p}", "decoder.{i}.self_attention.{query,key,value,output}.{p}"),
        _deformable_attention("model.decoder.layers.{i}.encoder_attn", "decoder.{i}.cross_attention"),
        Rule("model.decoder.layers.{i}.{self_attn,encoder_attn,final}_layer_norm.{p}",
             "decoder.{i}.{self_attention,cross_attention,feed_forward}_norm.{p}"),
        Rule("model.decoder.layers.{i}.fc{1,2}.{p}", "decoder.{i}.feed_forward.linear{1,2}.{p}"),
        *_deformable_heads(""),
        *_deformable_heads("model.decoder."),
        Repeat("classify.{i}.{p}", "classify.0.{p}", "transformers saves once what its layers share"),
        Repeat("regress.{i}.{rest}", "regress.0.{rest}", "transformers saves once what its layers share"),
    ),
    spellings=_IN_MEMORY,
)

MMDET_DETR = Format(
    title="DETR of MMDetection 3",
    recognised_by=("neck.convs.0.conv.weight", "bbox_head.reg_ffn.layers.0.0.weight", "decoder.post_norm.weight"),
    rules=(
        *_resnet("backbone.", "backbone."),
        Rule("neck.convs.0.conv.{p}", "project.{p}"),
        Rule("query_embedding.weight", "queries.weight"),
        Rule("encoder.layers.{i}.self_attn.attn.in_proj_{p}", "transformer.encoder.layers.{i}.attention.{query,key,value}.{p}"),
        Rule("encoder.layers.{i}.self_attn.attn.out_proj.{p}", "transformer.encoder.layers.{i}.attention.output.{p}"),
        Rule("encoder.layers.{i}.norms.{0,1}.{p}", "transformer.encoder.layers.{i}.{attention,feed_forward}_norm.{p}"),
        Rule("encoder.layers.{i}.ffn.layers.{0.0,1}.{p}", "transformer.encoder.layers.{i}.feed_forward.linear{1,2}.{p}"),
        Rule("decoder.layers.{i}.self_attn.attn.in_proj_{p}", "transformer.decoder.layers.{i}.self_attention.{query,key,value}.{p}"),
        Rule("decoder.layers.{i}.self_attn.attn.out_proj.{p}", "transformer.decoder.layers.{i}.self_attention.output.{p}"),
        Rule("decoder.layers.{i}.cross_attn.attn.in_proj_{p}", "transformer.decoder.layers.{i}.cross_attention.{query,key,value}.{p}"),
        Rule("decoder.layers.{i}.cross_attn.attn.out_proj.{p}", "transformer.decoder.layers.{i}.cross_attention.output.{p}"),
        Rule("decoder.layers.{i}.norms.{0,1,2}.{p}",
             "transformer.decoder.layers.{i}.{self_attention,cross_attention,feed_forward}_norm.{p}"),
        Rule("decoder.layers.{i}.ffn.layers.{0.0,1}.{p}", "transformer.decoder.layers.{i}.feed_forward.linear{1,2}.{p}"),
        Rule("decoder.post_norm.{p}", "transformer.decoder.norm.{p}"),
        Rule("bbox_head.fc_cls.{p}", "classify.{p}"),
        Rule("bbox_head.reg_ffn.layers.{0.0,1}.{p}", "regress.layers.{0,1}.{p}"),
        Rule("bbox_head.fc_reg.{p}", "regress.layers.2.{p}"),
    ),
    notes=(_CHECK_PREPROCESSING,),
)

MMDET_DEFORMABLE_DETR = Format(
    title="Deformable DETR of MMDetection 3, all three variants",
    recognised_by=("neck.convs.0.conv.weight", "level_embed", "bbox_head.reg_branches.0.0.weight"),
    rules=(
        *_resnet("backbone.", "backbone."),
        Rule("neck.convs.{i}.{conv,gn}.{p}", "neck.lateral.{i}.{0,1}.{p}"),
        Rule("neck.extra_convs.{i}.{conv,gn}.{p}", "neck.extra.{i}.{0,1}.{p}"),
        Zeros("neck.{lateral,extra}.{i}.0.bias", "MMDetection has no bias before a normalisation"),
        Rule("level_embed", "level_embedding"),
        Rule("query_embedding.weight", "queries.weight"),
        Rule("reference_points_fc.{p}", "reference_points.{p}"),
        Rule("memory_trans_{fc,norm}.{p}", "proposal_features.{0,1}.{p}"),
        Rule("pos_trans_{fc,norm}.{p}", "proposal_query.{0,1}.{p}"),
        _deformable_attention("encoder.layers.{i}.self_attn", "encoder.{i}.attention"),
        Rule("encoder.layers.{i}.norms.{0,1}.{p}", "encoder.{i}.{attention,feed_forward}_norm.{p}"),
        Rule("encoder.layers.{i}.ffn.layers.{0.0,1}.{p}", "encoder.{i}.feed_forward.linear{1,2}.{p}"),
        Rule("decoder.layers.{i}.self_attn.attn.in_proj_{p}", "decoder.{i}.self_attention.{query,key,value}.{p}"),
        Rule("decoder.layers.{i}.self_attn.attn.out_proj.{p}", "decoder.{i}.self_attention.output.{p}"),
        _deformable_attention("decoder.layers.{i}.cross_attn", "decoder.{i}.cross_attention"),
        Rule("decoder.layers.{i}.norms.{0,1,2}.{p}", "decoder.{i}.{self_attention,cross_attention,feed_forward}_norm.{p}"),
        Rule("decoder.layers.{i}.ffn.layers.{0.0,1}.{p}", "decoder.{i}.feed_forward.linear{1,2}.{p}"),
        Rule("bbox_head.cls_branches.{i}.{p}", "classify.{i}.{p}"),
        Rule("bbox_head.reg_branches.{i}.{0,2,4}.{p}", "regress.{i}.layers.{0,1,2}.{p}"),
    ),
    notes=(_CHECK_PREPROCESSING,),
)

_NO_LANGUAGE = "of the language model, which the config's model does not have"
_NO_PROJECTOR = "the config's model has no projector"
_ONLY_THE_ENCODER = "beside the vision encoder"
_MOONVIT_PREPROCESSING = ("The images are padded with black to multiples of 28 pixels and have mean and standard deviation 127.5: "
                          "data_preprocessor=dict(type='NativeResolutionPreprocessor'), after ResizeToTokenLimit in the pipeline.")


def _moonvit(source: str, target: str) -> tuple[Rule | Drop, ...]:
    """MoonViT as its authors name it."""
    block, ours = f"{source}encoder.blocks.{{i}}", f"{target}encoder.blocks.{{i}}"
    return (
        Rule(f"{source}patch_embed.proj.{{p}}", f"{target}patch_embed.proj.{{p}}"),
        Rule(f"{source}patch_embed.pos_emb.weight", f"{target}positions"),
        Drop(f"{source}patch_embed.pos_emb.time_weight", "positions in time, which an image does not have"),
        Rule(f"{block}.norm{{0,1}}.{{p}}", f"{ours}.{{attention,feed_forward}}_norm.{{p}}"),
        Rule(f"{block}.{{wqkv,wo}}.{{p}}", f"{ours}.attention.{{qkv,output}}.{{p}}"),
        Rule(f"{block}.mlp.fc{{0,1}}.{{p}}", f"{ours}.feed_forward.linear{{1,2}}.{{p}}"),
        Rule(f"{source}encoder.final_layernorm.{{p}}", f"{target}encoder.norm.{{p}}"),
    )


def _hugging_face_moonvit(source: str, target: str) -> tuple[Rule, ...]:
    """MoonViT as transformers names it in memory, in the image and video encoder of Kimi K2.5."""
    layer, ours = f"{source}layers.{{i}}", f"{target}encoder.blocks.{{i}}"
    return (
        Rule(f"{source}patch_embed.proj.{{p}}", f"{target}patch_embed.proj.{{p}}"),
        Rule(f"{source}patch_embed.pos_emb.position_embeddings", f"{target}positions"),
        Rule(f"{layer}.norm{{1,2}}.{{p}}", f"{ours}.{{attention,feed_forward}}_norm.{{p}}"),
        Rule(f"{layer}.attn.{{q,k,v}}_proj.{{p}}", f"{ours}.attention.qkv.{{p}}",
             PairsFromHalves(f"{target}encoder.blocks.0.attention.num_heads")),
        Rule(f"{layer}.attn.proj.{{p}}", f"{ours}.attention.output.{{p}}"),
        Rule(f"{layer}.mlp.fc{{1,2}}.{{p}}", f"{ours}.feed_forward.linear{{1,2}}.{{p}}"),
        Rule(f"{source}final_layernorm.{{p}}", f"{target}encoder.norm.{{p}}"),
    )


def _projector(norm: str, first: str, second: str) -> tuple[Rule, ...]:
    """The `MLPProjector`."""
    return tuple(Rule(f"{source}.{{p}}", f"neck.{target}.{{p}}", unless_built=_NO_PROJECTOR)
                 for source, target in ((norm, "norm"), (first, "linear1"), (second, "linear2")))


MOONVIT = Format(
    title="MoonViT of its authors, by itself; with --from also that within Kimi-VL",
    recognised_by=("patch_embed.pos_emb.weight", "encoder.blocks.0.wqkv.weight"),
    rules=(*_moonvit("", ""), Drop("multi_modal_projector.{rest}", _ONLY_THE_ENCODER), Drop("mm_projector.{rest}", _ONLY_THE_ENCODER),
           Drop("language_model.{rest}", _ONLY_THE_ENCODER)),
    spellings=(("vision_tower.", ""),),
    part="backbone",
    notes=(_MOONVIT_PREPROCESSING,),
)

KIMI_VL = Format(
    title="Kimi-VL of its authors: vision encoder and projector",
    recognised_by=("vision_tower.encoder.blocks.0.wqkv.weight", "multi_modal_projector.pre_norm.weight"),
    rules=(*_moonvit("vision_tower.", "backbone."),
           *_projector("multi_modal_projector.pre_norm", "multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
           Drop("language_model.{rest}", _NO_LANGUAGE)),
    notes=(_MOONVIT_PREPROCESSING,),
)

KIMI_K25 = Format(
    title="Kimi K2.5 of its authors: vision encoder and projector",
    recognised_by=("vision_tower.encoder.blocks.0.wqkv.weight", "mm_projector.pre_norm.weight"),
    rules=(*_moonvit("vision_tower.", "backbone."), *_projector("mm_projector.pre_norm", "mm_projector.proj.0", "mm_projector.proj.2"),
           Drop("language_model.{rest}", _NO_LANGUAGE)),
    notes=(_MOONVIT_PREPROCESSING,),
)

HUGGING_FACE_KIMI_K25 = Format(
    title="Kimi K2.5 of transformers in memory, Kimi_K25ForConditionalGeneration: vision encoder and projector",
    recognised_by=("model.vision_tower.patch_embed.pos_emb.position_embeddings", "model.mm_projector.pre_norm.weight"),
    rules=(*_hugging_face_moonvit("model.vision_tower.", "backbone."),
           *_projector("model.mm_projector.pre_norm", "model.mm_projector.in_proj", "model.mm_projector.out_proj"),
           Drop("model.language_model.{rest}", _NO_LANGUAGE), Drop("lm_head.weight", _NO_LANGUAGE)),
    notes=(_MOONVIT_PREPROCESSING,),
)

HUGGING_FACE_MOONVIT = Format(
    title="the vision encoder of Kimi K2.5 of transformers in memory, Kimi_K25VisionModel",
    recognised_by=("patch_embed.pos_emb.position_embeddings", "layers.0.attn.q_proj.weight"),
    rules=_hugging_face_moonvit("", ""),
    part="backbone",
    notes=(_MOONVIT_PREPROCESSING,),
)

VIT = Format(
    title="a ViT of timm with a class token, or one of DeiT or DINO with the same names",
    recognised_by=("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
    rules=(
        Rule("cls_token", "class_token"),
        Rule("pos_embed", "positions"),
        Rule("patch_embed.proj.{p}", "patch_embed.proj.{p}"),
        Rule("blocks.{i}.norm{1,2}.{p}", "encoder.blocks.{i}.{attention,feed_forward}_norm.{p}"),
        Rule("blocks.{i}.attn.{qkv,proj}.{p}", "encoder.blocks.{i}.attention.{qkv,output}.{p}"),
        Rule("blocks.{i}.mlp.fc{1,2}.{p}", "encoder.blocks.{i}.feed_forward.linear{1,2}.{p}"),
        Rule("norm.{p}", "encoder.norm.{p}"),
        Drop("head.{p}", "the classifier; a backbone has none"),
    ),
    part="backbone",
    notes=("The number of heads is not in the file: look it up. Mean and standard deviation of the images are 127.5 for the weights of the "
           "paper's authors ('augreg'), and ImageNet's (123.675, 116.28, 103.53), (58.395, 57.12, 57.375) for DeiT and DINO.",),
)

FORMATS = {
    "resnet": RESNET,
    "torchvision-faster-rcnn": TORCHVISION_FASTER_RCNN,
    "detr": DETR,
    "detr-panoptic": DETR_PANOPTIC,
    "hf-detr": HUGGING_FACE_DETR,
    "hf-detr-panoptic": HUGGING_FACE_DETR_PANOPTIC,
    "deformable-detr": DEFORMABLE_DETR,
    "hf-deformable-detr": HUGGING_FACE_DEFORMABLE_DETR,
    "mmdet-faster-rcnn": MMDET_FASTER_RCNN,
    "mmdet-detr": MMDET_DETR,
    "mmdet-deformable-detr": MMDET_DEFORMABLE_DETR,
    "vit": VIT,
    "moonvit": MOONVIT,
    "kimi-vl": KIMI_VL,
    "kimi-k25": KIMI_K25,
    "hf-kimi-k25": HUGGING_FACE_KIMI_K25,
    "hf-kimi-k25-vision": HUGGING_FACE_MOONVIT,
}
