"""Each check is seen to pass on a sound backbone and to fail on one that breaks exactly that promise."""
import pytest
import torch
from torch import nn

from visionkit.structures import ImageList, PackedSequence
from visionkit.testing import check_backbone, check_token_backbone


class Sound(nn.Module):
    """Two levels, strides 2 and 4."""

    def __init__(self):
        super().__init__()
        self.strides = (2, 4)
        self.out_channels = (4, 6)
        self.first = nn.Conv2d(3, 4, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 6, 3, 2, 1)

    def forward(self, images):
        first = self.norm(self.first(images)).relu()
        return first, self.second(first)


class WrongStride(Sound):
    def __init__(self):
        super().__init__()
        self.strides = (2, 8)


class WrongChannels(Sound):
    def __init__(self):
        super().__init__()
        self.out_channels = (4, 8)


class NoStrides(Sound):
    def __init__(self):
        super().__init__()
        del self.strides


class ReturnsList(Sound):
    def forward(self, images):
        return list(super().forward(images))


class ExtraLevel(Sound):
    def forward(self, images):
        return (*super().forward(images), images)


class OnlySquare(Sound):
    def forward(self, images):
        first, second = super().forward(images)
        return first, second.transpose(2, 3)


class Detached(Sound):
    def forward(self, images):
        first, _ = super().forward(images)
        return first, self.second(first.detach()).detach()


class Idle(Sound):
    def forward(self, images):
        first, second = super().forward(images)
        return first, second * 0


class BatchStatistics(Sound):
    def train(self, mode=True):
        super().train(mode)
        self.norm.train()
        return self


class CentresOnTheBatch(Sound):
    def forward(self, images):
        return super().forward(images - images.mean())


class Random(Sound):
    def forward(self, images):
        return super().forward(images + torch.randn_like(images))


class InPlace(Sound):
    def forward(self, images):
        return super().forward(images.mul_(0.5))


class ForgetsEvalResult(Sound):
    def train(self, mode=True):
        super().train(mode)


class StaysInTraining(Sound):
    def train(self, mode=True):
        return self


class PlainTensor(Sound):
    def __init__(self):
        super().__init__()
        self.scale = torch.full((1, 3, 1, 1), 0.5)

    def forward(self, images):
        return super().forward(images * self.scale)


class LosesState(Sound):
    def load_state_dict(self, state_dict, strict=True, assign=False):
        return super().load_state_dict({**state_dict, "second.bias": torch.zeros(6)}, strict)


class RefusesBfloat16(Sound):
    def forward(self, images):
        first, second = super().forward(images)
        if second.dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return first, second


class NoEmptyBatch(Sound):
    def forward(self, images):
        if not len(images):
            raise RuntimeError("no images")
        return super().forward(images)


class NeedsContiguous(Sound):
    def forward(self, images):
        return super().forward(images.view(len(images), -1).view(images.shape))


class OverflowsInTraining(Sound):
    def forward(self, images):
        first, second = super().forward(images)
        return (first, second / 0 * 0) if self.training else (first, second)


def test_a_sound_backbone_passes_and_is_not_changed():
    backbone = Sound()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    check_backbone(backbone)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())


@pytest.mark.parametrize("broken, message", [
    (WrongStride, "stride 8"),
    (WrongChannels, "8 channels at stride 4"),
    (NoStrides, "NoStrides.strides must be a tuple"),
    (ReturnsList, "must return a tuple"),
    (ExtraLevel, "returns 3 feature maps and promises 2"),
    (OnlySquare, "feature map 1"),
    (Detached, "no gradient reaches 'second.weight', 'second.bias'"),
    (Idle, "'second.weight', 'second.bias' is exactly zero"),
    (BatchStatistics, "another result in a batch than alone|not deterministic"),
    (CentresOnTheBatch, "another result in a batch than alone"),
    (Random, "not deterministic"),
    (InPlace, "changes its input in place"),
    (ForgetsEvalResult, "does not return the module"),
    (StaysInTraining, "leaves training=True"),
    (PlainTensor, "'scale' as a plain tensor"),
    (LosesState, "after saving and loading"),
    (NoEmptyBatch, "an empty batch"),
    (RefusesBfloat16, "bfloat16"),
    (NeedsContiguous, "memory order"),
    (OverflowsInTraining, "not finite"),
], ids=lambda value: value.__name__ if isinstance(value, type) else "")
def test_a_broken_promise_is_named(broken, message):
    with pytest.raises(AssertionError, match=message):
        check_backbone(broken())


