"""How good scores are: against labels, against the class prior, and against the best possible where it is known."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl
from polars.exceptions import PolarsError
from rich.table import Table

from pairclf.console import table
from pairclf.data.tables import read_scores
from pairclf.errors import DataError
from pairclf.scores.calibration import apply_temperature, fit_temperature
from pairclf.scores.metrics import (
    Floats,
    accuracy,
    class_prior,
    entropy,
    expected_calibration_error,
    log_loss,
    way_to_best,
)
from pairclf.task import Task


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of one table of scores; log losses in nats a row.

    Attributes:
        one_order: log loss of the first order alone; `swap_gain` is what averaging both orders saved.
        best: the lowest expected log loss that any model can have, where the true probabilities are known.
        way: the part of the way from the prior's to the best log loss.
        temperature: what the logits should be divided by, fitted on these very rows; `log_loss_at_it` is its loss.
    """

    rows: int
    prior: float
    log_loss: float
    accuracy: float
    prior_accuracy: float
    calibration_error: float
    temperature: float
    log_loss_at_it: float
    one_order: float | None = None
    swap_gain: float | None = None
    best: float | None = None
    way: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


def evaluate(
    labelled: pl.DataFrame, scores: Path, task: Task, *, one_order: Path | None = None, truth: Path | None = None
) -> Evaluation:
    """Judge the rows that have both a label and a score, joined on id.

    Args:
        labelled: canonical table with targets.
        scores: scores parquet.
        one_order: scores of the first order alone, to tell what the swap gained.
        truth: parquet with `id` and the true probability of each class (the synthetic arena has one).

    Raises:
        DataError: a score has no label, or nothing is scored.
    """
    scored = read_scores(scores, task)
    ids, targets = _targets(labelled, scored, scores)
    predicted = _aligned(scored, ids, task, scores)
    prior = np.tile(class_prior(targets), (len(targets), 1))
    loss, prior_loss = log_loss(predicted, targets), log_loss(prior, targets)
    temperature = fit_temperature(predicted, targets)
    single = (
        None if one_order is None else log_loss(_aligned(read_scores(one_order, task), ids, task, one_order), targets)
    )
    best = None if truth is None else entropy(_aligned(_read_truth(truth, task), ids, task, truth))
    return Evaluation(
        rows=len(ids),
        prior=prior_loss,
        log_loss=loss,
        accuracy=accuracy(predicted, targets),
        prior_accuracy=accuracy(prior, targets),
        calibration_error=expected_calibration_error(predicted, targets),
        temperature=temperature,
        log_loss_at_it=log_loss(apply_temperature(predicted, temperature), targets),
        one_order=single,
        swap_gain=None if single is None else single - loss,
        best=best,
        way=None if best is None else way_to_best(loss, prior_loss, best),
    )


def _read_truth(path: Path, task: Task) -> pl.DataFrame:
    try:
        truth = pl.read_parquet(path, glob=False)
    except (OSError, PolarsError) as error:
        raise DataError(f"true probabilities can't be read: {error}", where=path) from error
    if lacking := {"id", *task.classes} - set(truth.columns):
        raise DataError(f"true probabilities lack the columns {sorted(lacking)}", where=path)
    return truth


def _targets(labelled: pl.DataFrame, scored: pl.DataFrame, where: Path) -> tuple[list[str], Floats]:
    joined = scored.select("id").join(labelled.select("id", "target"), on="id", how="left", maintain_order="left")
    if unknown := joined.filter(pl.col("target").is_null())["id"].to_list():
        raise DataError(
            "scored rows have no label", where=where, rows=unknown, remedy="give the labelled file they were made from"
        )
    if joined.is_empty():
        raise DataError("there is nothing to evaluate: no row is scored", where=where)
    return joined["id"].to_list(), np.array(joined["target"].to_list(), dtype=np.float64)


def _aligned(frame: pl.DataFrame, ids: list[str], task: Task, where: Path) -> Floats:
    """Class columns of `frame` in the order of `ids`, joined on id."""
    wanted = pl.DataFrame({"id": ids})
    joined = wanted.join(frame.select("id", *task.classes), on="id", how="left", maintain_order="left")
    if missing := joined.filter(pl.any_horizontal(pl.all().is_null()))["id"].to_list():
        raise DataError("rows are missing", where=where, rows=missing, remedy="score all of them, or give another file")
    return joined.select(task.classes).to_numpy()


def render(evaluation: Evaluation) -> Table:
    """The figures as a table, from the prior to the best."""
    shown = table(f"Evaluation of {evaluation.rows:,} rows", "", "log loss", "accuracy")
    shown.add_row("class prior", f"{evaluation.prior:.4f}", f"{evaluation.prior_accuracy:.4f}")
    if evaluation.one_order is not None:
        shown.add_row("model, one order", f"{evaluation.one_order:.4f}", "")
    shown.add_row("model", f"{evaluation.log_loss:.4f}", f"{evaluation.accuracy:.4f}", style="bold")
    shown.add_row(f"model at temperature {evaluation.temperature:.2f}", f"{evaluation.log_loss_at_it:.4f}", "")
    if evaluation.best is not None:
        shown.add_row("best possible", f"{evaluation.best:.4f}", "")
    notes = [f"expected calibration error {evaluation.calibration_error:.4f}"]
    if evaluation.swap_gain is not None:
        notes.append(f"the swap gained {evaluation.swap_gain:.4f}")
    if evaluation.way is not None:
        notes.append(f"{evaluation.way:.0%} of the way from the prior to the best possible")
    shown.caption, shown.caption_justify = "; ".join(notes), "left"
    return shown
