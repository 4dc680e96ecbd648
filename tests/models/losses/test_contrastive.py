"""Losses of pairs against loops, closed forms and divergences that can be summed up."""
import math

import pytest
import torch
import torch.nn.functional as F

from visionkit.models.losses import (
    DonskerVaradhanLoss,
    FenchelDualLoss,
    InfoNCELoss,
    NoiseContrastiveLoss,
    info_nce,
    info_nce_bound,
)
from visionkit.models.losses.contrastive import MEASURES, diagonal, off_diagonal
from visionkit.registry import LOSSES

SQUARE_LOSSES = [*({"type": "FenchelDualLoss", "measure": measure} for measure in MEASURES), {"type": "DonskerVaradhanLoss"},
                 {"type": "InfoNCELoss"}, {"type": "InfoNCELoss", "own_image_logit": None}]
every_loss = pytest.mark.parametrize("config", SQUARE_LOSSES, ids=lambda config: "-".join(map(str, config.values())))


def random_scores(images=5, locations=9, dtype=torch.float64, scale=1.0):
    return torch.randn(images, images, locations, generator=torch.Generator().manual_seed(3), dtype=dtype) * scale


def by_hand(scores):
    """Joint and other scores of each location, in loops."""
    images, _, locations = scores.shape
    pairs = [(i, j, p) for i in range(images) for j in range(images) for p in range(locations)]
    return ([scores[i, j, p].item() for i, j, p in pairs if i == j], [scores[i, j, p].item() for i, j, p in pairs if i != j])


def mean(values):
    return sum(values) / len(values)


def softplus(value):
    return math.log1p(math.exp(value))


# As the code of Deep InfoMax writes them: one term for positive, one for negative samples; X2 is Pearson's.
LOOPS = {
    "JSD": (lambda u: math.log(2) - softplus(-u), lambda u: softplus(-u) + u - math.log(2)),
    "GAN": (lambda u: -softplus(-u), lambda u: softplus(-u) + u),
    "KL": (lambda u: u, lambda u: math.exp(u - 1)),
    "RKL": (lambda u: -math.exp(-u), lambda u: u - 1),
    "H2": (lambda u: 1 - math.exp(-u), lambda u: math.exp(u) - 1),
    "X2": (lambda u: u, lambda u: u + u * u / 4),
    "W1": (lambda u: u, lambda u: u),
}


@pytest.mark.parametrize("locations", [9, 1])
@pytest.mark.parametrize("measure", MEASURES)
def test_a_divergence_is_what_a_loop_over_all_pairs_gives(measure, locations):
    """Spec 1, item 1. Measured, all measures: 4e-16 in float64, 1e-07 in float32."""
    scores = random_scores(locations=locations)
    joint, other = by_hand(scores)
    positive, negative = LOOPS[measure]
    expected = mean([negative(u) for u in other]) - mean([positive(u) for u in joint])
    assert FenchelDualLoss(measure)(scores).item() == pytest.approx(expected, abs=1e-12)
    assert FenchelDualLoss(measure)(scores.float()).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("locations", [9, 1])
@pytest.mark.parametrize("own", [-10.0, None])
def test_infonce_is_the_cross_entropy_over_the_list_of_candidates(locations, own):
    """Spec 1, item 1. Measured: 9e-16 in float64, 4e-08 in float32."""
    scores = random_scores(locations=locations)
    terms = []
    for i in range(5):
        for p in range(locations):
            candidates = [scores[i, i, p].item()]
            for j in range(5):
                for q in range(locations):
                    if j != i:
                        candidates.append(scores[i, j, q].item())
                    elif own is not None:
                        candidates.append(own)
            terms.append(math.log(sum(math.exp(u) for u in candidates)) - candidates[0])
    assert InfoNCELoss(own)(scores).item() == pytest.approx(mean(terms), abs=1e-12)
    assert InfoNCELoss(own)(scores.float()).item() == pytest.approx(mean(terms), abs=1e-6)


@pytest.mark.parametrize("locations", [9, 1])
def test_donsker_varadhan_is_its_formula(locations):
    scores = random_scores(locations=locations)
    joint, other = by_hand(scores)
    expected = math.log(mean([math.exp(u) for u in other])) - mean(joint)
    assert DonskerVaradhanLoss()(scores).item() == pytest.approx(expected, abs=1e-12)
    assert DonskerVaradhanLoss().bound(scores).item() == pytest.approx(-expected, abs=1e-12)


