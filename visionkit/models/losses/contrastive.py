"""Losses that tell pairs that belong together from pairs that do not, and what they say about mutual information.

A scorer gives every pair a number; joint pairs come from p(x, y), the others from p(x) p(y). The better the two can be told apart, the more
x says about y: I(X; Y) = KL(p(x, y) || p(x) p(y)). Each loss has a `bound`, its lower estimate of that, in nats.

Scores come as a square, u[i, j] or u[i, j, l]: that of the global vector of image i with location l of image j. The diagonal holds the
joint pairs; all N^2 - N other entries are pairs that do not belong together, and none of them is left out.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkit.registry import LOSSES

# N images, L locations of each, K candidates of which one is right, k noise samples a data sample; r = log p(x, y) / (p(x) p(y))

MEASURES = ("JSD", "GAN", "KL", "RKL", "H2", "X2", "W1")


@LOSSES.register_module()
class FenchelDualLoss(nn.Module):
    """The dual form of an f-divergence between joint and other pairs: E_other[b(u)] - E_joint[a(u)] (f-GAN, Nowozin et al. 2016,
    arXiv:1606.00709, eq. 6 and table 2; in Deep InfoMax, arXiv:1808.06670, eq. 4).

    | measure | a(u), joint | b(u), other | the best u |
    |---|---|---|---|
    | JSD | log 2 - sp(-u) | sp(u) - log 2 | r |
    | GAN | -sp(-u) | sp(u) | r |
    | KL | u | exp(u - 1) | r + 1 |
    | RKL | -exp(-u) | u - 1 | r |
    | H2 | 1 - exp(-u) | exp(u) - 1 | r / 2 |
    | X2 | u | u + u^2 / 4 | 2 (exp(r) - 1) |
    | W1 | u | u | none: the scorer must be Lipschitz |

    sp is softplus. JSD is shifted so that it is 0 where all scores are. KL is the bound of Nguyen, Wainwright and Jordan. For X2 the code
    of Deep InfoMax has u^2 and -(|u| + 1)^2 / 2, of which the loss has no least value; this is Pearson's pair.

    Args:
        measure: a row of the table.
    """

    def __init__(self, measure: str = "JSD") -> None:
        super().__init__()
        if measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}; DV is DonskerVaradhanLoss")
        self.measure = measure

    def forward(self, scores: Tensor) -> Tensor:
        """Scalar loss of `scores` [N, N] or [N, N, L]: joint pairs are averaged over images and locations, and so are the others.

        Raises:
            ValueError: the scores are no square of two images or more.
        """
        scores = _square(scores)
        return self.of_other(off_diagonal(scores)).mean() - self.of_joint(diagonal(scores)).mean()

    def of_joint(self, u: Tensor) -> Tensor:
        """a(u), entry by entry."""
        match self.measure:
            case "JSD":
                return math.log(2) - F.softplus(-u)
            case "GAN":
                return -F.softplus(-u)
            case "RKL":
                return -torch.exp(-u)
            case "H2":
                return 1 - torch.exp(-u)
            case _:                                          # KL, X2, W1
                return u

    def of_other(self, u: Tensor) -> Tensor:
        """b(u), entry by entry."""
        match self.measure:
            case "JSD":
                return F.softplus(u) - math.log(2)
            case "GAN":
                return F.softplus(u)
            case "KL":
                return torch.exp(u - 1)
            case "RKL":
                return u - 1
            case "H2":
                return torch.exp(u) - 1
            case "X2":
                return u + u.square() / 4
            case _:                                          # W1
                return u

    def bound(self, scores: Tensor) -> Tensor:
        """A lower bound of the mutual information, nats: that of Nguyen, Wainwright and Jordan, E_joint[r] - E_other[exp(r)] + 1, with
        the r that the scores stand for by the last column of the table. It holds for any scorer and is tight for the best.

        Raises:
            ValueError: the measure is W1.
        """
        scores = _square(scores)
        return self.log_ratio(diagonal(scores)).mean() - self.log_ratio(off_diagonal(scores)).exp().mean() + 1

    def log_ratio(self, u: Tensor) -> Tensor:
        """r, entry by entry, were the scores the best.

        Raises:
            ValueError: the measure is W1, which compares distances and says nothing of ratios.
        """
        match self.measure:
            case "KL":
                return u - 1
            case "H2":
                return 2 * u
            case "X2":
                return (1 + u / 2).clamp(min=1e-6).log()     # a score below -2 stands for no ratio
            case "W1":
                raise ValueError("W1 is a distance, from which no mutual information follows; take another measure for a bound")
            case _:                                          # JSD, GAN, RKL
                return u


@LOSSES.register_module()
class DonskerVaradhanLoss(nn.Module):
    """log E_other[exp(u)] - E_joint[u] (Donsker and Varadhan 1983; as an estimator MINE, Belghazi et al. 2018, arXiv:1801.04062, eq. 5).

    The logarithm is of the mean over all N^2 - N other pairs of a batch, so its gradient is biased, the more so the smaller the batch.
    """

    def __init__(self) -> None:                              # nn.Module's own takes any argument
        super().__init__()

    def forward(self, scores: Tensor) -> Tensor:
        """Scalar loss of `scores` [N, N] or [N, N, L].

        Raises:
            ValueError: the scores are no square of two images or more.
        """
        scores = _square(scores)
        others = off_diagonal(scores).flatten()
        return others.logsumexp(0) - math.log(len(others)) - diagonal(scores).mean()

    def bound(self, scores: Tensor) -> Tensor:
        """The lower bound of the mutual information that the loss is the negative of, nats. From few samples it may lie above the truth."""
        return -self(scores)


@LOSSES.register_module()
class InfoNCELoss(nn.Module):
    """Which of many candidates belongs to the global vector (van den Oord et al. 2018, arXiv:1807.03748, eq. 4; Deep InfoMax,
    arXiv:1808.06670, eq. 5).

    For image i and location l the candidates are that location and all locations of all other images, each with its score by the global
    vector of image i; the loss is the cross entropy of the right one, averaged over i and l. The other locations of image i, which belong
    to its global vector too, are no negatives.

    The negatives of an image are the same for all its locations, so nothing larger than the scores themselves is made.

    Args:
        own_image_logit: the L entries of the own image stay in the denominator with this score, as in Deep InfoMax's code: a constant that
            keeps the loss above 0 by very little. None leaves them out.
    """

    def __init__(self, own_image_logit: float | None = -10.0) -> None:
        super().__init__()
        self.own_image_logit = own_image_logit

    def forward(self, scores: Tensor) -> Tensor:
        """Scalar loss of `scores` [N, N] or [N, N, L].

        Raises:
            ValueError: the scores are no square of two images or more.
        """
        scores = _square(scores)
        negatives = off_diagonal(scores).flatten(1).logsumexp(1)                                            # [N]
        if self.own_image_logit is not None:
            negatives = torch.logaddexp(negatives, negatives.new_tensor(self.own_image_logit + math.log(scores.shape[2])))
        return F.softplus(negatives[:, None] - diagonal(scores)).mean()                                     # -log e^p / (e^p + e^negatives)

    def bound(self, scores: Tensor) -> Tensor:
        """log K - loss with K = 1 + (N - 1) L candidates, nats: a lower bound of the mutual information, and never more than log K.

        It is one of independent candidates. Locations of one image are not independent, so where L > 1 take it for an estimate.
        """
        return info_nce_bound(self(scores), 1 + _square(scores)[0, 1:].numel())


def info_nce(scores: Tensor, positive: Tensor) -> Tensor:
    """InfoNCE over an axis of candidates (arXiv:1807.03748, eq. 4): the mean of -log softmax of the right one.

    Args:
        scores: [M, K]; minus infinity for what is no candidate.
        positive: [M] int64, which of the K is right.

    Returns:
        a scalar; 0 where M is 0.
    """
    scores = _exact(scores)
    if not len(scores):
        return scores.sum()
    return F.cross_entropy(scores, positive)


def info_nce_bound(loss: Tensor, num_candidates: int) -> Tensor:
    """log K - loss, nats: the mutual information that InfoNCE with K independent candidates proves (arXiv:1807.03748, appendix A.1)."""
    return math.log(num_candidates) - loss


@LOSSES.register_module()
class NoiseContrastiveLoss(nn.Module):
    """Noise-contrastive estimation of an unnormalised density (Gutmann and Hyvarinen 2010, AISTATS, eq. 3; 2012, JMLR 13, eq. 8).

    A logistic regression tells data from k times as many noise samples; its logit is s(w) - log(k p_n(w)), s the model's log density.
    Where the noise density p_n is known, the best s is the log density of the data *with* its normaliser, and for k to infinity the
    gradient is that of maximum likelihood. InfoNCE is another loss: it asks which of K samples is data, does not change when a constant is
    added to all scores, and needs no p_n.
    """

    def __init__(self) -> None:                              # nn.Module's own takes any argument
        super().__init__()

    def forward(self, data_scores: Tensor, data_log_noise: Tensor, noise_scores: Tensor, noise_log_noise: Tensor) -> Tensor:
        """-E_data[log h] - k E_noise[log(1 - h)] with h = sigmoid(s - log(k p_n)) and k = M / D.

        Args:
            data_scores: [D] s of data samples.
            data_log_noise: [D] log p_n of the same.
            noise_scores: [M] s of noise samples, of any shape with M entries in all.
            noise_log_noise: log p_n of the same, of that shape.

        Raises:
            ValueError: there is no data or no noise, or a score without its noise density.
        """
        data, noise = self._log_ratios(data_scores, data_log_noise, noise_scores, noise_log_noise)
        k = noise.numel() / data.numel()
        return F.softplus(math.log(k) - data).mean() + k * F.softplus(noise - math.log(k)).mean()

    def bound(self, data_scores: Tensor, data_log_noise: Tensor, noise_scores: Tensor, noise_log_noise: Tensor) -> Tensor:
        """A lower bound of KL(data || noise), nats, by Nguyen, Wainwright and Jordan. Where data are joint pairs and noise the product
        of their marginals this is one of the mutual information."""
        data, noise = self._log_ratios(data_scores, data_log_noise, noise_scores, noise_log_noise)
        return data.mean() - noise.exp().mean() + 1

    @staticmethod
    def _log_ratios(data_scores: Tensor, data_log_noise: Tensor, noise_scores: Tensor, noise_log_noise: Tensor) -> tuple[Tensor, Tensor]:
        if data_scores.shape != data_log_noise.shape or noise_scores.shape != noise_log_noise.shape:
            raise ValueError(f"every score needs the log density of the noise at its sample: got scores {list(data_scores.shape)} and "
                             f"{list(noise_scores.shape)}, densities {list(data_log_noise.shape)} and {list(noise_log_noise.shape)}")
        if not data_scores.numel() or not noise_scores.numel():
            raise ValueError(f"noise-contrastive estimation needs data and noise, got {data_scores.numel()} and "
                             f"{noise_scores.numel()} samples")
        return _exact(data_scores) - data_log_noise, _exact(noise_scores) - noise_log_noise


def diagonal(scores: Tensor) -> Tensor:
    """[N, L]: those of the pairs that belong together. `scores` is [N, N, L]."""
    return scores.diagonal(dim1=0, dim2=1).T


def off_diagonal(scores: Tensor) -> Tensor:
    """[N, N - 1, L]: row by row, those of the pairs that do not belong together. `scores` is [N, N, L]."""
    count, _, locations = scores.shape
    between = scores.flatten(0, 1)[1:].unflatten(0, (count - 1, count + 1))[:, :-1]                         # N from diagonal to diagonal
    return between.reshape(count, count - 1, locations)


def _square(scores: Tensor) -> Tensor:
    """Scores as [N, N, L], in float32 or better also under autocast."""
    if scores.dim() not in (2, 3) or scores.shape[0] != scores.shape[1] or scores.shape[0] < 2 or not scores.numel():
        raise ValueError(f"scores of all images with all images are wanted, [N, N] or [N, N, L] with N at least 2; got "
                         f"{list(scores.shape)}. With one image there are no negatives: take a larger batch, and drop_last=True where the "
                         f"last one of an epoch is short")
    return _exact(scores if scores.dim() == 3 else scores[:, :, None])


def _exact(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
