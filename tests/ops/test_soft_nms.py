import importlib
import math

import pytest
import torch

from visionkit.ops import batched_soft_nms, box_iou, soft_nms

soft_nms_module = importlib.import_module("visionkit.ops.soft_nms")          # `visionkit.ops.soft_nms` is the function


def random_boxes(count, seed=0, size=100.0):
    generator = torch.Generator().manual_seed(seed)
    top_left = torch.rand(count, 2, generator=generator, dtype=torch.float64) * size
    boxes = torch.cat([top_left, top_left + 1 + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 40], 1)
    return boxes, torch.rand(count, generator=generator, dtype=torch.float64)


def soft_nms_by_hand(boxes, scores, groups, sigma, score_threshold, method, iou_threshold):
    """Take the best box left, rescore the others, repeat."""
    overlaps, scores = box_iou(boxes, boxes).tolist(), scores.tolist()
    left, kept = list(range(len(scores))), []
    while left:
        left = [i for i in left if scores[i] >= score_threshold]
        if not left:
            break
        best = max(left, key=lambda i: (scores[i], -i))
        kept.append((best, scores[best]))
        left.remove(best)
        for i in left:
            iou = overlaps[best][i] if groups[i] == groups[best] else 0.0
            scores[i] *= math.exp(-iou ** 2 / sigma) if method == "gaussian" else 1 - iou if iou >= iou_threshold else 1
    return kept


def check(boxes, scores, groups=None, sigma=0.5, score_threshold=0.001, method="gaussian", iou_threshold=0.3):
    settings = (sigma, score_threshold, method, iou_threshold)
    expected = soft_nms_by_hand(boxes, scores, [0] * len(boxes) if groups is None else groups.tolist(), *settings)
    indices, rescored = soft_nms(boxes, scores, *settings) if groups is None else batched_soft_nms(boxes, scores, groups, *settings)
    assert indices.tolist() == [index for index, _ in expected]
    torch.testing.assert_close(rescored, torch.tensor([score for _, score in expected], dtype=rescored.dtype))


def test_the_score_of_an_overlapping_box_falls_as_the_paper_says():
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [40, 0, 50, 10]])                 # the first two overlap by a third
    indices, scores = soft_nms(boxes, torch.tensor([0.9, 0.8, 0.6]))
    assert indices.tolist() == [0, 1, 2]
    torch.testing.assert_close(scores, torch.tensor([0.9, 0.8 * math.exp(-(1 / 9) / 0.5), 0.6]))
    indices, scores = soft_nms(boxes, torch.tensor([0.9, 0.8, 0.6]), method="linear")
    assert indices.tolist() == [0, 2, 1]                                      # 0.8 * 2/3 is below 0.6
    torch.testing.assert_close(scores, torch.tensor([0.9, 0.6, 0.8 * 2 / 3]))
    assert soft_nms(boxes, torch.tensor([0.9, 0.8, 0.6]), method="linear", score_threshold=0.55)[0].tolist() == [0, 2]


@pytest.mark.parametrize("block", [1, 7, 256])
@pytest.mark.parametrize("method", ["gaussian", "linear"])
@pytest.mark.parametrize("size", [30.0, 300.0], ids=["crowded", "spread"])
def test_soft_nms_agrees_with_the_definition(size, method, block, monkeypatch):
    monkeypatch.setattr(soft_nms_module, "_BLOCK", block)
    check(*random_boxes(120, size=size), method=method)


@pytest.mark.parametrize("block", [3, 256])
def test_groups_do_not_rescore_each_other(block, monkeypatch):
    monkeypatch.setattr(soft_nms_module, "_BLOCK", block)
    check(*random_boxes(90, size=40.0), groups=torch.arange(90) % 3 - 1)


@pytest.mark.parametrize("block", [2, 256])
def test_equal_scores_are_settled_by_the_lower_index(block, monkeypatch):
    monkeypatch.setattr(soft_nms_module, "_BLOCK", block)
    boxes, _ = random_boxes(60)
    check(boxes, torch.full((60,), 0.5, dtype=torch.float64), method="linear")


def test_a_threshold_of_zero_keeps_every_box():
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(5, 1)
    indices, scores = soft_nms(boxes, torch.full((5,), 0.5), method="linear", score_threshold=0.0)
    assert indices.tolist() == [0, 1, 2, 3, 4]
    assert scores.tolist() == [0.5, 0, 0, 0, 0]


def test_no_boxes_leave_none():
    indices, scores = soft_nms(torch.zeros(0, 4), torch.zeros(0))
    assert indices.shape == scores.shape == (0,)
    assert indices.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_keep_their_type_and_are_rescored_in_float32(dtype):
    boxes, scores = (value.to(dtype) for value in random_boxes(50))
    indices, rescored = soft_nms(boxes, scores)
    exact_indices, exact = soft_nms(boxes.float(), scores.float())
    assert rescored.dtype == dtype
    assert torch.equal(indices, exact_indices)
    assert torch.equal(rescored, exact.to(dtype))


def test_the_scores_given_stay_as_they_are():
    boxes, scores = random_boxes(50)
    before = scores.clone()
    soft_nms(boxes, scores)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("change, message", [
    ({"boxes": torch.zeros(2, 5)}, r"boxes must be \[N, 4\], got \[2, 5\]"),
    ({"scores": torch.zeros(3)}, r"one floating score a box, got scores \[3\] of torch.float32 for boxes \[2, 4\]"),
    ({"scores": torch.tensor([0.1, float("nan")])}, "of 2, 0 are negative and 1 are not a number"),
    ({"scores": torch.tensor([0.1, -1.0])}, "of 2, 1 are negative and 0 are not a number"),
    ({"method": "hard"}, "method must be one of gaussian, linear; got 'hard'"),
    ({"sigma": 0.0}, "sigma must be positive"),
    ({"scores": torch.zeros(2, device="meta")}, "boxes are on cpu, scores on meta"),
], ids=["boxes", "scores", "nan", "negative", "method", "sigma", "device"])
def test_soft_nms_tells_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        soft_nms(**{"boxes": torch.zeros(2, 4), "scores": torch.zeros(2)} | change)


def test_soft_nms_is_one_operator_to_the_compiler():
    boxes, scores = random_boxes(50)
    torch.library.opcheck(torch.ops.visionkit.soft_nms.default, (boxes, scores, None, 0.5, 0.001, "gaussian", 0.3))
    compiled = torch.compile(soft_nms, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(boxes, scores), soft_nms(boxes, scores)))
