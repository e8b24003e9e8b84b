"""Metrics: everything that is said of `(N, C)` probabilities, each as a function of sums over rows, with an interval.

`METRICS` is the one table. A task and a training may go by any of them, `evaluate` prints all, and every other command
the task's own and those that are `everywhere`; all with the same figures of the same rows. Log loss, Brier score and
calibration errors take soft targets by expectation. The other metrics are about decisions: a row's class is the
target's likeliest, and of k classes that are equally likely each counts 1 / k. A metric over classes is their macro
average, as scikit-learn has it, unless its title says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pairclf.config import Config, load_config
from pairclf.errors import ConfigError, quoted
from pairclf.scores.intervals import Estimate, Statistic, mean_of, ratio
from pairclf.scores.metrics import (
    Floats,
    checked_pair,
    checked_weights,
    decided,
    decided_labels,
    right_of_rows,
    row_losses,
)
from pairclf.scores.probabilities import has_tie, tie_and_sides
from pairclf.task import Task

BINS = 15  # Guo et al. 2017, arXiv 1706.04599

TOP = 3
"""The k of MAP@k."""

Z = 1.959963984540054
"""The normal deviate of Wilson's 95% interval."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What a figure is made of.

    Attributes:
        predicted: `(N, C)` probabilities.
        target: `(N, C)`, as given.
        chosen: `(N, C)`, the predicted decision: `decided`, or `decided_labels`.
        held: `(N, C)`, the target's decision.
        counts: `(N, 3 C)`, of which figures over classes are made: for each class whether it was predicted and held,
            whether predicted, and whether held.
        weights: `(N,)` of the rows.
        task: what is judged.
    """

    predicted: Floats
    target: Floats
    chosen: Floats
    held: Floats
    counts: Floats
    weights: Floats
    task: Task

    def decided_as(self, chosen: ArrayLike) -> Judged:
        """The same with another decision `(N, C)`: that of other thresholds."""
        labels = np.asarray(chosen, dtype=np.float64)
        counts = np.concatenate([labels * self.held, labels, self.held], axis=1)
        return replace(self, chosen=labels, counts=counts)


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric: a record of `METRICS`.

    Attributes:
        statistic: makes the figure of what is judged; NaN where the rows lack something, such as a class.
        title: the name in tables.
        better: 1 if higher is better, -1 if lower is better.
        limits: the lowest and the highest value that it can have.
        applies: whether a task has it.
        labels: how the labels of a row are combined, for the titles of multi-label tasks; empty: as the title says.
        by_row: whether it is a mean over rows, so that the value for all folds is the mean of the folds' values.
        submits: what a competition of this metric asks for: probabilities, or the likeliest class.
        everywhere: whether all commands print it, of every task.
    """

    statistic: Callable[[Judged], Statistic]
    title: str
    better: Literal[1, -1]
    limits: tuple[float, float] = (0.0, 1.0)
    applies: Callable[[Task], bool] = lambda task: True
    labels: str = ""
    by_row: bool = False
    submits: Literal["probabilities", "labels"] = "probabilities"
    everywhere: bool = False

    @property
    def direction(self) -> str:
        """The direction in words."""
        return "higher is better" if self.better > 0 else "lower is better"

    def is_better(self, figure: float, other: float) -> bool:
        """Whether `figure` is better than `other`; False if one of them is not a number."""
        return self.better * (figure - other) > 0


def _log_loss(judged: Judged) -> Statistic:
    return mean_of(row_losses(judged.predicted, judged.target, multi_label=judged.task.multi_label))


def _accuracy(judged: Judged) -> Statistic:
    return mean_of(right_of_rows(judged.predicted, judged.target, multi_label=judged.task.multi_label))


def _brier(judged: Judged) -> Statistic:
    """The expected squared distance from a one-hot target: of a soft one its mean over the classes it may be."""
    p, t = judged.predicted, judged.target
    by_class = p**2 - 2 * p * t + t
    return mean_of(by_class.mean(axis=1) if judged.task.multi_label else by_class.sum(axis=1))


