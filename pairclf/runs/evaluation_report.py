"""What `evaluate` prints and writes: tables for the terminal, the same figures and those behind plots as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Group
from rich.table import Table

from pairclf.console import Tables, counted, number, table
from pairclf.files import atomic_file
from pairclf.runs.evaluate import Evaluation
from pairclf.scores.calibration import NestedCalibration, at_bound
from pairclf.scores.figures import METRICS, estimates_as_json, finite, labels_hint, title
from pairclf.scores.intervals import Estimate
from pairclf.scores.orders import ORDER_TITLES
from pairclf.scores.probabilities import Calibration
from pairclf.scores.slices import BIAS, FALSE_DISCOVERIES, Slice
from pairclf.task import Task

MOST_SLICES = 10
"""Slices that the terminal shows; `--json` has all."""

SAME = 1e-12
"""Nats by which two orders may differ through rounding alone."""

FEW_GROUPS = 50
"""With fewer prompts the intervals are too narrow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedEvaluation(Evaluation, Tables):
    """An evaluation that shows its tables.

    Attributes:
        task: of the rows.
    """

    task: Task

    @classmethod
    def of(cls, evaluation: Evaluation, task: Task) -> ReportedEvaluation:
        """The same figures, with what their tables need."""
        return cls(**{field.name: getattr(evaluation, field.name) for field in fields(evaluation)}, task=task)

    def tables(self) -> list[Group]:
        return [render(self, self.task)]


def render(evaluation: Evaluation, task: Task) -> Group:
    """The tables: the figures with their intervals, the calibrations, both orders, and the slices that stand out."""
    parts: list[Any] = [_figures(evaluation, task)]
    if evaluation.calibrations:
        parts.append(_calibrations(evaluation))
    if _orders_agree(evaluation):
        parts.append("Both orders have the same probabilities.")
    elif evaluation.orders is not None:
        parts.append(_orders(evaluation.orders.figures))
    if evaluation.slices:
        parts.append(_slices(evaluation.slices))
    return Group(*(part for table_or_line in parts for part in (table_or_line, "")), *notes(evaluation, task))


def _figures(evaluation: Evaluation, task: Task) -> Table:
    """A line a figure: those that a training may go by come first, the task's own before all."""
    names = [*evaluation.model, *(name for name in evaluation.figures if name not in evaluation.model)]
    columns = {"class prior": {**evaluation.figures_of_prior, **evaluation.prior}}
    if evaluation.one_order is not None:
        columns["order AB alone"] = evaluation.one_order
    if evaluation.best is not None:
        columns["best possible"] = {"log_loss": evaluation.best}
    heading = (
        f"Evaluation of {counted(evaluation.rows, 'row')} with {counted(evaluation.groups, 'prompt')}: "
        f"{evaluation.source}"
    )
    figures_table = table(heading, "", "scores", "95% interval", *columns)
    for name in names:
        found = evaluation.figures.get(name)
        value = evaluation.model.get(name, None if found is None else found.value)
        cells = (_cell(figures[name]) if name in figures else "" for figures in columns.values())
        figures_table.add_row(
            title(name, task), _cell(value), "" if found is None else interval_of(found, METRICS[name].limits), *cells,
            style="bold" if name == task.metric else None,
        )  # fmt: skip
    return figures_table


def _calibrations(evaluation: Evaluation) -> Table:
    calibration_table = table(
        f"Calibration: log loss, nested in {evaluation.folds}",
        "", "raw", "nested", "gain", "95% interval", "on its own rows",
    )  # fmt: skip
    for found in evaluation.calibrations:
        calibration_table.add_row(
            found.fitted.method, number(found.raw), number(found.nested), _cell(found.gain.value),
            interval_of(found.gain), number(found.fitted.flattering),
        )  # fmt: skip
    return calibration_table


def describe(calibration: Calibration) -> str:
    """A calibration in a few words, as the keys of an ensemble's file."""
    temperature = calibration.temperature
    values = [temperature] if isinstance(temperature, int | float) else list(temperature)
    text = f"temperature {', '.join(f'{value:.3g}' for value in values)}"
    if (calibration.tie_scale, calibration.tie_bias) != (1, 0):
        text += f", tie_scale {calibration.tie_scale:.3g}, tie_bias {calibration.tie_bias:.3g}"
    return text


def _orders_agree(evaluation: Evaluation) -> bool:
    return evaluation.orders is not None and evaluation.orders.figures["order_divergence"].value < SAME


def _orders(figures: Mapping[str, Estimate]) -> Table:
    orders_table = table("Both orders", "", "", "95% interval")
    for name, found in figures.items():
        orders_table.add_row(ORDER_TITLES[name], _cell(found.value), interval_of(found))
    return orders_table


