"""Logits of several models as one: a weight for each model and a bias for each class, fitted to out-of-fold logits.

    logits = sum over models m of weight[m] * logits[m]  +  bias

With one model the weight is an inverse temperature. Classes of the two sides share a bias, so that what exchanges its
logits in a swap still does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logsumexp, softmax

from pairclf.scores.metrics import Floats

PRIOR = 1.0
"""Strength, in rows, of the pull towards equal weights and no bias: without it, rows of one class have no optimum."""


def fit_pool(
    logits: Floats,
    targets: Floats,
    weights: Floats,
    *,
    equal: float,
    tied: Sequence[int] = (),
    independent: bool = False,
) -> tuple[Floats, Floats]:
    """Weights `(M,)`, none below 0, and biases `(C,)` of least cross-entropy.

    Args:
        logits: `(M, N, C)` of rows that no model saw.
        targets: `(N, C)` probability of each class.
        weights: `(N,)` share of each row in the loss.
        equal: the weight that the pull goes to: 1 / M for a mean.
        tied: columns that share one bias.
        independent: each column is a label of its own (sigmoid, no softmax).
    """
    models, _, classes = logits.shape
    groups = np.arange(classes)
    groups[list(tied)] = min(tied, default=0)
    names, group = np.unique(groups, return_inverse=True)
    spread = np.eye(len(names))[group].T  # (groups, classes)

    def loss(parameters: Floats) -> tuple[float, Floats]:
        factors, bias = parameters[:models], parameters[models:]
        pooled = np.tensordot(factors, logits, axes=1) + bias @ spread
        if independent:
            losses = -(targets * log_expit(pooled) + (1 - targets) * log_expit(-pooled)).sum(axis=1)
            slopes = (expit(pooled) - targets) * weights[:, None]
        else:
            losses = logsumexp(pooled, axis=1) - (targets * pooled).sum(axis=1)
            slopes = (softmax(pooled, axis=1) - targets) * weights[:, None]
        pull = np.concatenate([factors - equal, bias])
        slope = np.concatenate([np.einsum("mnc,nc->m", logits, slopes), spread @ slopes.sum(axis=0)])
        return float(losses @ weights + PRIOR / 2 * pull @ pull), slope + PRIOR * pull

    start = np.concatenate([np.full(models, equal), np.zeros(len(names))])
    bounds = [(0, None)] * models + [(None, None)] * len(names)
    best = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 500})
    return best.x[:models], best.x[models:] @ spread