@pytest.mark.parametrize("images, locations", [(5, 9), (2, 1)])
def test_a_scorer_that_knows_nothing_pays_the_closed_form(images, locations):
    """Spec 1, item 2. Measured, 5 images and 9 locations: JSD 0, DV 0, InfoNCE 3.610929 = log(1 + 36 + 9 e^-10)."""
    zero = torch.zeros(images, images, locations, dtype=torch.float64)
    assert FenchelDualLoss("JSD")(zero).item() == 0
    assert DonskerVaradhanLoss()(zero).item() == pytest.approx(0, abs=1e-12)
    others = (images - 1) * locations
    assert InfoNCELoss()(zero).item() == pytest.approx(math.log(1 + others + locations * math.exp(-10)), abs=1e-12)
    assert InfoNCELoss(None).bound(zero).item() == pytest.approx(0, abs=1e-12)
    for measure, at_zero in {"KL": math.exp(-1), "RKL": 0, "GAN": 2 * math.log(2), "H2": 0, "X2": 0, "W1": 0}.items():
        assert FenchelDualLoss(measure)(zero).item() == pytest.approx(at_zero, abs=1e-12)
    assert info_nce(torch.zeros(3, 7), torch.tensor([0, 6, 2])).item() == pytest.approx(math.log(7), abs=1e-6)


@every_loss
def test_the_order_of_the_images_does_not_matter_but_who_belongs_to_whom_does(config):
    """Spec 1, item 3."""
    loss = LOSSES.build(config)
    scores = random_scores()
    scores[range(5), range(5)] += 3                          # the global vector knows its image
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(loss(scores[order][:, order]), loss(scores), rtol=0, atol=1e-12)
    assert loss(scores[:, order]) > loss(scores) + 0.5


@every_loss
def test_every_entry_has_the_gradient_of_its_kind(config):
    """Every joint score shall rise, and every other one fall, X2 aside, whose other scores have an optimum."""
    loss = LOSSES.build(config)
    scores = (random_scores(4, 3, scale=0.3)).requires_grad_()
    assert torch.autograd.gradcheck(loss, (scores,))
    loss(scores).backward()
    assert (diagonal(scores.grad) < 0).all()
    assert (off_diagonal(scores.grad) > 0).all()
    flat = scores.detach()[:, :, 0]
    torch.testing.assert_close(loss(flat), loss(flat[:, :, None]))


def test_diagonal_and_off_diagonal_part_the_entries():
    scores = torch.arange(16).view(4, 4, 1)
    assert diagonal(scores).flatten().tolist() == [0, 5, 10, 15]
    assert off_diagonal(scores)[..., 0].tolist() == [[1, 2, 3], [4, 6, 7], [8, 9, 11], [12, 13, 14]]


@pytest.mark.parametrize("loss", [FenchelDualLoss("JSD"), FenchelDualLoss("GAN"), DonskerVaradhanLoss(), InfoNCELoss()],
                         ids=["JSD", "GAN", "DV", "InfoNCE"])
def test_huge_scores_overflow_nowhere(loss):
    scores = (random_scores(dtype=torch.float32) * 1e4).requires_grad_()
    value = loss(scores)
    value.backward()
    assert value.isfinite()
    assert scores.grad.isfinite().all()


@every_loss
def test_a_joint_score_too_large_for_an_exponential_does_not_spoil_the_others(config):
    """What is masked out must be masked before the exponential: 0 times infinity is no gradient."""
    scores = torch.zeros(3, 3, 1)
    scores[range(3), range(3)] = 1e3
    scores.requires_grad_()
    LOSSES.build(config)(scores).backward()
    assert scores.grad.isfinite().all()


def test_losses_are_computed_in_float32_under_autocast():
    scores = random_scores(dtype=torch.bfloat16)
    assert all(LOSSES.build(config)(scores).dtype == torch.float32 for config in SQUARE_LOSSES)


