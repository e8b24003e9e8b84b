"""Losses and decisions of rows: cross-entropy, likeliest classes, class prior and entropy, of `(N, C)` probabilities.

Columns are in the task's class order; losses are in nats per row, and targets may be soft. If a task has several labels
per row, each label is a binary target of its own. `figures.METRICS` is the table of what is measured with them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pairclf.console import counted
from pairclf.errors import DataError

Floats = NDArray[np.float64]

TIE = 1e-6
"""Probabilities that differ by less are equal: two batches give equal texts about 1e-7 apart in float32."""


def log_loss(
    probabilities: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None, *, multi_label: bool = False
) -> float:
    """Mean cross-entropy of soft targets. Where targets are one-hot this is `sklearn.metrics.log_loss`.

    Floats are clipped to [eps, 1 - eps] with float64's eps, as scikit-learn does, and not normalised.

    Args:
        probabilities: `(N, C)`.
        targets: `(N, C)`, rows summing to one.
        weights: `(N,)` of the rows; None: equal.
        multi_label: a row may have several labels: sum their binary cross-entropies.

    Raises:
        DataError: shapes differ, there are no rows, or a number is not finite.
    """
    losses = row_losses(probabilities, targets, multi_label=multi_label)
    return float(np.average(losses, weights=_weights(weights, len(losses))))


def row_losses(probabilities: ArrayLike, targets: ArrayLike, *, multi_label: bool = False) -> Floats:
    """The cross-entropy of each row, `(N,)`, whose mean is `log_loss`.

    Raises:
        DataError: as `log_loss`.
    """
    predicted, target = checked_pair(probabilities, targets)
    if multi_label:
        predicted, target = (np.concatenate([matrix, 1 - matrix], axis=1) for matrix in (predicted, target))
    losses: Floats = -(target * _log_clipped(predicted)).sum(axis=1)
    return losses


def likeliest(probabilities: ArrayLike) -> NDArray[np.intp]:
    """Index of each row's likeliest class, `(N,)`; of classes that are equal within `TIE`, the first.

    A row with two equal responses has equal probabilities for both, up to the rounding of sums.
    """
    return np.asarray(_best(np.asarray(probabilities, dtype=np.float64)).argmax(axis=1))


def _best(values: Floats) -> NDArray[np.bool_]:
    """`(..., C)`: True for the likeliest class, and for all classes of a tie."""
    return np.asarray(values >= values.max(axis=-1, keepdims=True) - TIE)


def right_of_rows(probabilities: ArrayLike, targets: ArrayLike, *, multi_label: bool = False) -> Floats:
    """How far each row is right, `(N,)` from 0 to 1, whose mean is the accuracy.

    A row is right if its likeliest class is the target's; with `multi_label`, it is the share of its labels that are
    right. A tie counts as the mean over its k classes: a predicted class of a tied target counts 1 / k, and a tied
    prediction counts the mean of its classes. So swapping the sides does not change the accuracy. A label is tied at
    one half. Without ties the mean is `sklearn.metrics.accuracy_score`.

    Raises:
        DataError: as `log_loss`.
    """
    predicted, target = checked_pair(probabilities, targets)
    if not multi_label:
        right: Floats = (decided(predicted) * decided(target)).sum(axis=1)
        return right
    chosen, held = (decided_labels(matrix) for matrix in (predicted, target))
    labels: Floats = (chosen * held + (1 - chosen) * (1 - held)).mean(axis=1)
    return labels


def decided(values: Floats) -> Floats:
    """`(..., C)`: 1 for the likeliest class and 0 for the others; 1 / k for each of k classes that are equally likely.

    >>> decided(np.array([[0.2, 0.8], [0.5, 0.5]])).tolist()
    [[0.0, 1.0], [0.5, 0.5]]
    """
    best = _best(values)
    shares: Floats = best / best.sum(axis=-1, keepdims=True)
    return shares


def decided_labels(values: Floats) -> Floats:
    """`(N, C)`: 1 where a label is likelier than not, 0 where it is less likely, one half where it is tied."""
    return decided(np.stack([values, 1 - values], axis=-1))[..., 0]


def class_prior(targets: ArrayLike, weights: ArrayLike | None = None) -> Floats:
    """Mean target `(C,)`: the best prediction without any knowledge of the row.

    Raises:
        DataError: as `log_loss`.
    """
    target = _matrix(targets, "targets")
    prior: Floats = np.average(target, axis=0, weights=_weights(weights, len(target)))
    return prior


def entropy(probabilities: ArrayLike, weights: ArrayLike | None = None, *, multi_label: bool = False) -> float:
    """Mean entropy of the rows: of true probabilities, the lowest expected log loss that a model can have.

    Raises:
        DataError: as `log_loss`.
    """
    nats = entropy_of(probabilities, multi_label=multi_label)
    return float(np.average(nats, weights=_weights(weights, len(nats))))


def entropy_of(probabilities: ArrayLike, *, multi_label: bool = False) -> Floats:
    """Entropy of each row in nats, `(N,)`; with `multi_label` the sum over its labels.

    Raises:
        DataError: as `log_loss`.
    """
    predicted = _matrix(probabilities, "probabilities")
    predicted = np.concatenate([predicted, 1 - predicted], axis=1) if multi_label else predicted
    nats: Floats = -(predicted * _log_clipped(predicted)).sum(axis=1)
    return nats


def way_to_best(loss: float, prior: float, best: float) -> float:
    """The fraction of the possible gain over the prior's log loss: 0 at the prior, 1 at the best possible.

    >>> way_to_best(0.75, prior=1.0, best=0.5)
    0.5

    Raises:
        DataError: `prior` is not above `best`.
    """
    if not prior > best:
        raise DataError(f"the prior's log loss {prior:.4f} must be above the best possible {best:.4f}")
    return (prior - loss) / (prior - best)


def checked_weights(weights: ArrayLike, n: int) -> Floats:
    """Weights as `(n,)` float64.

    Raises:
        DataError: they are not `n` finite numbers from 0 up, one of them above 0.
    """
    values = np.asarray(weights, dtype=np.float64)
    if values.shape != (n,) or not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise DataError(f"weights of shape {values.shape} must be {n:,} finite numbers from 0 up, one of them above 0")
    return values


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
        raise DataError(f"{name} of {counted(len(wrong), 'row')} are not finite", where=where)
    return matrix


def checked_pair(probabilities: ArrayLike, targets: ArrayLike) -> tuple[Floats, Floats]:
    """Both as `(N, C)` float64.

    Raises:
        DataError: as `log_loss`.
    """
    predicted, target = _matrix(probabilities, "probabilities"), _matrix(targets, "targets")
    if predicted.shape != target.shape:
        raise DataError(f"probabilities have shape {predicted.shape}, targets {target.shape}; they must be alike")
    return predicted, target


def _weights(weights: ArrayLike | None, rows: int) -> Floats | None:
    return None if weights is None else checked_weights(weights, rows)
