"""Temperature: one number that makes a model more or less sure."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar

from pairclf.errors import DataError
from pairclf.scores.metrics import Floats, log_loss
from pairclf.scores.probabilities import probabilities as probabilities_of
from pairclf.task import Task

RANGE = (0.05, 20.0)
"""Temperatures that are looked at. A fit that ends at a bound says that the scores are no probabilities."""

GRID = 49
"""Temperatures that are tried before the best of them is refined: a mean of two orders may have several minima."""


def apply_temperature(probabilities: ArrayLike, temperature: float, task: Task) -> Floats:
    """Probabilities `(N, C)` whose logits are divided by `temperature`: above 1 less sure, below 1 surer.

    The logits are `log p`, and `log p - log(1 - p)` where a row has several labels. The likeliest class stays.

    Raises:
        DataError: `temperature` is not a finite number above 0.
    """
    if not (np.isfinite(temperature) and temperature > 0):
        raise DataError(f"temperature={temperature} must be a finite number above 0")
    given = np.asarray(probabilities, dtype=np.float64)
    logits = _log(given) - _log(1 - given) if task.multi_label else _log(given)
    return probabilities_of(logits, task, temperature)


def _log(values: Floats) -> Floats:
    logs: Floats = np.log(np.maximum(values, np.finfo(np.float64).tiny))
    return logs


def fit_temperature(
    scores: Callable[[float], Floats], targets: ArrayLike, task: Task, weights: ArrayLike | None = None
) -> float:
    """The temperature with the lowest log loss on these rows. Fit it on held-out rows: on trained ones it is too low.

    Args:
        scores: the probabilities `(N, C)` that a temperature leads to, in the place where it will be applied: before
            the mean of both orders for `predict.temperature`, after it for the temperature of an ensemble.
        targets: `(N, C)`.
        task: whether a row has several labels.
        weights: `(N,)` shares of the rows; None: alike.

    Raises:
        DataError: as `log_loss`.
    """

    def loss(log_temperature: float) -> float:
        at = scores(float(np.exp(log_temperature)))
        return log_loss(at, targets, weights, multi_label=task.multi_label)

    grid = np.log(np.geomspace(*RANGE, GRID))
    best = int(np.argmin([loss(float(place)) for place in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))