def _by_class(rule: Literal["f1", "precision", "recall"], mean: Literal["macro", "micro", "weighted"]) -> Any:
    """The statistic of a rule over true positives, predicted and held, and its mean over the classes."""

    def of(sums: Floats, *, multi_label: bool) -> Floats:
        both, predicted, held = np.split(sums, 3, axis=-1)
        present = np.ones(both.shape, dtype=bool) if multi_label else (predicted + held) > 0
        if mean == "micro":
            both, predicted, held = (part.sum(axis=-1, keepdims=True) for part in (both, predicted, held))
        of_class = {
            "f1": lambda: ratio(2 * both, predicted + held),
            "precision": lambda: ratio(both, predicted),
            "recall": lambda: ratio(both, held),
        }[rule]()
        of_class = np.nan_to_num(of_class)  # scikit-learn's zero_division=0
        if mean == "micro":
            return of_class[..., 0]
        shares = held if mean == "weighted" else present
        return np.nan_to_num(ratio((of_class * shares).sum(axis=-1), shares.sum(axis=-1)))

    def statistic(judged: Judged) -> Statistic:
        return Statistic(judged.counts, partial(of, multi_label=judged.task.multi_label))

    return statistic


def _matthews(judged: Judged) -> Statistic:
    """Matthews' correlation of C classes (Gorodkin 2004); of several labels the mean of each label's own."""
    if judged.task.multi_label:
        both, predicted, held = np.split(judged.counts, 3, axis=1)
        return Statistic(np.concatenate([both, predicted, held, np.ones((len(both), 1))], axis=1), _phi)

    def of(sums: Floats) -> Floats:
        both, predicted, held = np.split(sums, 3, axis=-1)
        rows = held.sum(axis=-1)
        above = both.sum(axis=-1) * rows - (predicted * held).sum(axis=-1)
        spread = (rows**2 - (predicted**2).sum(axis=-1)) * (rows**2 - (held**2).sum(axis=-1))
        return np.nan_to_num(ratio(above, np.sqrt(np.maximum(spread, 0))))

    return Statistic(judged.counts, of)


def _phi(sums: Floats) -> Floats:
    rows = sums[..., -1:]
    both, predicted, held = np.split(sums[..., :-1], 3, axis=-1)
    spread = predicted * (rows - predicted) * held * (rows - held)
    by_label = np.nan_to_num(ratio(both * rows - predicted * held, np.sqrt(np.maximum(spread, 0))))
    return np.asarray(by_label.mean(axis=-1))


def _area(judged: Judged) -> Statistic:
    """The area under the ROC curve, one class against the rest; NaN while a class has no row, or all rows."""
    parts = [
        _one_area(judged.predicted[:, place], judged.held[:, place], 1 - judged.held[:, place], judged.weights)
        for place in range(judged.predicted.shape[1])
    ]
    parts = parts[1:] if len(parts) == 2 and not judged.task.multi_label else parts  # the other is the same figure
    return _mean_of_statistics(parts)


def _area_of_sides(judged: Judged) -> Statistic:
    """The area for A against B among rows that one of them won, by the probability that A wins if one does."""
    a, b = (judged.task.classes.index(name) for name in judged.task.swap_classes or ())
    p = ratio(judged.predicted[:, a], judged.predicted[:, a] + judged.predicted[:, b])
    return _one_area(np.nan_to_num(p, nan=0.5), judged.held[:, a], judged.held[:, b], judged.weights)


def _one_area(scores: Floats, positive: Floats, negative: Floats, weights: Floats) -> Statistic:
    """The area under a curve, from each row's part in it.

    The area is a sum over pairs. With the share of negatives below each positive, and of positives above each negative
    (DeLong et al. 1988), a draw's area is linear in its rows, up to terms of order 1 / N.
    """
    order, place = np.unique(scores, return_inverse=True)
    below = _mid_rank(place, negative * weights, len(order))
    above = 1 - _mid_rank(place, positive * weights, len(order))
    whole = float(ratio((weights * positive * below).sum(), (weights * positive).sum()))

    def of(sums: Floats) -> Floats:
        area = ratio(sums[..., 2], sums[..., 0]) + ratio(sums[..., 3], sums[..., 1]) - whole
        return np.clip(area, 0.0, 1.0)

    return Statistic(np.stack([positive, negative, positive * below, negative * above], axis=1), of)


