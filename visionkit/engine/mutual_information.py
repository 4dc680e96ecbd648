"""Estimators of mutual information where the truth is known: correlated Gaussians (as in Belghazi et al. 2018, arXiv:1801.04062, sec. 4.1,
and Poole et al. 2019, arXiv:1905.06922, sec. 3)."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from visionkit.models.layers import MLP
from visionkit.models.losses import DonskerVaradhanLoss, FenchelDualLoss, InfoNCELoss

# N pairs of a batch, D dimensions of each of the two vectors of a pair


class Estimator(NamedTuple):
    """How a scorer is trained and what is read from it."""
    loss: nn.Module             # scores [N, N] to a scalar, with a `bound`
    batch: int                  # N
    cap: float | None = None    # the most that the bound can be, nats


ESTIMATORS: dict[str, Estimator] = {
    "DV": Estimator(DonskerVaradhanLoss(), 64),
    "NWJ (KL)": Estimator(FenchelDualLoss("KL"), 64),
    "JSD, read by NWJ": Estimator(FenchelDualLoss("JSD"), 64),
    **{f"InfoNCE, N = {batch}": Estimator(InfoNCELoss(own_image_logit=None), batch, math.log(batch)) for batch in (16, 64, 256)},
}


class Estimate(NamedTuple):
    """What an estimator says of fresh batches after its training."""
    name: str
    truth: float                # nats
    mean: float                 # of the bound over batches, nats
    deviation: float            # its standard deviation from batch to batch


class SeparableScorer(nn.Module):
    """u[i, j] = <f(x_i), h(y_j)>, f and h perceptrons, so that a batch costs N runs of each and not N^2.

    Args:
        dimension: D.
        hidden_channels: of the perceptrons.
        score_channels: of the space where they meet.
    """

    def __init__(self, dimension: int, hidden_channels: int = 128, score_channels: int = 32) -> None:
        super().__init__()
        self.of_x = MLP(dimension, hidden_channels, score_channels, 3)
        self.of_y = MLP(dimension, hidden_channels, score_channels, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[N, D] and [N, D] to [N, N]."""
        return self.of_x(x) @ self.of_y(y).T


def gaussian_information(dimension: int, correlation: float) -> float:
    """Mutual information, nats, of two standard normal vectors that are correlated dimension by dimension: -D / 2 log(1 - rho^2)."""
    return -dimension / 2 * math.log1p(-correlation**2)


def correlation_for(dimension: int, information: float) -> float:
    """The correlation at which `gaussian_information` is `information` nats."""
    return math.sqrt(-math.expm1(-2 * information / dimension))


def correlated_gaussians(count: int, dimension: int, correlation: float) -> tuple[Tensor, Tensor]:
    """Pairs x, y [count, dimension], each standard normal; from torch's global generator."""
    x, noise = torch.randn(2, count, dimension)
    return x, correlation * x + math.sqrt(1 - correlation**2) * noise


def estimate(name: str, dimension: int, information: float, *, iterations: int, lr: float = 1e-3, test_batches: int = 200,
             scorer: Callable[[int], nn.Module] = SeparableScorer, seed: int = 0) -> Estimate:
    """Train a scorer with one of `ESTIMATORS` on ever fresh pairs, and read its bound on fresh batches of the same size.

    No pair is seen twice, so nothing is learnt by heart; what the estimate lacks or has too much is the estimator's, or the training's.
    The generator of random numbers is afterwards as it was.

    Args:
        name: of the estimator.
        dimension: D.
        information: the truth, nats.
        iterations: of training, by Adam.
        lr: its rate, falling to 0 over the last half.
        test_batches: how many the mean and deviation are over.
        scorer: makes the network from D.
        seed: of the weights and the pairs.
    """
    loss, batch, _ = ESTIMATORS[name]
    correlation = correlation_for(dimension, information)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = scorer(dimension)
        optimizer = torch.optim.Adam(network.parameters(), lr=lr)
        for iteration in range(iterations):
            optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - iteration / iterations))
            optimizer.zero_grad()
            loss(network(*correlated_gaussians(batch, dimension, correlation))).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 10.0)            # NWJ's exponential explodes now and then
            optimizer.step()
        with torch.inference_mode():
            bounds = torch.stack([loss.bound(network(*correlated_gaussians(batch, dimension, correlation))) for _ in range(test_batches)])
    return Estimate(name, information, bounds.mean().item(), bounds.std().item())


def estimates(dimension: int, truths: Sequence[float], iterations: int, test_batches: int = 200, seed: int = 0) -> Iterator[Estimate]:
    """Every estimator at every truth (nats), by truth and then in the order of `ESTIMATORS`."""
    for truth in truths:
        for name in ESTIMATORS:
            yield estimate(name, dimension, truth, iterations=iterations, test_batches=test_batches, seed=seed)


def estimates_table(found: Sequence[Estimate]) -> str:
    """Markdown: a row an estimator, and for each truth the mean and standard deviation of its estimate, nats."""
    truths = sorted({one.truth for one in found})
    cells = {(one.name, one.truth): f"{one.mean:.2f} ± {one.deviation:.2f}" for one in found}
    rows = [["estimator", "batch", "cap", *(f"I = {truth:g}" for truth in truths)], ["---"] * (3 + len(truths))]
    for name, (_, batch, cap) in ESTIMATORS.items():
        rows.append([name, str(batch), "none" if cap is None else f"{cap:.2f}", *(cells.get((name, truth), "") for truth in truths)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