def test_a_backbone_may_refuse_an_empty_batch_when_it_says_so():
    check_backbone(NoEmptyBatch(), empty_batch=False)


def test_parameters_that_need_no_gradient_can_be_named():
    with pytest.raises(AssertionError, match="no gradient reaches"):
        check_backbone(Detached())
    check_backbone(Detached(), unused=["second.*"])


def test_frozen_parameters_need_no_gradient():
    backbone = Detached()
    backbone.second.requires_grad_(False)
    check_backbone(backbone)
    check_backbone(Sound().requires_grad_(False))


def test_a_residual_branch_that_starts_at_zero_is_sound():
    class ZeroStart(Sound):
        def __init__(self):
            super().__init__()
            nn.init.zeros_(self.norm.weight)
    check_backbone(ZeroStart())


# ------------------------------------------------------------------------------------------------------------- token backbones

class SoundTokens(nn.Module):
    """A linear map of each 4 x 4 patch; an image is cut out of a batch by its size."""
    returns_tokens = True

    def __init__(self):
        super().__init__()
        self.strides = (4,)
        self.out_channels = (6,)
        self.conv = nn.Conv2d(3, 6, 4, 4)

    def each(self, images):
        if isinstance(images, ImageList):
            return images.images
        if isinstance(images, torch.Tensor):
            return images.unbind()
        return [image[:, :h, :w] for image, (h, w) in zip(images.tensor, images.sizes, strict=True)]

    def forward(self, images):
        return self.pack([self.conv(image[None])[0] for image in self.each(images)])

    def pack(self, maps):
        return PackedSequence.pack([image.flatten(1).T for image in maps], [image.shape[1:] for image in maps])


class DoesNotSaySo(SoundTokens):
    returns_tokens = False


class TokensOfWrongStride(SoundTokens):
    def __init__(self):
        super().__init__()
        self.strides = (8,)


class TokensOfWrongChannels(SoundTokens):
    def __init__(self):
        super().__init__()
        self.out_channels = (8,)


class ReturnsMaps(SoundTokens):
    def pack(self, maps):
        return maps


class LosesAnImage(SoundTokens):
    def pack(self, maps):
        return super().pack(maps[1:])


class MixesImages(SoundTokens):
    def forward(self, images):
        tokens = super().forward(images)
        return tokens.replace(tokens.tokens + tokens.tokens.mean())


class SeesTheCanvas(SoundTokens):
    def each(self, images):
        return super().each(images if isinstance(images, ImageList | torch.Tensor) else images.tensor)


class ChangesImages(SoundTokens):
    def forward(self, images):
        for image in self.each(images):
            image.data.mul_(2)
        return super().forward(images)


class IdleTokens(SoundTokens):
    def __init__(self):
        super().__init__()
        self.idle = nn.Parameter(torch.ones(3))


def test_a_sound_token_backbone_passes():
    check_token_backbone(SoundTokens())


@pytest.mark.parametrize("backbone, said", [
    (DoesNotSaySo, "does not say returns_tokens=True"), (TokensOfWrongStride, r"stride 8 makes the grids .* got \(\(4, 4\)"),
    (TokensOfWrongChannels, "promises 8 channels"), (ReturnsMaps, "must return a PackedSequence, got list"),
    (LosesAnImage, "2 sequences of 3 images"), (MixesImages, "another result among others than alone"),
    (SeesTheCanvas, "another result in an image batch"), (ChangesImages, "changes its input in place"),
    (IdleTokens, "no gradient reaches 'idle'")])
def test_a_token_backbone_that_breaks_a_promise_is_told(backbone, said):
    with pytest.raises(AssertionError, match=said):
        check_token_backbone(backbone())


def test_a_token_backbone_is_sent_to_its_own_check():
    with pytest.raises(AssertionError, match="call check_token_backbone"):
        check_backbone(SoundTokens())
