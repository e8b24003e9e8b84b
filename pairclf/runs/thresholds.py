"""Thresholds of a run's labels: fit them on out-of-fold scores, and say what F1 they give on rows of other folds."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from pairclf.config import Config
from pairclf.console import number, table
from pairclf.data.rows import targets_of
from pairclf.run import folds_of, labelled_rows, output_of
from pairclf.runs.evaluate import out_of_fold, scored
from pairclf.runs.evaluation_report import interval_of
from pairclf.scores.figures import METRICS, estimates_as_json, judge
from pairclf.scores.intervals import Estimate, Statistic, estimate
from pairclf.scores.metrics import Floats
from pairclf.scores.thresholds import (
    Average,
    apply_thresholds,
    f1_of_labels,
    fit_thresholds,
    nested_labels,
    thresholds_of,
)
from pairclf.task import Task


@dataclass(frozen=True, slots=True)
class LabelThresholds:
    """Thresholds for the best F1 of several labels.

    Attributes:
        labels: their names; all arrays `(L,)` have their order.
        share: fraction of the rows that have the label.
        thresholds: fitted on all scored rows.
        f1_as_set: at the thresholds of `data.submission`, with 0.5 where none is set.
        f1_nested: each row's labels by thresholds that were fitted on the rows of other folds; None: there is one fold.
        means_as_set: the same for micro and macro F1.
        means_nested: the same, each at the thresholds that are fitted for it, with draws of prompts.
    """

    labels: tuple[str, ...]
    share: Floats
    thresholds: Mapping[Average, Floats]
    f1_as_set: Floats
    f1_nested: Floats | None
    means_as_set: Mapping[Average, float]
    means_nested: Mapping[str, Estimate] | None

    def as_dict(self) -> dict[str, Any]:
        """All figures as JSON has them: those of each label by its name, and both means."""
        nested = [None] * len(self.labels) if self.f1_nested is None else self.f1_nested.tolist()
        by_label = zip(self.labels, self.share.tolist(), self.f1_as_set.tolist(), nested, strict=True)
        return {
            "labels": [dict(zip(("name", "share", "f1_as_set", "f1_nested"), line, strict=True)) for line in by_label],
            "f1_as_set": self.means_as_set,
            "f1_nested": None if self.means_nested is None else estimates_as_json(self.means_nested, {}),
            "thresholds": {average: self.setting(average) for average in self.thresholds},
        }

    def setting(self, average: Average) -> dict[str, float]:
        """The value of `data.submission.thresholds`."""
        return {name: round(float(value), 4) for name, value in zip(self.labels, self.thresholds[average], strict=True)}


def fit_run(config: Config, scores: Path | None, *, folds: Sequence[int] = ()) -> LabelThresholds:
    """Fit the thresholds of a run's labels on its out-of-fold scores, or on a file of scores.

    Args:
        config: of a task with several labels a row.
        scores: as `pairclf predict --scores` writes them; None: the run's out-of-fold scores.
        folds: of the run; empty: all.

    Raises:
        ConfigError, DataError: as `evaluate_run`, which has compared scores and rows.
    """
    task = config.task
    judged = out_of_fold(output_of(config), task, config.predict, folds) if scores is None else scored(scores, task)
    rows = labelled_rows(config)
    known = folds_of(config, rows).select("id", "fold", key="group")
    rows = rows.join(known, on="id", how="left", maintain_order="left")
    rows = judged.rows.select("id").join(rows, on="id", how="left", maintain_order="left")
    return fit_labels(
        task,
        judged.at(judged.temperature),
        targets_of(rows),
        rows["fold"].fill_null(-1).to_numpy(),
        rows["key"].fill_null(rows["id"]).to_numpy(),
        rows["weight"].to_numpy(),
        thresholds_of(task, config.data.submission.thresholds),
    )


def fit_labels(
    task: Task,
    probabilities: Floats,
    targets: Floats,
    folds: NDArray[np.int64],
    groups: NDArray[np.str_],
    weights: Floats,
    as_set: Floats,
) -> LabelThresholds:
    """Fit thresholds, and measure them.

    Args:
        task: its classes are the labels.
        probabilities: out of fold, `(N, L)`.
        targets: `(N, L)`.
        folds: `(N,)`, what held a row out.
        groups: `(N,)`, equal for rows of one prompt.
        weights: `(N,)`.
        as_set: thresholds `(L,)` to compare with.
    """
    several = len(np.unique(folds)) > 1
    averages: tuple[Average, ...] = get_args(Average)
    by_label, micro = f1_of_labels(apply_thresholds(probabilities, as_set), targets, weights)
    nested = {
        average: nested_labels(probabilities, targets, folds, average, weights) for average in averages if several
    }
    judged = judge(probabilities, targets, task, weights)
    means: dict[str, Statistic] = {
        average: METRICS[f"{average}_f1"].statistic(judged.decided_as(labels)) for average, labels in nested.items()
    }
    return LabelThresholds(
        labels=task.classes,
        share=np.average(targets, axis=0, weights=weights),
        thresholds={average: fit_thresholds(probabilities, targets, average, weights) for average in averages},
        f1_as_set=by_label,
        f1_nested=f1_of_labels(nested["macro"], targets, weights)[0] if several else None,
        means_as_set={"micro": micro, "macro": float(by_label.mean())},
        means_nested=estimate(means, groups, weights) if several else None,
    )


def render_thresholds(fitted: LabelThresholds) -> Table:
    """The labels with their thresholds, and both means of F1."""
    heads = ("label", "share of rows", "threshold", "F1 as set", "F1, nested", "95% interval")
    label_table = table("Thresholds of the labels", *heads)
    nested = fitted.f1_nested if fitted.f1_nested is not None else [None] * len(fitted.labels)
    columns = (fitted.share, fitted.thresholds["macro"], fitted.f1_as_set, nested)
    for name, share, threshold, now, other in zip(fitted.labels, *columns, strict=True):
        label_table.add_row(name, f"{share:.1%}", f"{threshold:.3f}", number(now), number(other))
    shown: dict[Average, str] = {"macro": "those above", "micro": f"{fitted.thresholds['micro'][0]:.3f} for all"}
    for average, threshold in shown.items():
        now, mean = number(fitted.means_as_set[average]), (fitted.means_nested or {}).get(average)
        cells = ("-", "") if mean is None else (number(mean.value), interval_of(mean, METRICS["macro_f1"].limits))
        label_table.add_row(average, "", threshold, now, *cells, style="bold")
    notes = [
        "as set: at data.submission.thresholds, or else 0.5; nested: each fold at thresholds of the other folds",
        *(f"for {average} F1: {_argument(fitted.setting(average))}" for average in shown),
    ]
    label_table.caption, label_table.caption_justify = "\n".join(notes), "left"
    return label_table


def _argument(thresholds: dict[str, float]) -> str:
    """The setting as a command takes it, in quotes: a shell takes it for several words without them."""
    return shlex.quote(f"data.submission.thresholds={json.dumps(thresholds, ensure_ascii=False)}")
