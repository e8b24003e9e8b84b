"""The one way from logits to probabilities: calibration, softmax or sigmoid, un-swap, mean of orders, mean of models.

The steps for each model and order are the calibration, softmax or sigmoid, and the swap undone. Then follow the mean of
both orders for each model, the weighted mean of the models, and the calibration of the ensemble. Training, `evaluate`,
`predict` and the inference server all use these functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pairclf.errors import DataError
from pairclf.scores.metrics import Floats
from pairclf.task import BA, Task

Mean = Literal["arithmetic", "geometric"]
"""The mean of the models' probabilities. The normalised geometric mean is known as the logarithmic opinion pool."""


class Calibration(NamedTuple):
    """What logits undergo before the softmax or sigmoid.

    `tie_scale` and `tie_bias` are tied vector scaling, for tasks whose swap leaves one class in place (a tie): the
    distance of the tie's logit from the mean of the sides' logits is multiplied with the scale, and the bias is added
    to it. Both sides have one scale, and logits that differ by a constant give the same probabilities, so a swapped row
    still has swapped probabilities.

    Attributes:
        temperature: divides the logits; or, with several labels per row, one a label.
        tie_scale: 1 changes nothing.
        tie_bias: in nats; 0 changes nothing.
    """

    temperature: float | tuple[float, ...] = 1.0
    tie_scale: float = 1.0
    tie_bias: float = 0.0

    def apply(self, logits: ArrayLike, task: Task) -> Floats:
        """Calibrated logits `(..., C)`."""
        scaled: Floats = np.asarray(logits, dtype=np.float64) / np.asarray(self.temperature, dtype=np.float64)
        if (self.tie_scale, self.tie_bias) == (1, 0):
            return scaled
        tie, sides = tie_and_sides(task)
        middle = scaled[..., sides].mean(axis=-1)
        scaled[..., tie] = middle + self.tie_scale * (scaled[..., tie] - middle) + self.tie_bias
        return scaled


def has_tie(task: Task) -> bool:
    """Whether a task has two sides and one class that is neither's victory."""
    return task.swappable and len(task.classes) == 3


def tie_and_sides(task: Task) -> tuple[int, list[int]]:
    """The column of the tie, and those of the sides' victories.

    Raises:
        DataError: the task has none (`has_tie`).
    """
    if not has_tie(task):
        raise DataError(
            f"task {task.name!r} has no tie between two sides, whose logits could be scaled",
            remedy="leave tie_scale and tie_bias away",
        )
    sides = [task.classes.index(name) for name in task.swap_classes or ()]
    return next(place for place in range(3) if place not in sides), sides


def unswap(scores: ArrayLike, task: Task) -> Floats:
    """Scores `(..., C)` of order BA (probabilities or logits) in the columns of order AB; its own inverse.

    >>> from pairclf.task import LMSYS
    >>> unswap([[0.7, 0.2, 0.1]], LMSYS).tolist()
    [[0.2, 0.7, 0.1]]
    """
    values = np.asarray(scores, dtype=np.float64)
    return values[..., list(task.swapped_columns)]


def probabilities(logits: ArrayLike, task: Task, calibration: Calibration | float = 1.0) -> Floats:
    """Softmax (sigmoid, where a row has several labels) of calibrated logits `(..., C)`; a number is a temperature."""
    if not isinstance(calibration, Calibration):
        calibration = Calibration(calibration)
    scaled = calibration.apply(logits, task)
    if task.multi_label:
        from scipy.special import expit  # slow to import, and most errors are found before

        sigmoid: Floats = expit(scaled)
        return sigmoid
    # Classes come first: numpy reduces a short last axis four times as slowly, and fits compute this hundreds of times.
    parts = np.moveaxis(scaled, -1, 0).copy()
    parts -= parts.max(axis=0)
    np.exp(parts, out=parts)
    parts /= parts.sum(axis=0)
    return np.ascontiguousarray(np.moveaxis(parts, 0, -1))


def mean_of_orders(logits: ArrayLike, task: Task, calibration: Calibration | float = 1.0) -> Floats:
    """Mean probabilities `(N, C)` of a row's orders; NaN where no order is known.

    Args:
        logits: `(N, O, C)`, order AB and, where a task can swap, order BA, each in its own columns; an order that holds
            a NaN is not known.
        task: for the swap.
        calibration: of the logits of each order, before the mean; a number is a temperature.
    """
    values = np.asarray(logits, dtype=np.float64)
    is_finite = np.isfinite(values).all(axis=2, keepdims=True)
    each = probabilities(np.where(is_finite, values, 0.0), task, calibration)
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
    per_model: Sequence[ArrayLike],
    task: Task,
    *,
    weights: ArrayLike,
    prior: ArrayLike,
    calibration: Calibration | float = 1.0,
    kind: Mean = "arithmetic",
) -> Floats:
    """Finite probabilities `(N, C)` for all rows: the mean of the models, then the calibration.

    A row that no model scored gets the prior. Rows sum to one, unless the task has several labels per row.

    Args:
        per_model, weights: as `mean_of_models`.
        task: whether a row has several labels.
        prior: `(C,)`.
        calibration: of the mean's logits; a number is a temperature.
        kind: of the mean; geometric: of each label and its complement, with several labels per row.
    """
    if kind == "geometric":  # a mean of logits
        mean = probabilities(mean_of_models([logits_of(values, task) for values in per_model], weights), task)
    else:
        mean = mean_of_models(per_model, weights)
    is_scored = np.asarray(np.isfinite(mean).all(axis=1))
    result: Floats = np.where(is_scored[:, None], mean, np.asarray(prior, dtype=np.float64))
    if not task.multi_label:
        result /= result.sum(axis=1, keepdims=True)
    if calibration not in (1.0, Calibration()):
        result[is_scored] = probabilities(logits_of(result[is_scored], task), task, calibration)
    return result


def apply_temperature(values: ArrayLike, temperature: float, task: Task) -> Floats:
    """Probabilities `(N, C)` whose logits are divided by `temperature`: above 1 less confident, below 1 more.

    The likeliest class stays the same.

    Raises:
        DataError: `temperature` is not a finite number above 0.
    """
    if not (np.isfinite(temperature) and temperature > 0):
        raise DataError(f"temperature={temperature} must be a finite number above 0")
    return probabilities(logits_of(values, task), task, temperature)


def logits_of(values: ArrayLike, task: Task) -> Floats:
    """Logits `(N, C)` of probabilities: `log p`, or `log p - log(1 - p)` with several labels per row.

    >>> logits_of([[0.5]], Task(name="t", fields=("text",), classes=("x",), multi_label=True)).tolist()
    [[0.0]]
    """
    matrix = np.asarray(values, dtype=np.float64)
    return _log(matrix) - _log(1 - matrix) if task.multi_label else _log(matrix)


def _log(values: Floats) -> Floats:
    logs: Floats = np.log(np.maximum(values, np.finfo(np.float64).tiny))
    return logs
