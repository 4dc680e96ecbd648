"""One image's annotations and predictions."""
from __future__ import annotations

from mmengine.structures import BaseDataElement, InstanceData
from torch import Tensor

from visionkit.structures.panoptic_map import PanopticMap

__all__ = ["InstanceData", "Sample"]


class Sample(BaseDataElement):
    """What is known and predicted about one image.

    Law: `gt_instances`, `ignored_instances` and `pred_instances` are `InstanceData`, whose fields all have the same length.

    Fields:
        gt_instances: `bboxes` [N, 4] (x1, y1, x2, y2) in pixels of the *network input*, `labels` [N] int64, and where the
            pipeline loads them `masks` [N, h, w] bool.
        ignored_instances: the same for crowd regions: neither object nor background.
        pred_instances: `bboxes` [N, 4] in pixels of the *original image*, `scores` [N] descending, `labels` [N], and of models that
            predict them `masks` [N, h, w] bool in the original size.
        pred_panoptic: a `PanopticMap` in the original size, of models that predict one.
        gt_label: int64 scalar, the class of the whole image, where the data set has one.
        pred_scores: [C] float, of models that classify whole images: how sure they are of each class; the highest is the answer.
        pretext: of models that solve puzzles made from the image, `InstanceData` with a row a puzzle: `scores` [T, K] of the K possible
            answers and `labels` [T] int64, which is right.
        features: tensors by name, each [C, h, w] or [D], of a model that is asked for its features.

    Meta information (attributes set through `set_metainfo`):
        img_id, img_path; ori_shape (h, w) of the file; img_shape (h, w) of the network input without padding;
        scale_factor (x, y), input over original; flip (bool) and flip_direction;
        annotations: the image's ground truth in *original* pixels, as the dataset gives it; what metrics compare with;
        panoptic: a `PanopticMap` in the original size, where the pipeline keeps it for a metric.
    """

    @property
    def gt_instances(self) -> InstanceData:
        return self._gt_instances

    @gt_instances.setter
    def gt_instances(self, value: InstanceData) -> None:
        self.set_field(value, "_gt_instances", dtype=InstanceData)

    @property
    def ignored_instances(self) -> InstanceData:
        return self._ignored_instances

    @ignored_instances.setter
    def ignored_instances(self, value: InstanceData) -> None:
        self.set_field(value, "_ignored_instances", dtype=InstanceData)

    @property
    def pred_instances(self) -> InstanceData:
        return self._pred_instances

    @pred_instances.setter
    def pred_instances(self, value: InstanceData) -> None:
        self.set_field(value, "_pred_instances", dtype=InstanceData)

    @property
    def gt_label(self) -> Tensor:
        return self._gt_label

    @gt_label.setter
    def gt_label(self, value: Tensor) -> None:
        self.set_field(value, "_gt_label", dtype=Tensor)

    @property
    def pred_scores(self) -> Tensor:
        return self._pred_scores

    @pred_scores.setter
    def pred_scores(self, value: Tensor) -> None:
        self.set_field(value, "_pred_scores", dtype=Tensor)

    @property
    def pretext(self) -> InstanceData:
        return self._pretext

    @pretext.setter
    def pretext(self, value: InstanceData) -> None:
        self.set_field(value, "_pretext", dtype=InstanceData)

    @property
    def features(self) -> dict[str, Tensor]:
        return self._features

    @features.setter
    def features(self, value: dict[str, Tensor]) -> None:
        self.set_field(value, "_features", dtype=dict)

    @property
    def pred_panoptic(self) -> PanopticMap:
        return self._pred_panoptic

    @pred_panoptic.setter
    def pred_panoptic(self, value: PanopticMap) -> None:
        self.set_field(value, "_pred_panoptic", dtype=PanopticMap)