def test_infonce_keeps_nothing_larger_than_the_scores():
    """64 images with 64 locations have 64 * 64 * 4033 candidate scores in all, 15.7 times 64 * 64 * 257."""
    scores = torch.zeros(64, 64, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        InfoNCELoss()(scores)
    assert max(kept) <= scores.numel()


# Mutual information that can be summed up: x and y of 3 values each, with a known table of probabilities. The expectations are exact when
# images stand for a fair sample, so here the terms are weighted by hand.

TABLE = torch.tensor([[0.25, 0.04, 0.01], [0.05, 0.20, 0.05], [0.01, 0.09, 0.30]], dtype=torch.float64)
PRODUCT = TABLE.sum(1, keepdim=True) * TABLE.sum(0)
RATIO = (TABLE / PRODUCT).log()
INFORMATION = (TABLE * RATIO).sum().item()                   # 0.419 nats
DIVERGENCE = {
    "JSD": (TABLE * (2 * TABLE / (TABLE + PRODUCT)).log() + PRODUCT * (2 * PRODUCT / (TABLE + PRODUCT)).log()).sum().item(),
    "KL": INFORMATION, "RKL": -(PRODUCT * RATIO).sum().item(),
    "H2": (TABLE.sqrt() - PRODUCT.sqrt()).square().sum().item(), "X2": ((TABLE - PRODUCT).square() / PRODUCT).sum().item(),
}
DIVERGENCE["GAN"] = DIVERGENCE["JSD"] - 2 * math.log(2)
BEST = {"JSD": RATIO, "GAN": RATIO, "KL": RATIO + 1, "RKL": RATIO, "H2": RATIO / 2, "X2": 2 * (RATIO.exp() - 1)}


@pytest.mark.parametrize("measure", BEST)
def test_the_best_scores_reach_the_divergence_and_all_others_stay_below(measure):
    loss = FenchelDualLoss(measure)

    def value(u):
        return ((TABLE * loss.of_joint(u)).sum() - (PRODUCT * loss.of_other(u)).sum()).item()

    assert value(BEST[measure]) == pytest.approx(DIVERGENCE[measure], abs=1e-12)
    for seed in range(5):
        noise = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.3
        assert value(BEST[measure] + noise) < DIVERGENCE[measure]
    torch.testing.assert_close(loss.log_ratio(BEST[measure]), RATIO)


def fair_batch():
    """Scores' places (x, y) [N, N] of a batch of 100 pairs in which every pair of values is as frequent as it should be."""
    counts = (TABLE * 100).round().long()
    cells = [(x, y) for x in range(3) for y in range(3) for _ in range(int(counts[x, y]))]
    xs, ys = torch.tensor(cells).T
    return xs[:, None].expand(-1, len(ys)), ys[None].expand(len(xs), -1)


@pytest.mark.parametrize("loss, best", [*((FenchelDualLoss(measure), BEST[measure]) for measure in BEST), (DonskerVaradhanLoss(), RATIO)],
                         ids=[*BEST, "DV"])
def test_with_the_best_scores_the_bound_is_the_mutual_information(loss, best):
    """The other pairs of a batch are its own values without the joint ones, so exp(r) averages (100 - E[exp(r)]) / 99 rather than 1."""
    scores = best[fair_batch()]
    other = (100 - (TABLE * RATIO.exp()).sum().item()) / 99
    expected = INFORMATION - math.log(other) if isinstance(loss, DonskerVaradhanLoss) else INFORMATION - other + 1
    assert loss.bound(scores).item() == pytest.approx(expected, abs=1e-9)
    worse = best + torch.tensor([[-0.3, 0.2, 0], [0.1, -0.3, 0.2], [0.3, 0, -0.2]], dtype=torch.float64)
    assert loss.bound(worse[fair_batch()]).item() < expected


def test_the_bound_of_infonce_is_capped_by_the_logarithm_of_its_candidates():
    scores = torch.zeros(6, 6, 4)
    scores[range(6), range(6)] = 100.0                       # all is known
    assert InfoNCELoss(None).bound(scores).item() == pytest.approx(math.log(1 + 5 * 4), abs=1e-6)
    assert InfoNCELoss(None).bound(RATIO[fair_batch()]).item() == pytest.approx(INFORMATION, abs=0.02)
    assert info_nce_bound(torch.tensor(1.5), 8).item() == pytest.approx(math.log(8) - 1.5)


def test_candidates_of_minus_infinity_are_none_and_no_rows_are_no_loss():
    scores = torch.tensor([[1.0, 2, -math.inf], [0, -math.inf, 3]])
    expected = (softplus(2 - 1) + softplus(0 - 3)) / 2
    assert info_nce(scores, torch.tensor([0, 2])).item() == pytest.approx(expected)
    assert info_nce(scores[:0], torch.zeros(0, dtype=torch.int64)).item() == 0


# Noise-contrastive estimation: 4 states, 10 data samples of frequencies .1 .2 .3 .4, and 20 noise samples from the uniform distribution.

DATA = torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3, 3])
NOISE = torch.arange(4).repeat(5)
UNIFORM = math.log(1 / 4)


