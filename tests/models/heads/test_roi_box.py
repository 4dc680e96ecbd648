import pytest
import torch

from visionkit.registry import HEADS, ConfigError
from visionkit.structures import InstanceData, Sample

PROPOSALS = [torch.tensor([[0.0, 0, 40, 40], [2, 2, 42, 42], [50, 10, 90, 60]])]


def predict(**changes) -> InstanceData:
    """What an untrained head, which gives each of three classes about 0.25 everywhere, finds in three proposals."""
    torch.manual_seed(0)
    head = HEADS.build({"type": "RoIBoxHead", "num_classes": 3, "in_channels": (8,), "strides": (4,), "hidden_channels": (16,)} | changes)
    sample = Sample(metainfo={"img_shape": (64, 96), "ori_shape": (128, 192), "scale_factor": (0.5, 0.5)})
    with torch.no_grad():
        return head.predict([torch.randn(1, 8, 16, 24)], PROPOSALS, [sample])[0].pred_instances


@pytest.mark.parametrize("nms, found", [
    (None, 6), (dict(type="nms", iou=0.95), 9), (dict(type="nms", class_agnostic=True), 2), (dict(type="soft_nms"), 9),
    (dict(type="box_voting", class_agnostic=True), 2)], ids=str)
def test_predictions_are_thinned_out_as_configured(nms, found):
    """Two of the three boxes overlap by IoU 0.82 (1444 of 1756 square pixels), in each of three classes."""
    assert len(predict(**({} if nms is None else {"nms": nms}))) == found


def test_only_predictions_above_the_score_threshold_stay():
    everything = predict(score_threshold=0.0, nms=dict(type="nms", iou=1.0)).scores
    threshold = everything[4].item()
    assert torch.equal(predict(score_threshold=threshold, nms=dict(type="nms", iou=1.0)).scores, everything[:4])


def test_a_wrong_kind_of_suppression_is_named_by_its_place():
    with pytest.raises(ConfigError, match=r"^nms.type: no op named 'softnms'. Did you mean 'soft_nms'"):
        predict(nms=dict(type="softnms"))
