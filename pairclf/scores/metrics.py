"""Metrics: log loss, accuracy, calibration error and entropy of `(N, C)` probabilities against soft targets.

`METRICS` is the one table of metrics, and every command measures with `measure`: training, cross-validation,
evaluation and merging give the same rows the same figures. Columns are in the task's class order; losses are in nats
per row. If a task has several labels per row, each label is a binary target of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pairclf.console import counted
from pairclf.errors import ConfigError, DataError, quoted
from pairclf.task import Kind, Task

Floats = NDArray[np.float64]

BINS = 15  # Guo et al. 2017, arXiv 1706.04599
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


def accuracy(
    probabilities: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None, *, multi_label: bool = False
) -> float:
    """Fraction of rows whose likeliest class is the target's; with `multi_label`, fraction of labels that are right.

    A tie counts as the mean over its k classes: a predicted class of a tied target counts 1 / k, and a tied prediction
    counts the mean of its classes. So swapping the sides does not change the accuracy. A label is tied at one half.
    Without ties it is `sklearn.metrics.accuracy_score`.

    Args:
        probabilities: `(N, C)`.
        targets: `(N, C)`.
        weights: `(N,)` shares of the rows; None: alike.
        multi_label: several classes may hold.

    Raises:
        DataError: as `log_loss`.
    """
    right = right_of_rows(probabilities, targets, multi_label=multi_label)
    return float(np.average(right, weights=_weights(weights, len(right))))


def right_of_rows(probabilities: ArrayLike, targets: ArrayLike, *, multi_label: bool = False) -> Floats:
    """How far each row is right, `(N,)` from 0 to 1, whose mean is `accuracy`.

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


def expected_calibration_error(
    probabilities: ArrayLike,
    targets: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    multi_label: bool = False,
    bins: int = BINS,
) -> float:
    """Mean difference between the confidence in the likeliest class and its accuracy, over bins of equal width.

    A soft target counts as right with its probability of the predicted class (Guo et al. 2017, eq. 3), or its mean over
    the classes of a tie. With `multi_label` the result is the mean over the labels.

    Raises:
        DataError: as `log_loss`.
    """
    predicted, target = checked_pair(probabilities, targets)
    shares = _weights(weights, len(predicted))
    shares = np.ones(len(predicted)) if shares is None else shares
    if not multi_label:
        return _calibration_error(predicted, target, shares, bins)
    labels = [
        _calibration_error(np.stack([p, 1 - p], axis=1), np.stack([t, 1 - t], axis=1), shares, bins)
        for p, t in zip(predicted.T, target.T, strict=True)
    ]
    return float(np.mean(labels))


def _calibration_error(predicted: Floats, target: Floats, weights: Floats, bins: int) -> float:
    chosen, confidence = _best(predicted), predicted.max(axis=1)
    right = (target * chosen).sum(axis=1) / chosen.sum(axis=1)
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=weights * (confidence - right), minlength=bins)
    return float(np.abs(gaps).sum() / weights.sum())


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric: a record of `METRICS`.

    Attributes:
        function: takes probabilities `(N, C)`, targets `(N, C)`, weights `(N,)` or None, and the keyword `multi_label`.
        better: 1 if higher is better, -1 if lower is better.
        title: the name in tables.
        labels: how the labels of a row are combined, for the titles of multi-label tasks.
        kinds: the kinds of task that it applies to.
        by_row: whether it is a mean over rows, so that the value for all folds is the mean of the folds' values.
        submits: what a competition of this metric asks for: probabilities, or the likeliest class.
        lacks: what targets `(N, C)` lack for it, such as "labels of both classes", which leaves it out; None: nothing.
    """

    function: Callable[..., float]
    better: Literal[1, -1]
    title: str
    labels: str = "label mean"
    kinds: Collection[Kind] = get_args(Kind)
    by_row: bool = True
    submits: Literal["probabilities", "labels"] = "probabilities"
    lacks: Callable[[Floats], str | None] = lambda targets: None

    @property
    def direction(self) -> str:
        """The direction in words."""
        return "higher is better" if self.better > 0 else "lower is better"

    def is_better(self, figure: float, other: float) -> bool:
        """Whether `figure` is better than `other`; False if one of them is not a number."""
        return self.better * (figure - other) > 0


METRICS: dict[str, Metric] = {
    "log_loss": Metric(log_loss, -1, "log loss", "label sum"),
    "accuracy": Metric(accuracy, 1, "accuracy", submits="labels"),
    "expected_calibration_error": Metric(expected_calibration_error, -1, "calibration error", by_row=False),
}
"""The metrics by their names in `task.metric` and `train.metric_for_best_model`. All commands print a new record."""

ONE_ORDER = "_one_order"
"""Suffix of a metric's name in a bundle's manifest: the metric of the first order alone."""


def check_metric(setting: str, name: str, task: Task) -> None:
    """Refuse a metric that does not apply to this kind of task.

    Raises:
        ConfigError: it names the setting and the metrics that apply.
    """
    applying = [metric_name for metric_name, metric in METRICS.items() if task.kind in metric.kinds]
    if name not in applying:
        raise ConfigError(
            f"{setting}={quoted(name)} is no metric of a {task.kind} task", remedy=f"one of {', '.join(applying)}"
        )


def metrics_of(task: Task) -> list[str]:
    """The names of the metrics that apply to a task; its own first.

    Raises:
        ConfigError: as `check_metric`.
    """
    check_metric("task.metric", task.metric, task)
    names = [name for name, metric in METRICS.items() if task.kind in metric.kinds]
    return sorted(names, key=lambda name: name != task.metric)


def measure(
    probabilities: ArrayLike, targets: ArrayLike, task: Task, weights: ArrayLike | None = None
) -> dict[str, float]:
    """The values of all metrics that apply and whose targets lack nothing, by name; the task's own first.

    Args:
        probabilities: `(N, C)`.
        targets: `(N, C)`.
        task: its kind and its own metric.
        weights: `(N,)`, the column `weight` of the rows; None: equal.

    Raises:
        DataError: as `log_loss`.
        ConfigError: as `check_metric`.
    """
    predicted, target = checked_pair(probabilities, targets)
    return {
        name: METRICS[name].function(predicted, target, weights, multi_label=task.multi_label)
        for name in metrics_of(task)
        if METRICS[name].lacks(target) is None
    }


def title(name: str, task: Task) -> str:
    """A metric's title; for a multi-label task with the way in which labels are combined.

    >>> title("log_loss", Task(name="t", fields=("text",), classes=("x", "y"), multi_label=True))
    'log loss (label sum)'
    """
    metric = METRICS[name]
    return f"{metric.title} ({metric.labels})" if task.multi_label else metric.title


def labels_hint(task: Task) -> str:
    """How the metrics of a multi-label task combine the labels of a row, for below a table; empty for other tasks."""
    named = (f"{METRICS[name].title}: {METRICS[name].labels}" for name in metrics_of(task))
    return "; ".join(named) if task.multi_label else ""


def titled(figures: Mapping[str, float], task: Task, prefix: str = "") -> dict[str, float]:
    """The metrics among `figures`, by title; the task's own first.

    Args:
        figures: values by name, such as those of a bundle's manifest.
        task: its metrics are selected.
        prefix: precedes a metric's name in `figures`.
    """
    names = [name for name in metrics_of(task) if prefix + name in figures]
    return {prefix.replace("_", " ") + title(name, task): figures[prefix + name] for name in names}


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
