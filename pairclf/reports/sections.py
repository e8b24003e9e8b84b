"""Figures and plots as HTML: the tables of `evaluate`, `compare` and `blend`, and what their figures look like."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.table import Table

from pairclf.console import counted
from pairclf.page.html import Html, element, join, printed, table
from pairclf.page.plots import Series, bars, heat, plot
from pairclf.reports.checks import interval
from pairclf.reports.contents import Contents
from pairclf.reports.rows import matrix_of
from pairclf.runs.blend import render as render_blends
from pairclf.runs.compare import COSTS
from pairclf.runs.compare import render as render_comparison
from pairclf.runs.evaluation_report import SAME
from pairclf.runs.evaluation_report import render as render_evaluation
from pairclf.scores.figures import METRICS, judge, reliability
from pairclf.scores.metrics import Floats
from pairclf.scores.slices import BIAS

MOST_CLASSES = 10
"""Classes with a plot each, and a row and a column of the confusion matrix."""


def figures_section(contents: Contents) -> Iterator[Html | None]:
    """The tables and notes of `evaluate`, all slices, and what is not known."""
    evaluation, notes = contents.evaluation, []
    for part in render_evaluation(evaluation, contents.config.task).renderables:
        if isinstance(part, Table):
            yield printed(part)
        elif part:
            notes.append(str(part))
    notes += [f"not in this report: {name}: {why}" for name, why in contents.missing.items()]
    yield element("ul", *(element("li", note) for note in notes))
    if evaluation.slices:
        columns = ["slice or bias", "rows", "log loss", "gap (nats; of a bias, probability)", "adjusted p"]
        lines = [
            (f"{part.trait}: {part.name}", f"{part.rows:,}", f"{part.loss:.4f}", interval(part.gap),
             f"{part.adjusted_p:.3f}")
            for part in evaluation.slices
        ]  # fmt: skip
        summary = f"All {counted(len(lines), 'slice or bias', 'slices and biases')}"
        yield element("details", element("summary", summary), table(columns, lines))


def plots_section(contents: Contents) -> Iterator[Html]:
    yield from _learning_curves(contents)
    yield from _reliability(contents)
    yield _confusion(contents)
    evaluation = contents.evaluation
    if evaluation.orders is not None and any(abs(point["gain"]) > SAME for point in evaluation.orders.gains):
        x, y = zip(*((point["share"], point["gain"]) for point in evaluation.orders.gains), strict=True)
        yield plot(
            "What a second order gains", [Series("gain", x, y)], x="part of the rows, the most uncertain first",
            y="log loss gained over all rows (nats)",
        )  # fmt: skip
    if slices := [part for part in evaluation.slices if part.trait != BIAS][:20]:
        gaps = [part.gap for part in slices]
        names = [f"{part.trait}: {part.name}" if part.trait.startswith("truncation") else part.name for part in slices]
        yield bars(
            "Slices: the 20 that differ most", names,
            [gap.value for gap in gaps], x="log loss less that of the other rows (nats)",
            low=[gap.low for gap in gaps], high=[gap.high for gap in gaps],
        )  # fmt: skip


def _learning_curves(contents: Contents) -> Iterator[Html]:
    """A plot of the losses, and one of each figure of the held-out rows, with a line a fold."""
    lines = [line for of_fold in contents.curves.values() for line in of_fold]
    looks = sorted({name for line in lines for name in line if name.startswith("held_out_")})
    for name in ["loss", *looks] if lines else []:
        series = []
        for fold, of_fold in contents.curves.items():
            points = [(line["step"], line[name]) for line in of_fold if isinstance(line.get(name), int | float)]
            series.append(Series(f"fold {fold}", [x for x, _ in points], [y for _, y in points]))
        figure = METRICS.get(name.removeprefix("held_out_"))
        words = "training loss" if name == "loss" else f"{figure.title if figure else name} of held-out rows"
        yield plot(f"Learning curve: {words}", series, x="optimizer steps", y=words)


def _reliability(contents: Contents) -> Iterator[Html]:
    """For the decision and each class: predictions against what was observed, before and after the calibration."""
    evaluation, task = contents.evaluation, contents.config.task
    groups = {"as predicted": evaluation.reliability}
    if (advised := evaluation.advised) is not None:
        rows = evaluation.by_row
        after = judge(advised.fitted.nested, matrix_of(rows, "target", task), task, rows["weight"].to_numpy())
        groups[f"after {advised.fitted.method}, fitted to other folds"] = reliability(after)
    for name in list(dict.fromkeys(line["class"] for line in evaluation.reliability))[: MOST_CLASSES + 1]:
        series = [Series("perfect", [0, 1], [0, 1], style="reference")]
        for words, bins in groups.items():
            own = [line for line in bins if line["class"] == name]
            x, y, low, high = ([line[key] for line in own] for key in ("predicted", "observed", "low", "high"))
            texts = [counted(line["rows"], "row") for line in own]
            series.append(Series(words, x, y, texts=texts, low=low, high=high))
        title = f"Reliability: {'the decision' if name is None else name}"
        yield plot(title, series, x="mean probability of a bin", y="observed share, with its 95% interval")


def _confusion(contents: Contents) -> Html:
    """Labels against decisions; of several labels a row, and of many classes, the commonest confusions."""
    task, rows = contents.config.task, contents.evaluation.by_row
    judged = judge(matrix_of(rows, "p", task), matrix_of(rows, "target", task), task, rows["weight"].to_numpy())
    weights = judged.weights[:, None]
    if task.multi_label:
        held, chosen = judged.held > 0.5, judged.chosen > 0.5
        parts = [(weights * mask).sum(axis=0) for mask in (held & chosen, held & ~chosen, ~held & chosen)]
        lines = [(name, *(f"{part[place]:,.0f}" for part in parts)) for place, name in enumerate(task.classes)]
        return table(["label", "decided and right", "missed", "decided and wrong"], lines, caption="Decisions by label")
    matrix: Floats = (judged.held * weights).T @ judged.chosen
    names = {"rows": task.classes, "columns": task.classes}
    if len(task.classes) <= MOST_CLASSES:
        return heat("Labels and decisions: sum of weights", matrix.tolist(), **names, y="label", x="decision")
    np.fill_diagonal(matrix, 0)
    places = [np.unravel_index(place, matrix.shape) for place in np.argsort(-matrix, axis=None)[:20]]
    lines = [
        (task.classes[label], task.classes[decision], f"{matrix[label, decision]:,.1f}") for label, decision in places
    ]
    return table(["label", "decision", "rows, by weight"], lines, caption="The commonest confusions")


def runs_section(contents: Contents) -> Iterator[Html]:
    """The tables of `compare` and `blend`, and the front of figure and cost."""
    comparison, blends = contents.comparison, contents.blends
    assert comparison is not None
    tables = [*render_comparison(comparison), *(render_blends(blends) if blends is not None else [])]
    yield join(map(printed, tables))
    if comparison.cost is None:
        yield element("p", "No front of figure and cost: no cost is known of all runs.", class_="quiet")
        return
    metric = METRICS[comparison.metric]
    costs = [float(getattr(run.cost, comparison.cost)) for run in comparison.runs]
    figures = [run.figures[comparison.metric] for run in comparison.runs]
    every = Series(
        "run", costs, [figure.value for figure in figures], texts=[run.name for run in comparison.runs],
        low=[figure.low for figure in figures], high=[figure.high for figure in figures], style="points",
    )  # fmt: skip
    places = [place for place in np.argsort(costs, kind="stable") if comparison.runs[place].on_front]
    front = Series(
        "no other run is better and costs less", [costs[place] for place in places],
        [figures[place].value for place in places], style="steps",
    )  # fmt: skip
    title = f"{metric.title} and {COSTS[comparison.cost]}"
    yield plot(title, [front, every], x=COSTS[comparison.cost], y=metric.title, log=min(costs) > 0)
