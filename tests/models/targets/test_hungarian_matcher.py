import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from visionkit.models.targets import HungarianMatcher, SetTarget, set_targets
from visionkit.ops import cxcywh_to_xyxy, generalized_box_iou
from visionkit.registry import TARGETS
from visionkit.structures import InstanceData, Sample


def random_boxes(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.cat([torch.rand(*shape, 2, generator=generator), torch.rand(*shape, 2, generator=generator) * 0.5], -1)


def batch(counts: tuple[int, ...], queries: int = 20, classes: int = 6, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    targets = [SetTarget(torch.randint(0, classes - 1, (count,), generator=generator), random_boxes(count, generator=generator))
               for count in counts]
    return (torch.randn(len(counts), queries, classes, generator=generator) * 2,
            random_boxes(len(counts), queries, generator=generator), targets)


def cost_by_hand(logits: torch.Tensor, boxes: torch.Tensor, target: SetTarget, classification: str) -> np.ndarray:
    """[Q, N], one entry after the other."""
    giou = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target.boxes))
    cost = np.zeros(giou.shape)
    for query, index in itertools.product(range(len(boxes)), range(len(target.labels))):
        label = int(target.labels[index])
        if classification == "softmax":
            class_cost = -logits[query].exp()[label] / logits[query].exp().sum()
        else:
            p = 1 / (1 + (-logits[query, label]).exp())
            class_cost = -0.25 * (1 - p) ** 2 * p.log() + 0.75 * p ** 2 * (1 - p).log()
        distance = (boxes[query] - target.boxes[index]).abs().sum()
        cost[query, index] = class_cost + 5 * distance - 2 * giou[query, index]
    return cost


@pytest.mark.parametrize("classification", ["softmax", "sigmoid"])
def test_it_solves_the_hand_built_costs_of_each_image(classification):
    """Spec 11, item 4. Measured: the same pairs, of costs that differ by 1.3e-06."""
    logits, boxes, targets = batch((5, 1, 0, 20, 25))                       # at last more objects than queries
    pairs = HungarianMatcher(classification=classification)(logits, boxes, targets)
    assert len(pairs) == 5
    for index, (queries, objects) in enumerate(pairs):
        cost = cost_by_hand(logits[index], boxes[index], targets[index], classification)
        expected = linear_sum_assignment(cost)
        assert queries.tolist() == expected[0].tolist() == sorted(queries.tolist())
        assert objects.tolist() == expected[1].tolist()
        assert queries.dtype == objects.dtype == torch.int64


@pytest.mark.parametrize("classification, expected", [
    ("softmax", -0.9 + 5 * 0.3 - 2 * (1 / 3)),                              # box half over the object: IoU 1/3, hull covered
    ("sigmoid", 0.25 * 0.01 * -np.log(0.9) - 0.75 * 0.81 * -np.log(0.1) + 5 * 0.3 - 2 * (1 / 3)),
])
def test_the_cost_of_one_query_by_hand(classification, expected):
    logits = torch.tensor([[[0.9, 0.1]]]).log() if classification == "softmax" else torch.tensor([[[np.log(9.0), 0.0]]])
    target = SetTarget(torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.6, 0.4]]))
    matcher = HungarianMatcher(classification=classification)
    cost = matcher._costs(logits.float(), torch.tensor([[[0.8, 0.5, 0.6, 0.4]]]), torch.tensor([0]), [target])
    assert cost.item() == pytest.approx(expected, abs=1e-6)


def test_no_object_is_matched_with_a_query_of_another_image():
    """The queries of each image lie on the objects of the other."""
    boxes = torch.tensor([[[0.2, 0.2, 0.2, 0.2], [0.3, 0.2, 0.2, 0.2]], [[0.7, 0.7, 0.2, 0.2], [0.6, 0.7, 0.2, 0.2]]])
    targets = [SetTarget(torch.tensor([0]), boxes[1, :1]), SetTarget(torch.tensor([0]), boxes[0, :1])]
    pairs = HungarianMatcher()(torch.zeros(2, 2, 3), boxes, targets)
    assert [pair[0].tolist() for pair in pairs] == [[1], [1]]               # of its own image the nearer one


def test_an_image_of_a_batch_is_matched_as_it_is_alone():
    logits, boxes, targets = batch((3, 0, 7, 1), queries=30)
    pairs = HungarianMatcher()(logits, boxes, targets)
    for index in range(4):
        (alone,) = HungarianMatcher()(logits[index:index + 1], boxes[index:index + 1], targets[index:index + 1])
        assert all(torch.equal(ours, own) for ours, own in zip(pairs[index], alone, strict=True))


