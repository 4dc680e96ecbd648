import math

import pytest
import torch
import torch.nn.functional as F

from visionkit.models.losses import SetPredictionLoss
from visionkit.ops import cxcywh_to_xyxy, elementwise_generalized_box_iou
from visionkit.registry import LOSSES

NONE = (torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))


def target(*labels: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(labels))
    return torch.tensor(labels, dtype=torch.int64), torch.rand(len(labels), 4, generator=generator) * 0.5 + 0.1


def prediction(images: int, queries: int = 5, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(images, queries, classes, generator=generator).requires_grad_(),
            (torch.rand(images, queries, 4, generator=generator) * 0.5 + 0.2).requires_grad_())


def pair(queries: list[int], objects: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(queries), torch.tensor(objects)


def test_an_undecided_network_pays_the_logarithm_of_its_classes_whatever_is_matched():
    losses = SetPredictionLoss()(torch.zeros(1, 5, 4), torch.rand(1, 5, 4), [target(1)], [pair([3], [0])], 1)
    assert losses["loss_class"].item() == pytest.approx(math.log(4), abs=1e-6)          # a mean by weight, not by count


def test_the_class_term_weighs_queries_without_an_object_a_tenth():
    logits, boxes = prediction(2)
    losses = SetPredictionLoss()(logits, boxes, [target(2, 0), target()], [pair([1, 4], [1, 0]), NONE], 2)
    wanted = [3, 0, 3, 3, 2, 3, 3, 3, 3, 3]                                             # the last class is no-object
    surprise = [-math.log(row.softmax(0)[label]) for row, label in zip(logits.detach().flatten(0, 1), wanted, strict=True)]
    weights = [0.1 if label == 3 else 1.0 for label in wanted]
    expected = sum(weight * value for weight, value in zip(weights, surprise, strict=True)) / sum(weights)
    assert losses["loss_class"].item() == pytest.approx(expected, abs=1e-6)


def test_the_box_terms_are_sums_over_pairs_divided_by_the_number_of_objects():
    logits, boxes = prediction(2)
    targets = [target(2, 0), target(1)]
    losses = SetPredictionLoss(box_weight=5, giou_weight=2)(logits, boxes, targets, [pair([1, 4], [1, 0]), pair([0], [0])], 7.0)
    found = torch.stack([boxes[0, 1], boxes[0, 4], boxes[1, 0]])
    wanted = torch.stack([targets[0][1][1], targets[0][1][0], targets[1][1][0]])
    assert losses["loss_box"].item() == pytest.approx(5 * (found - wanted).abs().sum().item() / 7, abs=1e-6)
    giou = elementwise_generalized_box_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted))
    assert losses["loss_giou"].item() == pytest.approx(2 * (3 - giou.sum().item()) / 7, abs=1e-6)


def test_the_focal_form_is_a_sum_over_all_logits_divided_by_the_number_of_objects():
    logits, boxes = prediction(2)
    losses = SetPredictionLoss(class_weight=2, classification="sigmoid")(
        logits, boxes, [target(2, 0), target()], [pair([1, 4], [1, 0]), NONE], 2.0)
    present = torch.zeros(2, 5, 4)
    present[0, 1, 0] = present[0, 4, 2] = 1
    p = torch.where(present == 1, logits.sigmoid(), 1 - logits.sigmoid())
    expected = (torch.where(present == 1, 0.25, 0.75) * (1 - p) ** 2 * -p.log()).sum()
    assert losses["loss_class"].item() == pytest.approx(2 * expected.item() / 2, abs=1e-5)


@pytest.mark.parametrize("classification", ["softmax", "sigmoid"])
def test_the_order_of_the_objects_does_not_matter(classification):
    logits, boxes = prediction(1)
    labels, wanted = target(2, 0, 1)
    loss = SetPredictionLoss(classification=classification)
    first = loss(logits, boxes, [(labels, wanted)], [pair([0, 2, 3], [1, 0, 2])], 3)
    order = torch.tensor([2, 0, 1])                                                     # the object at 0 is now at 1, and so on
    second = loss(logits, boxes, [(labels[order], wanted[order])], [pair([0, 2, 3], [2, 1, 0])], 3)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value)


@pytest.mark.parametrize("classification", ["softmax", "sigmoid"])
def test_images_without_objects_teach_only_the_class_and_boxes_keep_a_gradient_of_zero(classification):
    logits, boxes = prediction(2)
    losses = SetPredictionLoss(classification=classification)(logits, boxes, [target(), target()], [NONE, NONE], 1.0)
    assert losses["loss_box"].item() == losses["loss_giou"].item() == 0
    assert losses["loss_class"].item() > 0
    sum(losses.values()).backward()
    assert logits.grad.any()
    assert not boxes.grad.any()                                                         # there, and zero: processes wait for it


def test_the_cross_entropy_without_objects_is_that_of_no_object():
    logits, boxes = prediction(1)
    losses = SetPredictionLoss()(logits, boxes, [target()], [NONE], 1.0)
    assert losses["loss_class"].item() == pytest.approx(F.cross_entropy(logits[0], torch.full((5,), 3)).item(), abs=1e-6)


def test_the_loss_is_registered_and_refuses_what_it_does_not_know():
    assert LOSSES.build({"type": "SetPredictionLoss", "no_object_weight": 0.2}).no_object_weight == 0.2
    with pytest.raises(ValueError, match="'softmax' or 'sigmoid', got 'focal'"):
        SetPredictionLoss(classification="focal")