def _mid_rank(place: NDArray[np.intp], weights: Floats, values: int) -> Floats:
    """`(N,)`: the share of the weights that stand at lower places, and half of those at the same."""
    at = np.bincount(place, weights=weights, minlength=values)
    total = at.sum()
    shares: Floats = (np.cumsum(at) - at / 2)[place] / (total if total else 1.0)
    return shares


def _mean_of_statistics(parts: list[Statistic]) -> Statistic:
    """The mean of figures; NaN if one of them is."""
    ends = np.cumsum([part.columns.shape[1] for part in parts])

    def of(sums: Floats) -> Floats:
        split = np.split(sums, ends[:-1], axis=-1)
        return np.asarray(np.mean([part.of(own) for part, own in zip(parts, split, strict=True)], axis=0))

    return Statistic(np.concatenate([part.columns for part in parts], axis=1), of)


def _mean_average_precision(judged: Judged) -> Statistic:
    """MAP@k: for one class a row, the mean of 1 / its rank, 0 from rank k + 1 on. A row without any label has none."""
    top = np.argsort(-judged.predicted, axis=1, kind="stable")[:, :TOP]
    hits = np.take_along_axis(judged.held == judged.held.max(axis=1, keepdims=True), top, axis=1)
    relevant = (judged.held == judged.held.max(axis=1, keepdims=True)).sum(axis=1)
    if judged.task.multi_label:
        hits = np.take_along_axis(judged.held > 0.5, top, axis=1)
        relevant = (judged.held > 0.5).sum(axis=1)
    precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    return mean_of(ratio((precision * hits).sum(axis=1), np.minimum(relevant, TOP)))


def _equal_width(judged: Judged) -> Statistic:
    """Mean difference between confidence and accuracy, over bins of equal width (Guo et al. 2017, eq. 3)."""
    parts = []
    for confidence, right in _confidences(judged):
        place = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
        gaps = np.zeros((len(place), BINS + 1))
        gaps[np.arange(len(place)), place], gaps[:, -1] = confidence - right, 1.0
        parts.append(Statistic(gaps, lambda sums: ratio(np.abs(sums[..., :-1]).sum(axis=-1), sums[..., -1])))
    return _mean_of_statistics(parts)


def _confidences(judged: Judged) -> list[tuple[Floats, Floats]]:
    """Confidence in the decision, and the target's probability of it, `(N,)` each: one pair, or one a label."""
    p, t = judged.predicted, judged.target
    if judged.task.multi_label:
        chosen = judged.chosen
        return [
            (np.maximum(p[:, k], 1 - p[:, k]), chosen[:, k] * t[:, k] + (1 - chosen[:, k]) * (1 - t[:, k]))
            for k in range(p.shape[1])
        ]
    return [(p.max(axis=1), (t * judged.chosen).sum(axis=1))]


def _equal_mass(judged: Judged) -> Statistic:
    return _mean_of_statistics([_debiased(p, t, judged.weights) for p, t in _confidences(judged)])


def _class_wise(judged: Judged) -> Statistic:
    """Of each class's probability, in its own bins; the mean over the classes."""
    return _mean_of_statistics(
        [_debiased(p, t, judged.weights) for p, t in zip(judged.predicted.T, judged.target.T, strict=True)]
    )


def _of_tie(judged: Judged) -> Statistic:
    tie, _ = tie_and_sides(judged.task)
    return _debiased(judged.predicted[:, tie], judged.target[:, tie], judged.weights)


def _debiased(predicted: Floats, observed: Floats, weights: Floats) -> Statistic:
    """Root mean square calibration error in bins of equal mass, less what chance alone adds to it.

    The square of a bin's mean residual lies above the true one by the variance of this mean, which is estimated within
    the bin and taken off (Kumar et al. 2019, arXiv 1909.10155, section 5; from residuals, so that soft targets have
    their own variance). Equal predictions share a bin. A sum below 0 counts as 0.
    """
    place = _bins(predicted)
    bins = int(place.max()) + 1
    residual = predicted - observed
    columns = np.zeros((len(place), 3 * bins))
    for offset, values in enumerate((np.ones(len(place)), residual, residual**2)):
        columns[np.arange(len(place)), place + offset * bins] = values
    mean_weight = float((weights**2).sum() / weights.sum())  # rows of unequal weights count for fewer

    def of(sums: Floats) -> Floats:
        mass, first, second = np.split(sums, 3, axis=-1)
        square = np.nan_to_num(ratio(first, mass)) ** 2
        variance = (np.nan_to_num(ratio(second, mass)) - square) / np.maximum(mass / mean_weight - 1, 1.0)
        debiased = ratio((mass * (square - variance)).sum(axis=-1), mass.sum(axis=-1))
        return np.sqrt(np.maximum(debiased, 0.0))

    return Statistic(columns, of)