def test_many_objects_are_costed_in_pieces(monkeypatch):
    logits, boxes, targets = batch((9, 0, 14))
    whole = HungarianMatcher()(logits, boxes, targets)
    monkeypatch.setattr("visionkit.models.targets.hungarian_matcher._PIECE", 45)        # two objects at a time
    for pair, other in zip(whole, HungarianMatcher()(logits, boxes, targets), strict=True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(pair, other, strict=True))


def test_images_without_objects_get_empty_pairs():
    """Spec 11, item 4."""
    logits, boxes, targets = batch((0, 0))
    for pairs in (HungarianMatcher()(logits, boxes, targets), HungarianMatcher()(*batch((0, 2)))[:1]):
        for queries, objects in pairs:
            assert queries.shape == objects.shape == (0,)
            assert queries.dtype == objects.dtype == torch.int64


def test_boxes_without_extent_are_matched_all_the_same():
    point = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    (pair,) = HungarianMatcher()(torch.zeros(1, 2, 3), torch.stack([torch.tensor([[0.1, 0.1, 0.0, 0.0]]), point], 1),
                                 [SetTarget(torch.tensor([1]), point)])
    assert pair[0].tolist() == [1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part, culprit", [(0, "its class logits"), (1, "its predicted boxes"), (2, "the boxes of its objects")])
def test_costs_that_are_not_finite_name_the_image_and_what_is_wrong_with_it(part, culprit, value):
    logits, boxes, targets = batch((2, 0, 3, 1))
    (logits[2], boxes[2], targets[2].boxes)[part][1] = value
    with pytest.raises(ValueError, match=f"image 2 of the batch cannot be matched, its costs are NaN or infinite: so are {culprit}. If"):
        HungarianMatcher()(logits, boxes, targets)


@pytest.mark.parametrize("classification, label", [("softmax", 5), ("softmax", -1), ("sigmoid", 6)],
                         ids=["no-object's", "negative", "beyond the logits"])
def test_an_object_of_a_class_that_the_model_does_not_know_is_told_of(classification, label):
    """The first is the one of no-object: without a word the network would learn that there is nothing."""
    logits, boxes, targets = batch((2, 0, 3))                               # six logits
    matcher, most = HungarianMatcher(classification=classification), 4 if classification == "softmax" else 5
    matcher(logits, boxes, targets)
    targets[2].labels[1] = label
    with pytest.raises(ValueError, match=f"image 2 .* has objects of class {label}, and the model knows the classes 0 to {most};"):
        matcher(logits, boxes, targets)


def test_matching_has_no_gradient_and_low_precision_is_matched_in_float32():
    logits, boxes, targets = batch((4, 3))
    logits, boxes = logits.bfloat16().requires_grad_(), boxes.bfloat16().requires_grad_()
    pairs = HungarianMatcher()(logits, boxes, targets)
    expected = HungarianMatcher()(logits.detach().float(), boxes.detach().float(), targets)
    assert [pair[0].tolist() for pair in pairs] == [pair[0].tolist() for pair in expected]
    boxes[0, pairs[0][0]].sum().backward()                                  # the indices may be used where a gradient is wanted
    assert boxes.grad.any()


def test_the_matcher_is_registered_and_refuses_what_it_does_not_know():
    assert TARGETS.build({"type": "HungarianMatcher", "class_cost": 2.0}).class_cost == 2.0
    with pytest.raises(ValueError, match="'softmax' or 'sigmoid', got 'focal'"):
        HungarianMatcher(classification="focal")
    with pytest.raises(ValueError, match="must not be negative, and one of them positive"):
        HungarianMatcher(0, 0, 0)


def test_set_targets_are_fractions_of_the_input_without_its_padding_and_leave_crowds_out():
    sample = Sample(metainfo={"img_shape": (100, 200)})
    sample.gt_instances = InstanceData(bboxes=torch.tensor([[20.0, 10, 60, 90]]), labels=torch.tensor([4]))
    sample.ignored_instances = InstanceData(bboxes=torch.tensor([[0.0, 0, 9, 9]]), labels=torch.tensor([1]))
    empty = sample.clone()
    empty.gt_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    first, second = set_targets([sample, empty])
    assert first.labels.tolist() == [4]
    torch.testing.assert_close(first.boxes, torch.tensor([[0.2, 0.5, 0.2, 0.8]]))
    assert second.boxes.shape == (0, 4)
    assert second.labels.shape == (0,)
