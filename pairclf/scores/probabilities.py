"""The one way from logits to probabilities: temperature, softmax or sigmoid, un-swap, mean of orders, mean of models.

The steps for each model and order are the temperature, softmax or sigmoid, and the swap undone. Then follow the mean of
both orders for each model, the weighted mean of the models, and the temperature of the ensemble. Training, `evaluate`,
`predict` and the inference server all use these functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from pairclf.errors import DataError
from pairclf.scores.metrics import Floats
from pairclf.task import BA, Task


def unswap(scores: ArrayLike, task: Task) -> Floats:
    """Scores `(..., C)` of order BA (probabilities or logits) in the columns of order AB; its own inverse.

    >>> from pairclf.task import LMSYS
    >>> unswap([[0.7, 0.2, 0.1]], LMSYS).tolist()
    [[0.2, 0.7, 0.1]]
    """
    values = np.asarray(scores, dtype=np.float64)
    return values[..., list(task.swapped_columns)]


def probabilities(logits: ArrayLike, task: Task, temperature: float = 1.0) -> Floats:
    """Softmax (sigmoid, where a row has several labels) of logits `(..., C)` divided by the temperature."""
    from scipy.special import expit, softmax  # slow to import, and most errors are found before

    scaled = np.asarray(logits, dtype=np.float64) / temperature
    found: Floats = expit(scaled) if task.multi_label else softmax(scaled, axis=-1)
    return found


def mean_of_orders(logits: ArrayLike, task: Task, temperature: float = 1.0) -> Floats:
    """Mean probabilities `(N, C)` of a row's orders; NaN where no order is known.

    Args:
        logits: `(N, O, C)`, order AB and, where a task can swap, order BA, each in its own columns; an order that holds
            a NaN is not known.
        task: for the swap.
        temperature: divides the logits of each order, before the mean.
    """
    values = np.asarray(logits, dtype=np.float64)
    is_finite = np.isfinite(values).all(axis=2, keepdims=True)
    each = probabilities(np.where(is_finite, values, 0.0), task, temperature)
    if each.shape[1] > BA:
        each[:, BA] = unswap(each[:, BA], task)
    count = is_finite.sum(axis=1)
    mean: Floats = np.where(is_finite, each, 0.0).sum(axis=1) / np.maximum(count, 1)
    return np.where(count > 0, mean, np.nan)


def mean_of_models(per_model: Sequence[ArrayLike], weights: ArrayLike | None = None) -> Floats:
    """Weighted mean `(N, C)` of the models' probabilities; NaN if no model scored the row.

    Args:
        per_model: `(N, C)` per model; NaN anywhere in a row means that the model did not score it, and the weights of
            the others are normalised.
        weights: one per model; None: equal.
    """
    stacked = np.stack([np.asarray(values, dtype=np.float64) for values in per_model])
    is_scored = np.asarray(np.isfinite(stacked).all(axis=2))  # (M, N)
    shares = (np.ones(len(stacked)) if weights is None else np.asarray(weights, dtype=np.float64))[:, None] * is_scored
    sums = np.einsum("mn,mnc->nc", shares, np.where(is_scored[:, :, None], stacked, 0.0))
    total = np.where(is_scored.any(axis=0), shares.sum(axis=0), np.nan)
    mean: Floats = sums / total[:, None]
    return mean


def blend(
    per_model: Sequence[ArrayLike], task: Task, *, weights: ArrayLike, prior: ArrayLike, temperature: float = 1.0
) -> Floats:
    """Finite probabilities `(N, C)` for all rows: the mean of the models, then the temperature.

    A row that no model scored gets the prior. Rows sum to one, unless the task has several labels per row.

    Args:
        per_model, weights: as `mean_of_models`.
        task: whether a row has several labels.
        prior: `(C,)`.
        temperature: of the mean.
    """
    mean = mean_of_models(per_model, weights)
    is_scored = np.asarray(np.isfinite(mean).all(axis=1))
    result: Floats = np.where(is_scored[:, None], mean, np.asarray(prior, dtype=np.float64))
    if not task.multi_label:
        result /= result.sum(axis=1, keepdims=True)
    if temperature != 1:
        result[is_scored] = apply_temperature(result[is_scored], temperature, task)
    return result


def apply_temperature(values: ArrayLike, temperature: float, task: Task) -> Floats:
    """Probabilities `(N, C)` whose logits are divided by `temperature`: above 1 less confident, below 1 more.

    The logits are `log p`, or `log p - log(1 - p)` with several labels per row. The likeliest class stays the same.

    Raises:
        DataError: `temperature` is not a finite number above 0.
    """
    if not (np.isfinite(temperature) and temperature > 0):
        raise DataError(f"temperature={temperature} must be a finite number above 0")
    matrix = np.asarray(values, dtype=np.float64)
    logits = _log(matrix) - _log(1 - matrix) if task.multi_label else _log(matrix)
    return probabilities(logits, task, temperature)


def _log(values: Floats) -> Floats:
    logs: Floats = np.log(np.maximum(values, np.finfo(np.float64).tiny))
    return logs