def _slices(slices: Sequence[Slice]) -> Table | str:
    outstanding = [part for part in slices if part.stands_out]
    looks = (
        f"{counted(len(slices), 'slice or bias', 'slices and biases')} (false discovery rate {FALSE_DISCOVERIES:.0%})"
    )
    if not outstanding:
        return f"No gap stands out among {looks}."
    shown = f"; the {MOST_SLICES} with the largest gaps" * (len(outstanding) > MOST_SLICES)
    title = f"{len(outstanding)} of {looks} stand out{shown}"
    slices_table = table(title, "", "rows", "log loss", "gap", "95% interval")
    for part in outstanding[:MOST_SLICES]:
        label = f"{part.trait} {part.name}" if part.trait == BIAS else f"{part.trait}: {part.name}"
        slices_table.add_row(
            label, f"{part.rows:,}", number(part.loss), f"{part.gap.value:+.4f}", interval_of(part.gap)
        )
    of_bias = "; of a bias, surplus of probability for the side" * any(part.trait == BIAS for part in outstanding)
    slices_table.caption = f"gap: log loss of the slice less that of the other rows{of_bias}"
    slices_table.caption_justify = "left"
    return slices_table


def _cell(value: float | None) -> str:
    return number(None if value is None or math.isnan(value) else value)


def interval_of(found: Estimate, limits: tuple[float, float] = (-math.inf, math.inf)) -> str:
    """The bounds for a table, within the limits; a hyphen without draws."""
    if math.isnan(found.low) or math.isnan(found.value):
        return "-"
    return f"{max(found.low, limits[0]):.4f} to {min(found.high, limits[1]):.4f}"


def notes(evaluation: Evaluation, task: Task) -> Iterator[str]:
    """What a reader of the tables may overlook, the gravest first."""
    if evaluation.seen:
        yield (
            f"in sample: the models were trained on prompts of {evaluation.seen:,} of these rows; expect worse figures "
            "on new rows"
        )
    yield from _comparisons(evaluation)
    yield from _doubts(evaluation, task)
    yield from _on_calibration(evaluation)
    if hint := labels_hint(task):
        yield hint
    for name, value in evaluation.model.items():
        if task.multi_label and METRICS[name].labels == "label sum":
            count = len(task.classes)
            yield f"{METRICS[name].title} adds up {count} labels; their mean, as Kaggle has it, is {value / count:.4f}"
    if evaluation.swap_gain is not None and not _orders_agree(evaluation):
        yield f"the swap gained {evaluation.swap_gain:.4f} nats a row"
    if evaluation.way is not None:
        yield f"{evaluation.way:.0%} of the way from the prior to the best possible"
    if evaluation.note:
        yield evaluation.note
    if evaluation.weighted:
        yield "rows count by their weight"


def _comparisons(evaluation: Evaluation) -> Iterator[str]:
    """Whether simpler models are as good."""
    loss, prior = evaluation.model["log_loss"], evaluation.prior["log_loss"]
    if loss > prior:
        yield f"worse than the class prior: log loss {loss:.4f} against {prior:.4f}, which needs no model"
    elif evaluation.gain.low <= 0:
        yield (
            f"not distinguishable from the class prior: it gains {evaluation.gain.value:.4f} nats "
            f"({interval_of(evaluation.gain)})"
        )
    if (baseline := evaluation.baseline) is not None:
        verdict = "better than" if baseline.gain.value > 0 else "worse than"
        if not baseline.gain.excludes_zero:
            verdict = "not distinguishable from"
        yield (
            f"{verdict} the baseline {baseline.name}: log loss {loss:.4f} against {baseline.log_loss:.4f}, gain "
            f"{baseline.gain.value:+.4f} ({interval_of(baseline.gain)})"
        )


def _doubts(evaluation: Evaluation, task: Task) -> Iterator[str]:
    """Rows of which little can be said, or nothing."""
    if evaluation.without_score:
        yield f"{counted(evaluation.without_score, 'labelled row has', 'labelled rows have')} no score and are left out"
    if evaluation.groups < FEW_GROUPS:
        yield f"{counted(evaluation.groups, 'prompt')}: too few for intervals to be relied on; {FEW_GROUPS} are needed"
    if evaluation.absent:
        yield (
            f"no row has the class {', '.join(evaluation.absent)}: averages over classes say little, and areas that "
            "need it are left out"
        )
    columns = [f"p_{name}" for name in task.classes]
    if evaluation.rows > 1 and evaluation.by_row.select(columns).n_unique() == 1:
        yield "all rows have the same probabilities: the model tells no row from another"


