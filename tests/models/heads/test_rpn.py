import pytest
import torch

from visionkit.models.heads.rpn import RPN
from visionkit.structures import InstanceData, Sample

NO_BOXES = torch.zeros(0, 4)


def sample(boxes=(), size=(64, 96)) -> Sample:
    sample = Sample(metainfo={"img_shape": size})
    sample.gt_instances = InstanceData(bboxes=torch.tensor(boxes).view(-1, 4))
    sample.ignored_instances = InstanceData(bboxes=NO_BOXES)
    return sample


def rpn(**changes) -> RPN:
    """Anchors are squares of 32 and 64 pixels, eight apart."""
    torch.manual_seed(0)
    return RPN(**{"in_channels": (4,), "strides": (8,), "anchor_scales": (4, 8), "anchor_ratios": (1.0,)} | changes)


def sampled(model: RPN, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """The positive and the negative anchors that the network learns from in an image of 64 x 96."""
    drawn = []
    model.sampler.register_forward_hook(lambda _, arguments, indices: drawn.extend(indices))
    features = [torch.randn(1, 4, 8, 12)]
    objectness = model(features)
    assert all(loss.isfinite() for loss in model.loss(features, objectness, [sample]).values())
    return tuple(objectness.anchors[0][indices] for indices in drawn)


def test_anchors_beyond_the_image_are_learned_from_only_where_they_may_be():
    """Of 192, in rows of 12 positions: 5 x 9 of the small ones lie within the image, and 1 x 5 of the large ones."""
    everything = {"sampler": {"type": "AllSampler"}}
    assert len(sampled(rpn(**everything), sample())[1]) == 192
    _, within = sampled(rpn(**everything, cross_boundary=False), sample())
    assert len(within) == 5 * 9 + 1 * 5
    assert within[:, :2].min() == 0
    assert within.amax(0).tolist()[2:] == [96, 64]


def test_an_object_in_the_corner_keeps_the_best_of_the_anchors_within_the_image():
    """Four anchors hold all of it, IoU 400 / 1024, and reach beyond the image of 60 x 92; of the others one overlaps by 16 x 16."""
    corner, recipe = sample(((72.0, 40, 92, 60),), (60, 92)), {"matcher": {"type": "IoUMatcher", "rescue_from": 0.01}}
    assert sampled(rpn(**recipe), corner)[0][:, 2:].amin(0).tolist() == [96, 64]
    assert sampled(rpn(**recipe, cross_boundary=False), corner)[0].tolist() == [[56, 24, 88, 56]]


def test_an_image_with_no_anchor_to_learn_from_has_no_loss_and_every_parameter_a_gradient():
    model = rpn(cross_boundary=False)
    features = [torch.randn(1, 4, 2, 2)]                                                          # 16 pixels: no anchor fits
    losses = model.loss(features, model(features), [sample(size=(16, 16))])
    assert losses["loss_rpn_class"].item() == losses["loss_rpn_box"].item() == 0
    sum(losses.values()).backward()
    assert not [name for name, value in model.named_parameters() if value.grad is None]           # or other ranks would wait for it


@pytest.mark.parametrize("counts", [2000, (2000,), (0, 1000)])
def test_one_number_of_proposals_for_two_phases_is_refused(counts):
    with pytest.raises(ValueError, match="post_nms is how many proposals to keep in training and in testing"):
        rpn(post_nms=counts)
