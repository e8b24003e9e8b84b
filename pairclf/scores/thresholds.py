"""Thresholds of several labels: from which probability a row gets a label, fitted for the best F1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pairclf.scores.metrics import Floats
from pairclf.task import Task

DEFAULT = 0.5
"""The threshold of a label where none is set, or none can be fitted: all rows have the label, or none has."""

Average = Literal["micro", "macro"]
"""How the F1 of several labels are combined, as in `sklearn.metrics.f1_score`.

macro: the mean of the labels' F1, for which each label has a threshold of its own. micro: the F1 of all labels of all
rows together; with calibrated probabilities its best threshold is the same for all labels (Lipton, Elkan and
Narayanaswamy 2014, arXiv 1402.1892).
"""


def thresholds_of(task: Task, settings: Mapping[str, float]) -> Floats:
    """The thresholds `(L,)` of a task's labels, as `data.submission.thresholds` has them; else `DEFAULT`."""
    return np.array([settings.get(name, DEFAULT) for name in task.classes])


def apply_thresholds(probabilities: ArrayLike, thresholds: ArrayLike) -> NDArray[np.bool_]:
    """Which labels each row gets, `(N, L)`: those with a probability from the threshold up.

    Args:
        probabilities: `(N, L)`.
        thresholds: `(L,)`.
    """
    return np.asarray(probabilities, dtype=np.float64) >= np.asarray(thresholds, dtype=np.float64)


def fit_thresholds(probabilities: Floats, targets: Floats, average: Average, weights: Floats | None = None) -> Floats:
    """The thresholds `(L,)` with the best F1 on these rows, which flatters it: `nested_labels` is honest.

    A threshold lies in the middle between two probabilities, so that rounding moves no row across it.

    Args:
        probabilities: `(N, L)`.
        targets: `(N, L)`; a label holds from one half up.
        average: what is best.
        weights: `(N,)` of the rows; None: equal.
    """
    held = targets >= 0.5
    if average == "micro":
        by_cell = None if weights is None else np.repeat(weights, held.shape[1])
        return np.full(held.shape[1], _best_threshold(held.ravel(), probabilities.ravel(), by_cell))
    columns = zip(held.T, probabilities.T, strict=True)
    return np.array([_best_threshold(label, values, weights) for label, values in columns])


def _best_threshold(held: NDArray[np.bool_], values: Floats, weights: Floats | None) -> float:
    from sklearn.metrics import precision_recall_curve  # slow to import, and most commands fit nothing

    if held.all() or not held.any():
        return DEFAULT
    precision, recall, values = precision_recall_curve(held, values, sample_weight=weights)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny)
    best = int(f1[:-1].argmax())  # the last point is that of no row at all
    below = values[best - 1] if best else 0.0
    return float((below + values[best]) / 2)


def nested_labels(
    probabilities: Floats, targets: Floats, folds: NDArray[np.int64], average: Average, weights: Floats | None = None
) -> NDArray[np.bool_]:
    """Labels `(N, L)` of out-of-fold probabilities, each fold's by thresholds that were fitted on the other folds.

    Args:
        probabilities: `(N, L)`, out of fold.
        targets: `(N, L)`.
        folds: `(N,)`, the fold that held the row out; two different ones at least.
        average: as in `fit_thresholds`.
        weights: `(N,)`.
    """
    labels = np.zeros(probabilities.shape, dtype=np.bool_)
    for fold in np.unique(folds):
        own, others = folds == fold, folds != fold
        thresholds = fit_thresholds(
            probabilities[others], targets[others], average, None if weights is None else weights[others]
        )
        labels[own] = apply_thresholds(probabilities[own], thresholds)
    return labels


def f1_of_labels(labels: NDArray[np.bool_], targets: Floats, weights: Floats | None = None) -> tuple[Floats, float]:
    """F1 of each label `(L,)`, whose mean is macro F1, and micro F1, that of all labels together.

    A label that no row has and no row gets counts 0, as in scikit-learn.

    Args:
        labels: that rows get, `(N, L)`.
        targets: `(N, L)`; a label holds from one half up.
        weights: `(N,)`; None: equal.
    """
    from sklearn.metrics import f1_score

    held, by_cell = targets >= 0.5, None if weights is None else np.repeat(weights, labels.shape[1])
    columns = zip(held.T, labels.T, strict=True)
    each = [f1_score(label, chosen, sample_weight=weights, zero_division=0) for label, chosen in columns]
    together = f1_score(held.ravel(), labels.ravel(), sample_weight=by_cell, zero_division=0)
    return np.array(each), float(together)