def nce(scores):
    return NoiseContrastiveLoss()(scores[DATA], torch.full((10,), UNIFORM, dtype=scores.dtype),
                                  scores[NOISE], torch.full((20,), UNIFORM, dtype=scores.dtype))


def test_noise_contrastive_estimation_is_a_logistic_regression_of_data_against_noise():
    scores = torch.tensor([0.3, -1.0, 0.5, 0.1], dtype=torch.float64)
    logits = scores - math.log(2 * 0.25)                     # two noise samples for one of data
    expected = (F.binary_cross_entropy_with_logits(logits[DATA], torch.ones(10, dtype=torch.float64), reduction="sum")
                + F.binary_cross_entropy_with_logits(logits[NOISE], torch.zeros(20, dtype=torch.float64), reduction="sum")) / 10
    assert nce(scores).item() == pytest.approx(expected.item(), abs=1e-12)
    assert torch.autograd.gradcheck(nce, (scores.requires_grad_(),))


def test_noise_contrastive_estimation_finds_the_density_with_its_normaliser_and_infonce_does_not():
    scores = torch.full((4,), 2.0, dtype=torch.float64, requires_grad=True)               # sums to 4 e^2, not to 1
    optimizer = torch.optim.LBFGS([scores], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = nce(scores)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert scores.exp().tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=1e-4)
    shifted = scores.detach() + 1.0                          # no longer normalised
    assert nce(shifted) > nce(scores) + 0.1
    candidates = torch.stack([DATA[:5], NOISE[:5]], 1)
    right = torch.zeros(5, dtype=torch.int64)
    assert info_nce(shifted[candidates], right).item() == pytest.approx(info_nce(scores.detach()[candidates], right).item(), abs=1e-12)


def test_with_more_noise_the_gradient_comes_closer_to_that_of_maximum_likelihood():
    """At s = log p_model, normalised, that is -p_data + p_model."""
    model = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    likelihood = model - torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

    def distance(repeats):
        scores = model.log().requires_grad_()
        noise = torch.arange(4).repeat(repeats)
        NoiseContrastiveLoss()(scores[DATA], torch.full((10,), UNIFORM).double(), scores[noise],
                               torch.full((len(noise),), UNIFORM).double()).backward()
        return (scores.grad - likelihood).abs().max().item()

    assert distance(5) > 5 * distance(50) > 0
    assert distance(2500) < 1e-3


def test_the_bound_of_noise_contrastive_estimation_is_the_divergence_of_data_from_noise():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    data_noise, noise_noise = torch.full((10,), UNIFORM).double(), torch.full((20,), UNIFORM).double()
    divergence = (p * (p / 0.25).log()).sum().item()
    best, worse = (NoiseContrastiveLoss().bound(scores[DATA], data_noise, scores[NOISE], noise_noise).item()
                   for scores in (p.log(), p.log() + 0.3))
    assert best == pytest.approx(divergence, abs=1e-9)
    assert worse < divergence


@pytest.mark.parametrize("call, said", [
    (lambda: InfoNCELoss()(torch.zeros(1, 1, 4)), r"N at least 2; got \[1, 1, 4\]"),
    (lambda: DonskerVaradhanLoss()(torch.zeros(3, 4)), r"got \[3, 4\]"),
    (lambda: FenchelDualLoss("DV"), "DV is DonskerVaradhanLoss"),
    (lambda: FenchelDualLoss("W1").bound(torch.zeros(3, 3)), "W1 is a distance"),
    (lambda: NoiseContrastiveLoss()(torch.zeros(3), torch.zeros(2), torch.zeros(4), torch.zeros(4)), "log density of the noise"),
    (lambda: NoiseContrastiveLoss()(torch.zeros(0), torch.zeros(0), torch.zeros(4), torch.zeros(4)), "got 0 and 4 samples")])
def test_what_cannot_be_compared_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