def _on_calibration(evaluation: Evaluation) -> Iterator[str]:
    if not evaluation.calibrations:
        yield "no calibration: all rows are in one fold, and it could not be measured on others"
        return
    bounded = [found.fitted for found in evaluation.calibrations if at_bound(found.fitted.calibration)]
    for fitted in bounded:
        yield (
            f"{fitted.method}: the fit is at the bound of its range ({describe(fitted.calibration)}): the scores are "
            "no probabilities, or there are too few rows; do not use it"
        )
    advised = evaluation.advised
    if advised is None:
        gain = "no other nested gain" if bounded else "no nested gain"
        yield f"no calibration is worth it: {gain} has an interval above 0; leave the scores as they are"
        return
    method, calibration = advised.fitted.method, advised.fitted.calibration
    of_run = evaluation.setting == "predict.temperature"  # in a config it would be a setting of the training
    where = "--calibrated FILE writes it for predict and package" if of_run else f"set as {evaluation.setting}"
    yield (
        f"{method} gains {advised.gain.value:.4f} nats on rows that it was not fitted on: {describe(calibration)} "
        f"({where})"
    )


def as_tree(evaluation: Evaluation) -> dict[str, Any]:
    """All figures for JSON; what is not known is null."""
    advised = evaluation.advised
    tree = {
        name: getattr(evaluation, name)
        for name in (
            "rows", "without_score", "groups", "prior", "model", "one_order", "figures_of_prior", "swap_gain", "best",
            "way", "seen", "weighted", "note", "setting", "source", "folds", "absent", "reliability",
        )
    }  # fmt: skip
    tree |= {
        "figures": estimates_as_json(evaluation.figures, {name: figure.limits for name, figure in METRICS.items()}),
        "gain_over_prior": _estimate(evaluation.gain),
        "calibrations": [_calibration(found) for found in evaluation.calibrations],
        "advised_calibration": None if advised is None else advised.fitted.method,
        "orders": None,
        "baseline": None,
        "slices": [
            {
                "trait": part.trait, "name": part.name, "rows": part.rows, "log_loss": part.loss,
                "gap": _estimate(part.gap), "adjusted_p": part.adjusted_p, "stands_out": part.stands_out,
            }
            for part in evaluation.slices
        ],
    }  # fmt: skip
    if (orders := evaluation.orders) is not None:
        figures = {name: _estimate(found) for name, found in orders.figures.items()}
        tree["orders"] = {"figures": figures, "shift_quantiles": orders.shifts, "gain_curve": orders.gains}
    if (baseline := evaluation.baseline) is not None:
        tree["baseline"] = {
            "name": baseline.name, "log_loss": baseline.log_loss, "gain": _estimate(baseline.gain),
        }  # fmt: skip
    plain: dict[str, Any] = _finite(tree)
    return plain


def write_rows(path: Path, evaluation: Evaluation) -> None:
    """Write `Evaluation.by_row` as parquet, atomically."""
    with atomic_file(path) as temporary:
        evaluation.by_row.write_parquet(temporary)


def write_figures(path: Path, tree: Mapping[str, Any]) -> None:
    """Write all figures of a command's JSON as parquet, atomically: a line each, with the columns of `flattened`."""
    schema = {"figure": pl.String, "value": pl.Float64, "low": pl.Float64, "high": pl.Float64}
    with atomic_file(path) as temporary:
        pl.DataFrame(list(flattened(tree)), schema=schema, orient="row", strict=False).write_parquet(temporary)


def flattened(
    tree: Mapping[str, Any], before: str = ""
) -> Iterator[tuple[str, float | None, float | None, float | None]]:
    """The numbers of a tree of figures: the keys that lead there, joined by dots, the value, and its interval.

    A member of a list is called by its `trait`, `name` or `method`, or else by its number.

    >>> list(flattened({"rows": 9, "runs": [{"name": "x", "loss": {"value": 1.0, "low": 0.5, "high": 1.5}}]}))
    [('rows', 9, None, None), ('runs.x.loss', 1.0, 0.5, 1.5)]
    """
    for key, part in tree.items():
        path = f"{before}{key}"
        if isinstance(part, Mapping) and "value" in part:
            yield path, part["value"], part.get("low"), part.get("high")
            others = {name: number for name, number in part.items() if name not in ("value", "low", "high")}
            yield from flattened(others, f"{path}.")
        elif isinstance(part, Mapping):
            yield from flattened(part, f"{path}.")
        elif isinstance(part, list | tuple):
            yield from flattened({_label(one, place): one for place, one in enumerate(part)}, f"{path}.")
        elif isinstance(part, int | float) and not isinstance(part, bool):
            yield path, part, None, None


def _label(member: Any, place: int) -> str:
    named = member if isinstance(member, Mapping) else {}
    words = [str(named[key]) for key in ("trait", "name", "method") if key in named]
    return ": ".join(words) or str(place)


def _estimate(found: Estimate) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high, "p_value": found.p_value}


def _calibration(found: NestedCalibration) -> dict[str, Any]:
    return {
        "method": found.fitted.method, **found.fitted.calibration._asdict(), "raw": found.raw, "nested": found.nested,
        "flattering": found.fitted.flattering, "gain": _estimate(found.gain), "is_worth_it": found.is_worth_it,
    }  # fmt: skip


def _finite(value: Any) -> Any:
    """The same with null for numbers that are not finite, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return finite(value)
