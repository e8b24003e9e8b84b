"""Calibration: fit the temperature with the lowest log loss."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from pairclf.scores.metrics import Floats, log_loss
from pairclf.task import Task

RANGE = (0.05, 20.0)
"""The range of temperatures. A fit at a bound means that the scores are not probabilities."""

GRID = 49
"""Grid points before the refinement: the loss of a mean of two orders may have several minima."""


def fit_temperature(
    scores: Callable[[float], Floats], targets: ArrayLike, task: Task, weights: ArrayLike | None = None
) -> float:
    """The temperature with the lowest log loss on these rows. Use held-out rows: on training rows it is too low.

    Args:
        scores: maps a temperature to probabilities `(N, C)`, with the temperature in its final place: before the mean
            of both orders for `predict.temperature`, after it for the temperature of an ensemble.
        targets: `(N, C)`.
        task: whether a row has several labels.
        weights: `(N,)` of the rows; None: equal.

    Raises:
        DataError: as `log_loss`.
    """

    from scipy.optimize import minimize_scalar  # slow to import, and most commands fit nothing

    def loss(log_temperature: float) -> float:
        at = scores(float(np.exp(log_temperature)))
        return log_loss(at, targets, weights, multi_label=task.multi_label)

    grid = np.log(np.geomspace(*RANGE, GRID))
    best = int(np.argmin([loss(float(place)) for place in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]
    minimum = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(minimum.x))
