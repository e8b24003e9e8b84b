"""Figures over `(N, C)` arrays of probabilities and soft targets, in the task's class order; losses in nats a row.

`measure` is how every command measures: training, cross-validation, evaluation and merging give the same rows the same
figures. Where a task has several labels a row, each label is a yes or a no of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pairclf.errors import DataError
from pairclf.task import Task

Floats = NDArray[np.float64]

BINS = 15  # Guo et al. 2017, arXiv 1706.04599
TIE = 1e-6
"""Chances that differ less are equal: float32 leaves about 1e-7 between equal texts in two batches."""


def log_loss(
    probabilities: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None, *, multi_label: bool = False
) -> float:
    """Mean cross-entropy of soft targets. Where targets are one-hot this is `sklearn.metrics.log_loss`.

    Probabilities are clipped to [eps, 1 - eps] with float64's eps, as scikit-learn does, and not normalised.

    Args:
        probabilities: `(N, C)`.
        targets: `(N, C)`, rows summing to one.
        weights: `(N,)` shares of the rows; None: alike.
        multi_label: several classes may hold: the sum of each label's own cross-entropy, of its yes and its no.

    Raises:
        DataError: shapes differ, there are no rows, or a number is not finite.
    """
    given, wanted = _pair(probabilities, targets)
    if multi_label:
        given, wanted = (np.concatenate([one, 1 - one], axis=1) for one in (given, wanted))
    loss = -(wanted * _log_clipped(given)).sum(axis=1)
    return float(np.average(loss, weights=_weights(weights, len(loss))))


def likeliest(probabilities: ArrayLike) -> NDArray[np.intp]:
    """Index of each row's likeliest class, `(N,)`; of those that are equal but for `TIE`, the first.

    A row with two equal responses has equal chances for both, up to the order in which a machine adds numbers.
    """
    return np.asarray(_best(np.asarray(probabilities, dtype=np.float64)).argmax(axis=1))


def _best(values: Floats) -> NDArray[np.bool_]:
    """`(..., C)`: which classes are the likeliest, of which there are several in a tie."""
    return np.asarray(values >= values.max(axis=-1, keepdims=True) - TIE)


def accuracy(
    probabilities: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None, *, multi_label: bool = False
) -> float:
    """Part of the rows whose likeliest class is the target's; with `multi_label`, part of all labels that are right.

    A tie counts as drawing one of its k classes would on average: each class of a tied target counts 1 / k, whichever
    of them is predicted, and a tied prediction counts the mean of what its classes would. So the figure is the same
    with the sides exchanged. A label is tied at one half. Without ties it is `sklearn.metrics.accuracy_score`.

    Args:
        probabilities: `(N, C)`.
        targets: `(N, C)`.
        weights: `(N,)` shares of the rows; None: alike.
        multi_label: several classes may hold.

    Raises:
        DataError: as `log_loss`.
    """
    given, wanted = _pair(probabilities, targets)
    if multi_label:
        given, wanted = (np.stack([one, 1 - one], axis=2) for one in (given, wanted))
    chosen, best = _best(given), _best(wanted)
    right = (chosen & best).sum(axis=-1) / (chosen.sum(axis=-1) * best.sum(axis=-1))
    by_row = right.mean(axis=1) if multi_label else right
    return float(np.average(by_row, weights=_weights(weights, len(by_row))))


def class_prior(targets: ArrayLike, weights: ArrayLike | None = None) -> Floats:
    """Mean target `(C,)`: what a model that knows nothing of the rows should say.

    Raises:
        DataError: as `log_loss`.
    """
    wanted = _matrix(targets, "targets")
    prior: Floats = np.average(wanted, axis=0, weights=_weights(weights, len(wanted)))
    return prior


def entropy(probabilities: ArrayLike, weights: ArrayLike | None = None, *, multi_label: bool = False) -> float:
    """Mean entropy of the rows: where they are the truth, no model's expected log loss is lower.

    Raises:
        DataError: as `log_loss`.
    """
    nats = entropy_of(probabilities, multi_label=multi_label)
    return float(np.average(nats, weights=_weights(weights, len(nats))))


def entropy_of(probabilities: ArrayLike, *, multi_label: bool = False) -> Floats:
    """`(N,)` nats: the entropy of each row; with `multi_label` the sum over its labels, each a yes or a no.

    Raises:
        DataError: as `log_loss`.
    """
    given = _matrix(probabilities, "probabilities")
    given = np.concatenate([given, 1 - given], axis=1) if multi_label else given
    nats: Floats = -(given * _log_clipped(given)).sum(axis=1)
    return nats


def expected_calibration_error(
    probabilities: ArrayLike,
    targets: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    multi_label: bool = False,
    bins: int = BINS,
) -> float:
    """How far the confidence in the likeliest class is off, averaged over equally wide bins of confidence.

    A soft target counts as right in the part that it gives to the class chosen (Guo et al. 2017, eq. 3); to the mean of
    the classes, where they are tied. With `multi_label` it is the mean over the labels, each with two classes, yes and
    no.

    Raises:
        DataError: as `log_loss`.
    """
    given, wanted = _pair(probabilities, targets)
    shares = _weights(weights, len(given))
    shares = np.ones(len(given)) if shares is None else shares
    if not multi_label:
        return _calibration_error(given, wanted, shares, bins)
    labels = [
        _calibration_error(np.stack([p, 1 - p], axis=1), np.stack([t, 1 - t], axis=1), shares, bins)
        for p, t in zip(given.T, wanted.T, strict=True)
    ]
    return float(np.mean(labels))


def _calibration_error(given: Floats, wanted: Floats, weights: Floats, bins: int) -> float:
    chosen, confidence = _best(given), given.max(axis=1)
    right = (wanted * chosen).sum(axis=1) / chosen.sum(axis=1)
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=weights * (confidence - right), minlength=bins)
    return float(np.abs(gaps).sum() / weights.sum())


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of scores against labels.

    Attributes:
        of: its function of probabilities `(N, C)`, targets `(N, C)` and weights `(N,)` or None; `multi_label` says
            whether several classes may hold.
        better: 1 where more of it is better, -1 where less of it is.
        labels: how the labels of a row come together, where a task has several; for people.
    """

    of: Callable[..., float]
    better: int
    labels: str


