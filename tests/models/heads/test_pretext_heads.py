"""Heads that answer puzzles, with values worked out by hand."""
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from visionkit.models.heads import ClassificationHead, JigsawHead, RelativePatchHead, RotationHead


def test_rotation_is_a_linear_layer_on_the_mean_of_the_map():
    head = RotationHead(2)
    with torch.no_grad():
        head.classify.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0]]))
    features = torch.tensor([[[[1.0, 3]], [[2, 6]]]])                                   # means 2 and 4
    torch.testing.assert_close(head(features), torch.tensor([[2.0, 4, 6, 0]]))


@pytest.mark.parametrize("head", [RotationHead(2), RelativePatchHead(2, 4), JigsawHead(2, 5, 3, 4)], ids=lambda head: type(head).__name__)
def test_the_loss_is_the_mean_cross_entropy_of_all_puzzles(head):
    logits = torch.tensor([[[0.0, 0, 0], [math.log(2.0), 0, 0]]])
    labels = torch.tensor([[2, 0]])
    assert head.loss(logits, labels).item() == pytest.approx((math.log(3) - math.log(2 / 4)) / 2)
    assert head.loss(logits[0], labels[0]).item() == pytest.approx((math.log(3) + math.log(2)) / 2)


EVERY_HEAD = pytest.mark.parametrize("head", [RotationHead(2), RelativePatchHead(2, 4), JigsawHead(2, 5, 3, 4), ClassificationHead(2, 5),
                                              ClassificationHead(2, 5, label_smoothing=0.3)], ids=lambda head: type(head).__name__)


@EVERY_HEAD
def test_processes_with_unequally_many_images_learn_as_one_with_all(monkeypatch, head):
    """DDP averages the gradients of both: a mean of means would count each image of the smaller pack for more."""
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 5, requires_grad=True), torch.randint(5, (7,))
    (expected,) = torch.autograd.grad(head.loss(logits, labels), logits)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda total: total.fill_(7))
    on_ranks = [torch.autograd.grad(head.loss(logits[part], labels[part]), logits)[0] for part in (slice(0, 2), slice(2, 7))]
    torch.testing.assert_close(sum(on_ranks) / 2, expected)


@EVERY_HEAD
def test_alone_the_loss_is_the_mean_and_of_no_images_it_is_0(head):
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 5, requires_grad=True), torch.randint(5, (7,))
    mean = F.cross_entropy(logits, labels, label_smoothing=getattr(head, "label_smoothing", 0.0))
    torch.testing.assert_close(head.loss(logits, labels), mean, rtol=1e-6, atol=0)
    none = head.loss(logits[:0], labels[:0])
    none.backward()
    assert none.item() == 0
    assert (logits.grad == 0).all()


def test_relative_patch_is_the_published_stack_in_order():
    torch.manual_seed(0)
    head = RelativePatchHead(3)
    assert head.hidden.weight.shape == (4096, 6)
    assert head.hidden.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert head.classify.weight.std().item() == pytest.approx(0.005, rel=0.05)
    assert (head.norm.momentum, head.dropout.p) == (0.003, 0.5)
    head.eval()
    with torch.no_grad():
        head.norm.running_mean.normal_(0, 0.01)
        centre, neighbour = torch.randn(5, 3), torch.randn(5, 3)
        hidden = torch.cat([centre, neighbour], 1) @ head.hidden.weight.T + head.hidden.bias
        hidden = ((hidden - head.norm.running_mean) / (head.norm.running_var + head.norm.eps).sqrt()).clamp(min=0)
        torch.testing.assert_close(head(centre, neighbour), hidden @ head.classify.weight.T + head.classify.bias)
        assert not torch.allclose(head(centre, neighbour), head(neighbour, centre))     # it matters which is the centre


def test_jigsaw_puts_the_embeddings_in_the_order_asked():
    torch.manual_seed(0)
    head = JigsawHead(2, 6, tile_channels=4, hidden_channels=8).eval()
    tiles = torch.randn(3, 9, 2)
    orders = torch.stack([torch.randperm(9) for _ in range(6)]).view(3, 2, 9)
    with torch.no_grad():
        logits = head(tiles, orders)
        assert logits.shape == (3, 2, 6)
        for image in range(3):
            for turn in range(2):
                shuffled = torch.cat([head.tile(tiles[image, tile]).relu() for tile in orders[image, turn].tolist()])
                torch.testing.assert_close(logits[image, turn], head.classify(head.hidden(shuffled).relu()))


def test_the_jigsaw_head_drops_units_of_both_layers():
    head = JigsawHead(2, 6, tile_channels=400, hidden_channels=800, dropout=0.25)
    dropped = []

    def note(_, inputs, output):
        alive = inputs[0] != 0
        dropped.append((alive & (output == 0)).sum() / alive.sum())

    head.dropout.register_forward_hook(note)
    head(torch.randn(4, 9, 2), torch.arange(9).expand(4, 1, 9))
    assert [part.item() for part in dropped] == pytest.approx([0.25, 0.25], abs=0.05)


@pytest.mark.parametrize("head, arguments", [(RotationHead(4), [(2, 4, 3, 3)]), (RelativePatchHead(4, 8), [(2, 4), (2, 4)])],
                         ids=["rotation", "relative patch"])
def test_logits_are_float32_under_autocast_and_float64_where_the_head_is(head, arguments):
    given = [torch.randn(*shape) for shape in arguments]
    with torch.autocast("cpu", torch.bfloat16):
        assert head(*given).dtype == torch.float32
    assert nn.Module.double(head)(*[value.double() for value in given]).dtype == torch.float64
