import copy

import pytest
import torch
from torch import nn

from visionkit.ops.checkpointing import recompute


def block(momentum=0.1) -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8, momentum=momentum)
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Conv2d(8, 4, 3))


def step(module: nn.Module, images: torch.Tensor, recomputed: bool) -> list[torch.Tensor]:
    """Output, gradients and buffers of one training step."""
    images = images.clone().requires_grad_()
    torch.manual_seed(1)
    output = recompute(module, images) if recomputed else module(images)
    output.square().sum().backward()
    return [output, images.grad, *(parameter.grad for parameter in module.parameters()), *module.buffers()]


@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving average", "mean of all batches"])
def test_a_recomputed_block_gives_the_same_outputs_gradients_and_statistics(momentum):
    plain = block(momentum)
    recomputed = copy.deepcopy(plain)
    for seed in range(2):
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        for ours, theirs in zip(step(recomputed, images, True), step(plain, images, False), strict=True):
            assert torch.equal(ours, theirs)
    assert recomputed[1].num_batches_tracked.item() == 2
    assert recomputed[1].momentum == momentum
    assert recomputed.state_dict().keys() == plain.state_dict().keys()


def test_nothing_but_the_inputs_is_kept_until_the_backward_pass():
    def kept_by(call) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor):
            call(torch.randn(2, 3, 8, 8, requires_grad=True))
        return sum(sizes)

    module = block()
    assert kept_by(lambda images: recompute(module, images)) <= 2 * 3 * 8 * 8
    assert kept_by(module) > 2 * 8 * 6 * 6


def test_without_gradients_nothing_is_recomputed():
    calls = []
    module = block().eval()
    module.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        assert not recompute(module, torch.randn(1, 3, 8, 8)).requires_grad
    assert len(calls) == 1