METRICS: dict[str, Metric] = {
    "log_loss": Metric(log_loss, -1, "label sum"),
    "accuracy": Metric(accuracy, 1, "label mean"),
    "expected_calibration_error": Metric(expected_calibration_error, -1, "label mean"),
}
"""What is measured, by name: `train.metric` chooses one of them."""


def measure(
    probabilities: ArrayLike, targets: ArrayLike, task: Task, weights: ArrayLike | None = None
) -> dict[str, float]:
    """Every one of `METRICS`, by name.

    Args:
        probabilities: `(N, C)`.
        targets: `(N, C)`.
        task: whether a row has several labels.
        weights: `(N,)` shares of the rows, as their column `weight` has them; None: alike.

    Raises:
        DataError: as `log_loss`.
    """
    several = task.multi_label
    return {name: metric.of(probabilities, targets, weights, multi_label=several) for name, metric in METRICS.items()}


def title(name: str, task: Task) -> str:
    """A metric's name for people; for a task with several labels, with how they come together.

    >>> title("log_loss", Task(name="t", fields=("text",), classes=("x", "y"), multi_label=True))
    'log loss (label sum)'
    """
    words = name.replace("_", " ")
    return f"{words} ({METRICS[name].labels})" if task.multi_label else words


def way_to_best(loss: float, prior: float, best: float) -> float:
    """Part of the way from the prior's log loss to the best possible: 0 at the prior, 1 at the best.

    >>> way_to_best(0.75, prior=1.0, best=0.5)
    0.5

    Raises:
        DataError: there is no way to go, as `prior` is not above `best`.
    """
    if not prior > best:
        raise DataError(f"the prior's log loss {prior:.4f} must be above the best possible {best:.4f}")
    return (prior - loss) / (prior - best)


def checked_weights(weights: ArrayLike, n: int) -> Floats:
    """Weights as `(n,)` float64.

    Raises:
        DataError: they are not `n` finite numbers from 0 up, one of them above 0.
    """
    given = np.asarray(weights, dtype=np.float64)
    if given.shape != (n,) or not np.isfinite(given).all() or (given < 0).any() or given.sum() <= 0:
        raise DataError(f"weights of shape {given.shape} must be {n:,} finite numbers from 0 up, one of them above 0")
    return given


def _log_clipped(probabilities: Floats) -> Floats:
    """Natural logarithm of probabilities clipped to [eps, 1 - eps], eps of float64."""
    eps = np.finfo(np.float64).eps
    logs: Floats = np.log(np.clip(probabilities, eps, 1 - eps))
    return logs


def _matrix(values: ArrayLike, name: str) -> Floats:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise DataError(f"{name} have shape {matrix.shape}; it must be (rows, classes), with one of each at least")
    wrong = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if len(wrong):
        where = f"rows counted from 0: {wrong[:5].tolist()}"
        raise DataError(f"{name} of {len(wrong):,} rows are not finite", where=where)
    return matrix


def _pair(probabilities: ArrayLike, targets: ArrayLike) -> tuple[Floats, Floats]:
    given, wanted = _matrix(probabilities, "probabilities"), _matrix(targets, "targets")
    if given.shape != wanted.shape:
        raise DataError(f"probabilities have shape {given.shape}, targets {wanted.shape}; they must be alike")
    return given, wanted


def _weights(weights: ArrayLike | None, rows: int) -> Floats | None:
    return None if weights is None else checked_weights(weights, rows)
