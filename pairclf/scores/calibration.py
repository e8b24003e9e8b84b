"""Temperature scaling (Guo et al. 2017, arXiv 1706.04599): one number that makes a model more or less sure."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from scipy.special import softmax

from pairclf.errors import DataError
from pairclf.scores.metrics import Floats, log_loss

RANGE = (0.05, 20.0)
"""Temperatures that are looked at. A fit that ends at a bound says that the scores are no probabilities."""


def apply_temperature(probabilities: ArrayLike, temperature: float) -> Floats:
    """`softmax(log p / temperature)`, `(N, C)`: above 1 less sure, below 1 surer; the likeliest class stays.

    Raises:
        DataError: `temperature` is not a finite number above 0.
    """
    if not (np.isfinite(temperature) and temperature > 0):
        raise DataError(f"temperature={temperature} must be a finite number above 0")
    logs = np.log(np.maximum(np.asarray(probabilities, dtype=np.float64), np.finfo(np.float64).tiny))
    scaled: Floats = softmax(logs / temperature, axis=1)
    return scaled


def fit_temperature(probabilities: ArrayLike, targets: ArrayLike) -> float:
    """The temperature with the lowest log loss on these rows. Fit it on held-out rows: on trained ones it is too low.

    Args:
        probabilities: `(N, C)`.
        targets: `(N, C)`, rows summing to one.

    Raises:
        DataError: as `log_loss`.
    """

    def loss(log_temperature: float) -> float:
        return log_loss(apply_temperature(probabilities, float(np.exp(log_temperature))), targets)

    log_loss(probabilities, targets)  # refuses what can't be judged before scipy sees it
    low, high = np.log(RANGE)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))
