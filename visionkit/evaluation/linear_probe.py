"""What a linear classifier reads from frozen features (Alain and Bengio 2016, arXiv:1610.01644)."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from visionkit.evaluation.accuracy import chance_to_be_right
from visionkit.evaluation.probe import ProbeMetric
from visionkit.registry import METRICS, ConfigError

# N images, D features, C classes


@METRICS.register_module()
class LinearProbe(ProbeMetric):
    """Multinomial logistic regression on standardised features: `probe/<point>_linear`, the accuracy on the test images.

    The weight of the L2 penalty is the one of `l2` with the lowest cross entropy on a held-out tenth of the training images, which the
    seed draws; the classifier that counts is that of the other nine tenths. Test images take no part in either.

    Args:
        l2: weights of the penalty, half the squared norm of the weights beside the *mean* cross entropy.
        max_iters: of L-BFGS for each weight; each starts where the next stronger one ended.
        collect_device: where results of several processes meet, `cpu` or `gpu`.
        prefix: put before the name of each number.

    Raises:
        ConfigError: an argument that is none of the above, or samples that ProbeLoop did not make.
    """
    suffix = "linear"

    def __init__(self, l2: Sequence[float] = (1.0, 0.1, 0.01, 0.001, 0.0001), max_iters: int = 100, collect_device: str = "cpu",
                 prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if not l2 or min(l2) <= 0 or max_iters < 1:
            raise ConfigError(f"l2 is one weight or more, above 0, and max_iters at least 1; got {l2=}, {max_iters=}", ("l2",))
        self.l2 = sorted(l2, reverse=True)
        self.max_iters = max_iters

    def measure(self, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
        classes = int(torch.cat([train_labels, test_labels]).max()) + 1
        held_out = max(1, len(train) // 10)                  # the order is drawn by the seed, so these are a random tenth
        weights, best = np.zeros((train.shape[1] + 1, classes)), (float("inf"), None)
        for l2 in self.l2:
            weights = fit(train[held_out:], train_labels[held_out:], l2, weights, self.max_iters)
            loss = F.cross_entropy(logits_of(train[:held_out], weights).double(), train_labels[:held_out]).item()
            best = min(best, (loss, weights), key=lambda one: one[0])
        return float(chance_to_be_right(logits_of(test, best[1]).numpy(), test_labels.numpy()).mean())


def fit(features: Tensor, labels: Tensor, l2: float, start: np.ndarray, max_iters: int = 100) -> np.ndarray:
    """The weights of the logistic regression with the least mean cross entropy plus `l2 / 2` times the squared norm of the weights.

    Args:
        features: [N, D] float32; products of matrices are computed in its type, sums in float64.
        labels: [N] int64.
        l2: of the penalty, which leaves the bias alone.
        start: [D + 1, C] the weights to begin with; the last row is the bias.
        max_iters: of L-BFGS.

    Returns:
        [D + 1, C] float64.
    """
    rows = torch.arange(len(labels))

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(start.shape)
        log_probs = logits_of(features, weights).double().log_softmax(1)                                                # [N, C]
        residual = log_probs.exp()
        residual[rows, labels] -= 1
        residual /= len(labels)
        gradient = np.empty_like(weights)
        of_features = (residual.T.to(features.dtype) @ features).T                          # six times as fast as features.T @ residual
        gradient[:-1] = of_features.numpy() + l2 * weights[:-1]
        gradient[-1] = residual.sum(0).numpy()
        loss = -log_probs[rows, labels].mean().item() + l2 / 2 * float((weights[:-1] ** 2).sum())
        return loss, gradient.ravel()

    found = minimize(objective, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": max_iters, "ftol": 1e-7, "gtol": 1e-5})
    return found.x.reshape(start.shape)


def logits_of(features: Tensor, weights: np.ndarray) -> Tensor:
    """[N, C] in the type of `features`; `weights` as `fit` returns them."""
    weights = torch.from_numpy(weights).to(features.dtype)
    return torch.addmm(weights[-1], features, weights[:-1])
