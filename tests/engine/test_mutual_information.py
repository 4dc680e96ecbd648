import math

import pytest
import torch
from torch import nn

from visionkit.engine.mutual_information import (
    ESTIMATORS,
    SeparableScorer,
    correlated_gaussians,
    correlation_for,
    estimate,
    estimates,
    estimates_table,
    gaussian_information,
)


def test_the_truth_is_that_of_the_density():
    """E[log p(x, y) - log p(x) - log p(y)] over many pairs, by the densities themselves."""
    torch.manual_seed(0)
    dimension, rho = 3, 0.7
    x, y = (part.double() for part in correlated_gaussians(200_000, dimension, rho))
    joint = torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.tensor([[1, rho], [rho, 1]]).double())
    marginal = torch.distributions.Normal(0.0, 1.0)
    ratio = joint.log_prob(torch.stack([x, y], -1)) - marginal.log_prob(x) - marginal.log_prob(y)
    assert ratio.sum(1).mean().item() == pytest.approx(gaussian_information(dimension, rho), abs=0.02)
    assert torch.corrcoef(torch.stack([x[:, 0], y[:, 0]]))[0, 1].item() == pytest.approx(rho, abs=0.01)
    assert torch.corrcoef(torch.stack([x[:, 0], y[:, 1]]))[0, 1].item() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("information", [0.1, 2.0, 8.0])
def test_the_correlation_for_so_much_information_has_it(information):
    assert gaussian_information(20, correlation_for(20, information)) == pytest.approx(information)


class Ratio(nn.Module):
    """The scorer that cannot be bettered: log p(x, y) / (p(x) p(y)) of one-dimensional pairs with 1 nat in common, plus what is trained."""

    def __init__(self, dimension):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x, y):
        rho = correlation_for(1, 1.0)
        x, y = x, y.T
        quadratic = (rho**2 * (x**2 + y**2) - 2 * rho * x * y) / (2 * (1 - rho**2))
        return -quadratic - 0.5 * math.log(1 - rho**2) + self.shift


@pytest.mark.parametrize("name, tolerance", [("DV", 0.1), ("NWJ (KL)", 0.1), ("JSD, read by NWJ", 0.1), ("InfoNCE, N = 256", 0.1)])
def test_with_the_best_scorer_an_estimate_is_the_truth(name, tolerance):
    """Measured, of 1 nat: DV, NWJ (whose best score is the ratio and 1) and JSD 0.99, InfoNCE 1.00."""
    found = estimate(name, 1, 1.0, iterations=60, lr=0.1, test_batches=100, scorer=Ratio)
    assert found.mean == pytest.approx(1.0, abs=tolerance)
    assert 0 < found.deviation < 0.6


def test_infonce_of_few_candidates_stays_below_its_cap_where_the_truth_is_above():
    cap = ESTIMATORS["InfoNCE, N = 16"].cap
    assert cap == pytest.approx(math.log(16))
    found = estimate("InfoNCE, N = 16", 20, 8.0, iterations=100)
    assert 1.0 < found.mean < cap < 8.0


def test_a_scorer_gives_every_pair_what_it_gives_it_alone():
    torch.manual_seed(0)
    scorer = SeparableScorer(4, 8, 6)
    x, y = torch.randn(2, 5, 4)
    scores = scorer(x, y)
    assert scores.shape == (5, 5)
    torch.testing.assert_close(scores[3, 1], (scorer.of_x(x[3]) * scorer.of_y(y[1])).sum())


def test_an_estimate_is_the_same_each_time_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    first, second = (estimate("DV", 2, 1.0, iterations=5, test_batches=5) for _ in range(2))
    assert first == second
    assert first != estimate("DV", 2, 1.0, iterations=5, test_batches=5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_table_has_a_row_an_estimator_and_a_column_a_truth():
    found = list(estimates(2, (0.5, 1.0), iterations=1, test_batches=2))
    assert [one.name for one in found] == [*ESTIMATORS] * 2
    head, _, *rows = estimates_table(found).splitlines()
    assert head == "| estimator | batch | cap | I = 0.5 | I = 1 |"
    assert [row.split(" | ")[0][2:] for row in rows] == list(ESTIMATORS)
    assert rows[-1].startswith("| InfoNCE, N = 256 | 256 | 5.55 | ")
    assert f"{found[-1].mean:.2f} ± {found[-1].deviation:.2f} |" in rows[-1]
