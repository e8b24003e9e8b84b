"""Strengths: what comparisons of several answers in pairs say of each, by Bradley and Terry's model or Davidson's.

P(i beats j) : P(j beats i) : P(tie) = e^s_i : e^s_j : nu e^((s_i + s_j) / 2), where nu is fitted, too; without ties
it is Bradley and Terry's. Davidson, "On extending the Bradley-Terry model to accommodate ties", JASA 65 (1970).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pairclf.scores.metrics import Floats

RIDGE = 1e-12
"""Weight of the squared strengths in the loss: it centres them, and keeps them finite where a victory is certain."""


def fit_strengths(pairs: NDArray[np.int64], probabilities: Floats, answers: int) -> Floats:
    """The strengths `(n,)` with the lowest cross-entropy against probabilities of pairs; their mean is 0.

    If each answer meets each other one, the strengths have the order of the sums of P(victory) + P(tie) / 2.

    Args:
        pairs: `(M, 2)`, the two answers of each pair, numbered from 0.
        probabilities: `(M, 2)` that the first or the second wins, or `(M, 3)` with the probability of a tie.
        answers: n.

    Returns:
        All are NaN where the pairs do not connect the answers, so that some can't be compared.

    >>> fit_strengths(np.array([[0, 1]]), np.array([[0.75, 0.25]]), 2).round(4)
    array([ 0.5493, -0.5493])
    """
    from scipy.optimize import minimize  # slow to import, and most commands fit nothing
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from scipy.special import log_softmax

    edges = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(answers, answers))
    if connected_components(edges, directed=False)[0] > 1:
        return np.full(answers, np.nan)
    # A pair reads three parameters: its two strengths and the last one, log nu. A matrix of all pairs and all answers
    # would take gigabytes for thousands of answers.
    read = np.column_stack([pairs, np.full(len(pairs), answers)])
    cells = read[:, :, None] * (answers + 1) + read[:, None, :]
    outcomes = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 1.0]])[: probabilities.shape[1]]

    def loss(parameters: Floats) -> tuple[float, Floats]:
        logs = log_softmax(parameters[read] @ outcomes.T, axis=1)
        of_pairs = (np.exp(logs) - probabilities) @ outcomes
        slope = np.bincount(read.ravel(), of_pairs.ravel(), answers + 1)
        penalty = RIDGE * parameters
        return float(-(probabilities * logs).sum() + parameters @ penalty / 2), slope + penalty

    def curvature(parameters: Floats) -> Floats:
        chances = np.exp(log_softmax(parameters[read] @ outcomes.T, axis=1))
        mean = chances @ outcomes
        of_pairs = np.einsum("mo,oi,oj->mij", chances, outcomes, outcomes) - mean[:, :, None] * mean[:, None, :]
        sums = np.bincount(cells.ravel(), of_pairs.ravel(), (answers + 1) ** 2)
        of_logits: Floats = sums.reshape(answers + 1, answers + 1) + RIDGE * np.eye(answers + 1)
        return of_logits

    fitted = minimize(
        loss, np.zeros(answers + 1), jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-12}
    )
    strengths: Floats = fitted.x[:answers] - fitted.x[:answers].mean()
    return strengths
