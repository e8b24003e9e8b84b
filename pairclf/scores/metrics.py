"""Figures over `(N, C)` arrays of probabilities and soft targets, in the task's class order; losses in nats a row."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pairclf.errors import DataError

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
    given = np.asarray(probabilities, dtype=np.float64)
    return np.asarray((given >= given.max(axis=1, keepdims=True) - TIE).argmax(axis=1))


def accuracy(probabilities: ArrayLike, targets: ArrayLike, *, multi_label: bool = False) -> float:
    """Part of the rows whose `likeliest` class is the target's.

    With `multi_label` the part of all labels that stand on the target's side of one half.

    Raises:
        DataError: as `log_loss`.
    """
    given, wanted = _pair(probabilities, targets)
    if multi_label:
        return float(((given > 0.5) == (wanted > 0.5)).mean())
    return float((likeliest(given) == likeliest(wanted)).mean())


def class_prior(targets: ArrayLike, weights: ArrayLike | None = None) -> Floats:
    """Mean target `(C,)`: what a model that knows nothing of the rows should say.

    Raises:
        DataError: as `log_loss`.
    """
    wanted = _matrix(targets, "targets")
    prior: Floats = np.average(wanted, axis=0, weights=_weights(weights, len(wanted)))
    return prior


def entropy(probabilities: ArrayLike) -> float:
    """Mean entropy of the rows: where they are the truth, no model's expected log loss is lower.

    Raises:
        DataError: as `log_loss`.
    """
    return float(entropy_of(probabilities).mean())


def entropy_of(probabilities: ArrayLike, *, multi_label: bool = False) -> Floats:
    """`(N,)` nats: the entropy of each row; with `multi_label` the sum over its labels, each a yes or a no.

    Raises:
        DataError: as `log_loss`.
    """
    given = _matrix(probabilities, "probabilities")
    given = np.concatenate([given, 1 - given], axis=1) if multi_label else given
    nats: Floats = -(given * _log_clipped(given)).sum(axis=1)
    return nats


def expected_calibration_error(probabilities: ArrayLike, targets: ArrayLike, bins: int = BINS) -> float:
    """How far the confidence in the likeliest class is off, averaged over equally wide bins of confidence.

    A soft target counts as right in the part that it gives to the class chosen (Guo et al. 2017, eq. 3).

    Raises:
        DataError: as `log_loss`.
    """
    given, wanted = _pair(probabilities, targets)
    chosen = likeliest(given)[:, None]
    confidence = np.take_along_axis(given, chosen, axis=1)[:, 0]
    right = np.take_along_axis(wanted, chosen, axis=1)[:, 0]
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=confidence - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(given))


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