def _bins(predicted: Floats, bins: int = BINS) -> NDArray[np.intp]:
    """`(N,)`: the bin of each prediction, from 0 without gaps; bins have equal numbers of rows, as far as ties let."""
    edges = np.quantile(predicted, np.arange(1, bins) / bins, method="inverted_cdf")
    return np.unique(np.searchsorted(edges, predicted, side="left"), return_inverse=True)[1]


METRICS: dict[str, Metric] = {
    "log_loss": Metric(_log_loss, "log loss", -1, (0.0, math.inf), labels="label sum", by_row=True, everywhere=True),
    "accuracy": Metric(_accuracy, "accuracy", 1, labels="label mean", by_row=True, submits="labels", everywhere=True),
    "macro_f1": Metric(_by_class("f1", "macro"), "F1, macro", 1, submits="labels"),
    "micro_f1": Metric(_by_class("f1", "micro"), "F1, micro", 1, submits="labels"),
    "weighted_f1": Metric(_by_class("f1", "weighted"), "F1, weighted", 1, submits="labels"),
    "precision": Metric(_by_class("precision", "macro"), "precision", 1, submits="labels"),
    "recall": Metric(_by_class("recall", "macro"), "recall", 1, submits="labels"),
    "roc_auc": Metric(_area, "AUC, one against rest", 1),
    "roc_auc_sides": Metric(_area_of_sides, "AUC, A against B", 1, applies=has_tie),
    "brier": Metric(_brier, "Brier score", -1, (0.0, 2.0), labels="label mean", by_row=True),
    "matthews": Metric(_matthews, "Matthews correlation", 1, (-1.0, 1.0), labels="label mean", submits="labels"),
    "map_at_3": Metric(_mean_average_precision, f"MAP@{TOP}", 1, applies=lambda task: len(task.classes) > TOP),
    "expected_calibration_error": Metric(_equal_width, "calibration error", -1, labels="label mean", everywhere=True),
    "calibration_error_debiased": Metric(_equal_mass, "calibration RMSE", -1),
    "calibration_error_class_wise": Metric(_class_wise, "calibration RMSE, class-wise", -1),
    "calibration_error_tie": Metric(_of_tie, "calibration RMSE, tie", -1, applies=has_tie),
}
"""The metrics by their names in `task.metric` and `train.metric_for_best_model`; docs/scores.md explains each."""

ONE_ORDER = "_one_order"
"""Suffix of a metric's name in a bundle's manifest: the metric of the first order alone."""


def check_metric(setting: str, name: str, task: Task) -> None:
    """Refuse a metric that does not apply to this task.

    Raises:
        ConfigError: it names the setting and the metrics that apply.
    """
    applying = [metric_name for metric_name, metric in METRICS.items() if metric.applies(task)]
    if name not in applying:
        raise ConfigError(
            f"{setting}={quoted(name)} is no metric of a {task.kind} task with {len(task.classes)} classes",
            remedy=f"one of {', '.join(applying)}",
        )


