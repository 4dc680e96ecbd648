"""Each check is seen to pass on a sound detector and to fail on one that breaks exactly that promise."""
import pytest
import torch
from torch import nn

from visionkit.models.base import Model
from visionkit.structures import InstanceData
from visionkit.testing import check_model

CLASSES = 3


class Sound(Model):
    """One box for each cell of 16 x 16 pixels: the least that is a detector."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 4, 16, 16)
        self.classify = nn.Conv2d(4, CLASSES, 1)
        self.regress = nn.Conv2d(4, 4, 1)

    def forward(self, images):
        features = self.features(images.tensor).relu()
        return self.classify(features).flatten(2).mT, self.regress(features).flatten(2).mT     # [B, P, classes], [B, P, 4]

    def loss(self, images, samples):
        logits, boxes = self(images)
        present = torch.zeros(len(samples), CLASSES)
        for row, sample in zip(present, samples, strict=True):
            row[sample.gt_instances.labels] = 1.0
        targets = [sample.gt_instances.bboxes.mean(0) if len(sample.gt_instances.bboxes) else row.mean(0).detach()
                   for row, sample in zip(boxes, samples, strict=True)]
        return {"class": nn.functional.binary_cross_entropy_with_logits(logits.amax(1).float(), present),
                "box": (boxes.mean(1).float() - torch.stack(targets).float()).abs().mean()}

    def predict(self, images, samples):
        logits, boxes = self(images)
        for scores, offsets, sample, (height, width) in zip(logits.sigmoid(), boxes, samples, images.sizes, strict=True):
            columns = images.tensor.shape[-1] // 16
            cells = torch.arange(len(offsets))
            corner = torch.stack([cells % columns, cells // columns], dim=1) * 16 + offsets[:, :2].double().tanh() * 8
            found = torch.cat([corner, corner + 8 + offsets[:, 2:].double().tanh() * 8], dim=1)
            limit = torch.tensor([width, height, width, height])
            found = torch.minimum(found.clamp(min=0), limit) / torch.tensor(sample.scale_factor).repeat(2)
            best, labels = scores.double().max(1)
            best, order = best.sort(descending=True, stable=True)
            sample.pred_instances = self.finish(InstanceData(bboxes=found[order], scores=best, labels=labels[order]), sample)
        return samples

    def finish(self, found, sample):
        return found


class ForgetsScale(Sound):
    def finish(self, found, sample):
        found.bboxes = found.bboxes * torch.tensor(sample.scale_factor).repeat(2)
        return found


class ForgetsToClip(Sound):
    def finish(self, found, sample):
        found.bboxes = found.bboxes + 16
        return found


class Unsorted(Sound):
    def finish(self, found, sample):
        return found[torch.arange(len(found.bboxes) - 1, -1, -1)]


class LabelsOfOthers(Sound):
    def finish(self, found, sample):
        found.labels = found.labels + CLASSES
        return found


class Logits(Sound):
    def finish(self, found, sample):
        found.scores = found.scores * 100
        return found


class CornersSwapped(Sound):
    def finish(self, found, sample):
        found.bboxes = found.bboxes[:, [2, 3, 0, 1]]
        return found


class NoScores(Sound):
    def finish(self, found, sample):
        return InstanceData(bboxes=found.bboxes, labels=found.labels)


class FindsNothing(Sound):
    def finish(self, found, sample):
        return found[:0]


class RandomScores(Sound):
    def finish(self, found, sample):
        found.scores = torch.rand_like(found.scores).sort(descending=True).values
        return found


class SharesStatistics(Sound):
    def predict(self, images, samples):
        shifted = images.tensor - images.tensor.mean()
        return super().predict(type(images)(shifted, images.sizes), samples)


class LosesAnImage(Sound):
    def predict(self, images, samples):
        return super().predict(images, samples)[::-1]


class InfiniteLoss(Sound):
    def loss(self, images, samples):
        return {**super().loss(images, samples), "extra": torch.tensor(1.0) / 0}


class FailsWithoutBoxes(Sound):
    def loss(self, images, samples):
        for sample in samples:
            sample.gt_instances.bboxes.amax(0)
        return super().loss(images, samples)


class NanWithoutBoxes(Sound):
    def loss(self, images, samples):
        losses = super().loss(images, samples)
        losses["box"] = losses["box"] * torch.cat([sample.gt_instances.bboxes for sample in samples]).mean()
        return losses


class SkipsTheBoxLossWithoutBoxes(Sound):
    def loss(self, images, samples):
        losses = super().loss(images, samples)
        if not any(len(sample.gt_instances.bboxes) for sample in samples):
            del losses["box"]
        return losses


class DetachedBoxes(Sound):
    def loss(self, images, samples):
        losses = super().loss(images, samples)
        return {**losses, "box": losses["box"].detach()}


class VectorLoss(Sound):
    def loss(self, images, samples):
        return {**super().loss(images, samples), "each": self(images)[0].mean((1, 2))}


class DetachedLoss(Sound):
    def loss(self, images, samples):
        return {key: value.detach() for key, value in super().loss(images, samples).items()}


class PredictsInFloat32Only(Sound):
    def predict(self, images, samples):
        if self(images)[0].dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return super().predict(images, samples)


class TrainsInFloat32Only(Sound):
    def loss(self, images, samples):
        if self(images)[0].dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return super().loss(images, samples)


class PlainTensor(Sound):
    def __init__(self):
        super().__init__()
        self.weights = torch.ones(4)


def test_a_sound_detector_passes_and_is_not_changed():
    model = Sound()
    check_model(model, num_classes=CLASSES)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("broken, message", [
    (ForgetsScale, "not twice as large"),
    (ForgetsToClip, "outside of the original image"),
    (Unsorted, "highest score first"),
    (LabelsOfOthers, r"not integers in \[0, 3\)"),
    (Logits, r"scores outside of \[0, 1\]"),
    (CornersSwapped, "x2 < x1"),
    (NoScores, "leaves out scores"),
    (FindsNothing, "predicts nothing on random images"),
    (RandomScores, "two results for the same images"),
    (SharesStatistics, "another result in a batch than alone"),
    (LosesAnImage, "one sample an image, in the order given"),
    (InfiniteLoss, "'extra' is inf"),
    (FailsWithoutBoxes, "loss fails on images without boxes: IndexError"),
    (NanWithoutBoxes, "without boxes: 'box' is nan"),
    (SkipsTheBoxLossWithoutBoxes, "no gradient reaches 'regress.weight'"),
    (DetachedBoxes, "no gradient reaches 'regress.weight'"),
    (VectorLoss, "'each' must be a scalar"),
    (DetachedLoss, "has no gradient"),
    (PredictsInFloat32Only, "predict fails under bfloat16 autocast"),
    (TrainsInFloat32Only, "loss fails under bfloat16 autocast"),
    (PlainTensor, "'weights' as a plain tensor"),
], ids=lambda value: value.__name__ if isinstance(value, type) else "")
def test_a_broken_promise_is_named(broken, message):
    with pytest.raises(AssertionError, match=message):
        check_model(broken(), num_classes=CLASSES)


def test_what_is_no_model_is_refused():
    with pytest.raises(AssertionError, match="must be a visionkit.models.base.Model"):
        check_model(nn.Linear(1, 1), num_classes=CLASSES)