def read_config(source: Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> Config:
    """`load_config`, and the check that its metrics apply to its task.

    Raises:
        ConfigError: a setting can't be used, or a metric does not apply.
    """
    config = load_config(source, overrides)
    check_metric("task.metric", config.task.metric, config.task)
    check_metric("train.metric_for_best_model", config.train.metric_for_best_model, config.task)
    return config


def metrics_of(task: Task) -> list[str]:
    """The names of the metrics that all commands print of a task; its own first.

    Raises:
        ConfigError: as `check_metric`.
    """
    check_metric("task.metric", task.metric, task)
    names = [name for name, metric in METRICS.items() if metric.everywhere and metric.applies(task)]
    return list(dict.fromkeys([task.metric, *names]))


def measure(
    predicted: ArrayLike,
    target: ArrayLike,
    task: Task,
    weights: ArrayLike | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, float]:
    """The values of metrics, by name; without those for which the rows lack something, such as an area without a class.

    Args:
        predicted: `(N, C)` probabilities.
        target: `(N, C)`.
        task: its kind and its own metric.
        weights: `(N,)`, the column `weight` of the rows; None: equal.
        names: of the metrics; None: `metrics_of(task)`.

    Raises:
        DataError: as `log_loss`.
        ConfigError: as `check_metric`.
    """
    names = metrics_of(task) if names is None else names
    judged = judge(predicted, target, task, weights)
    values = {name: METRICS[name].statistic(judged).value(judged.weights) for name in names}
    return {name: value for name, value in values.items() if not math.isnan(value)}


def title(name: str, task: Task) -> str:
    """A metric's title; for a multi-label task with the way in which labels are combined.

    >>> title("log_loss", Task(name="t", fields=("text",), classes=("x", "y"), multi_label=True))
    'log loss (label sum)'
    """
    metric = METRICS[name]
    return f"{metric.title} ({metric.labels})" if task.multi_label and metric.labels else metric.title


def labels_hint(task: Task) -> str:
    """How the metrics of a multi-label task combine the labels of a row, for below a table; empty for other tasks."""
    named = (f"{METRICS[name].title}: {METRICS[name].labels}" for name in metrics_of(task) if METRICS[name].labels)
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


def judge(predicted: ArrayLike, target: ArrayLike, task: Task, weights: ArrayLike | None = None) -> Judged:
    """Check `(N, C)` probabilities and targets, and decide both.

    Raises:
        DataError: as `log_loss`.
    """
    p, t = checked_pair(predicted, target)
    decide = decided_labels if task.multi_label else decided
    w = np.ones(len(p)) if weights is None else checked_weights(weights, len(p))
    chosen, held = decide(p), decide(t)
    return Judged(p, t, chosen, held, np.concatenate([chosen * held, chosen, held], axis=1), w, task)


def statistics_of(judged: Judged) -> dict[str, Statistic]:
    """The statistics of all metrics that apply to the task, by name."""
    return {name: metric.statistic(judged) for name, metric in METRICS.items() if metric.applies(judged.task)}


def values_of(judged: Judged) -> dict[str, float]:
    """The values of all metrics that apply to the task, by name, without intervals."""
    return {name: statistic.value(judged.weights) for name, statistic in statistics_of(judged).items()}


def reliability(judged: Judged) -> list[dict[str, Any]]:
    """The bins of a reliability diagram, for the decision (`class` is null) and for each class.

    A bin has the class, its number of rows, the mean prediction, and the share observed with Wilson's interval.
    """
    shown: list[tuple[str | None, Floats, Floats]] = [(None, p, t) for p, t in _confidences(judged)[:1]]
    if judged.task.multi_label:
        shown = []
    shown += list(zip(judged.task.classes, judged.predicted.T, judged.target.T, strict=True))
    lines: list[dict[str, Any]] = []
    for name, predicted, observed in shown:
        place = _bins(predicted)
        count, mass = np.bincount(place), np.bincount(place, judged.weights)
        guess, seen = (np.bincount(place, judged.weights * values) / mass for values in (predicted, observed))
        low, high = _wilson(seen, count)
        for rows, *cells in zip(count, guess, seen, low, high, strict=True):
            numbers = map(float, cells)
            line = dict(zip(("predicted", "observed", "low", "high"), numbers, strict=True))
            lines.append({"class": name, "rows": int(rows), **line})
    return lines


def _wilson(share: Floats, count: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """Wilson's score interval of shares `(B,)`."""
    centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * np.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return centre - half, centre + half


def finite(value: Any) -> Any:
    """A value as JSON has it; None for a number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def estimates_as_json(estimates: Mapping[str, Estimate], limits: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """Estimates for JSON: value, low and high of each, within the limits; null where one is not known."""
    tree: dict[str, Any] = {}
    for name, found in estimates.items():
        lowest, highest = limits.get(name, (-math.inf, math.inf))
        values = {"value": found.value, "low": max(found.low, lowest), "high": min(found.high, highest)}
        tree[name] = {key: finite(value) for key, value in values.items()}
    return tree
