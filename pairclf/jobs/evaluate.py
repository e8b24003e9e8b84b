"""How good scores are: against labels, against the class prior, and against the best possible where it is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.table import Table

from pairclf.config import Predict
from pairclf.console import table
from pairclf.data.identity import refuse_other_rows
from pairclf.data.tables import HASHES, class_matrix, read_logits, read_scores
from pairclf.errors import DataError
from pairclf.jobs.run import OOF, OOF_AB, OOF_LOGITS
from pairclf.scores.calibration import apply_temperature, fit_temperature
from pairclf.scores.metrics import Floats, class_prior, entropy, measure, title, way_to_best
from pairclf.scores.probabilities import mean_of_orders
from pairclf.task import Task


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores to judge, at any temperature.

    Attributes:
        rows: `id` and the columns of `tables.HASHES`.
        at: the probabilities `(N, C)` that a temperature leads to, in the place where it will be applied.
        temperature: the one to judge.
        one_order: probabilities `(N, C)` of the first order alone; None: not known, or there is no other.
        setting: what the temperature is a setting of, for people.
        where: the file.
        note: on what is measured, for people; empty: there is nothing to say.
        seen: rows whose prompt the models were trained on.
    """

    rows: pl.DataFrame
    at: Callable[[float], Floats]
    temperature: float
    one_order: Floats | None
    setting: str
    where: Path
    note: str = ""
    seen: int = 0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of one table of scores; log losses in nats a row. Rows count as their weights say.

    Attributes:
        one_order: log loss of the first order alone; `swap_gain` is what averaging both orders saved.
        best: the lowest expected log loss that any model can have, where the true probabilities are known.
        way: the part of the way from the prior's to the best log loss; None: few rows may have labels by which the
            best is no better than their own prior.
        temperature: of the lowest log loss on these very rows, `log_loss_at_it`; `setting` says what to set to it.
        weighted: rows have different weights.
        note: as `Scored` has it.
        seen: rows whose prompt the models were trained on; on these the figures are better than on new rows.
    """

    rows: int
    prior: float
    log_loss: float
    accuracy: float
    prior_accuracy: float
    calibration_error: float
    temperature: float
    log_loss_at_it: float
    setting: str
    weighted: bool
    seen: int = 0
    one_order: float | None = None
    swap_gain: float | None = None
    best: float | None = None
    way: float | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def out_of_fold(run: Path, task: Task, settings: Predict) -> Scored:
    """The out-of-fold scores of a run, made of its logits as `predict` makes them with these settings.

    With `swap: off` they are those of order AB alone. `budget` and `split` are judged as `full`: in the mean over
    models, both orders have a say there, too. A run of an older pairclf has no logits: its scores are judged as they
    are.

    Raises:
        DataError: as `read_logits` and `scored`.
    """
    path, one_way = run / OOF_LOGITS, task.swappable and settings.swap == "off"
    note = "order AB alone, as predict.swap=off has it" if one_way else ""
    if not path.is_file():
        return replace(scored(run / (OOF_AB if one_way else OOF), task), note=note)
    frame = read_logits(path, task)
    logits = np.array(frame["logits"].to_list(), dtype=np.float64)
    first = mean_of_orders(logits[:, :1], task, settings.temperature)
    judged = logits[:, :1] if one_way else logits
    return Scored(
        rows=frame.select("id", *HASHES),
        at=lambda temperature: mean_of_orders(judged, task, temperature),
        temperature=settings.temperature,
        one_order=first if task.swappable and not one_way else None,
        setting="predict.temperature",
        where=path,
        note=note,
    )


def scored(path: Path, task: Task) -> Scored:
    """The scores of a file, as they are. Their temperature is an ensemble's, which comes after all means.

    It is on top of what the scores were made with: an ensemble's file that has one gets the product of both.

    Raises:
        DataError: as `read_scores`.
    """
    frame = read_scores(path, task, foreign=True)
    values = class_matrix(frame, task)
    return Scored(
        rows=frame.select("id", *HASHES),
        at=lambda temperature: apply_temperature(values, temperature, task),
        temperature=1.0,
        one_order=None,
        setting="ensemble temperature",
        where=path,
        seen=int((frame["seen"] > 0).sum()),
    )


def evaluate(labelled: pl.DataFrame, scores: Scored, task: Task, *, truth: Path | None = None) -> Evaluation:
    """Judge the rows that have both a label and a score, joined on id and compared by their texts.

    Args:
        labelled: canonical table with targets.
        scores: as `out_of_fold` or `scored` read them.
        task: whose classes the columns are.
        truth: file with `id` and the true probability of each class (the synthetic arena has one).

    Raises:
        DataError: a score has no label, is another row's, or nothing is scored.
    """
    refuse_other_rows(scores.rows, labelled, task, scores.where)
    ids, targets, weights = _labels(labelled, scores)
    prior = np.tile(class_prior(targets, weights), (len(targets), 1))
    of_prior, found = (measure(one, targets, task, weights) for one in (prior, scores.at(scores.temperature)))
    temperature = fit_temperature(scores.at, targets, task, weights)
    single = None if scores.one_order is None else measure(scores.one_order, targets, task, weights)["log_loss"]
    best = None if truth is None else _best_possible(truth, ids, weights, task)
    return Evaluation(
        rows=len(ids),
        prior=of_prior["log_loss"],
        log_loss=found["log_loss"],
        accuracy=found["accuracy"],
        prior_accuracy=of_prior["accuracy"],
        calibration_error=found["expected_calibration_error"],
        temperature=temperature,
        log_loss_at_it=measure(scores.at(temperature), targets, task, weights)["log_loss"],
        setting=scores.setting,
        weighted=bool(np.ptp(weights) > 0),
        seen=scores.seen,
        one_order=single,
        swap_gain=None if single is None else single - found["log_loss"],
        best=best,
        way=None
        if best is None or best >= of_prior["log_loss"]
        else way_to_best(found["log_loss"], of_prior["log_loss"], best),
        note=scores.note,
    )


def _labels(labelled: pl.DataFrame, scores: Scored) -> tuple[list[str], Floats, Floats]:
    """Ids, targets `(N, C)` and weights `(N,)` of the rows that are scored, in the order of the scores."""
    columns = labelled.select("id", "target", "weight")
    joined = scores.rows.select("id").join(columns, on="id", how="left", maintain_order="left")
    if unknown := joined.filter(pl.col("target").is_null())["id"].to_list():
        raise DataError(
            "scored rows have no label",
            where=scores.where,
            rows=unknown,
            remedy="give the labelled file they were made from",
        )
    if joined.is_empty():
        raise DataError("there is nothing to evaluate: no row is scored", where=scores.where)
    return joined["id"].to_list(), np.array(joined["target"].to_list()), joined["weight"].to_numpy()


def _best_possible(path: Path, ids: list[str], weights: Floats, task: Task) -> float:
    """Log loss of the true probabilities in a file, which is read as scores of other people are."""
    truth = read_scores(path, task, foreign=True)
    wanted = pl.DataFrame({"id": ids})
    joined = wanted.join(truth.select("id", *task.classes), on="id", how="left", maintain_order="left")
    if missing := joined.filter(pl.any_horizontal(pl.all().is_null()))["id"].to_list():
        raise DataError("rows are missing", where=path, rows=missing, remedy="give true probabilities of all of them")
    return entropy(class_matrix(joined, task), weights, multi_label=task.multi_label)


def render(evaluation: Evaluation, task: Task) -> Table:
    """The figures as a table, from the prior to the best."""
    columns = (title("log_loss", task), title("accuracy", task))
    shown = table(f"Evaluation of {evaluation.rows:,} rows", "", *columns)
    shown.add_row("class prior", f"{evaluation.prior:.4f}", f"{evaluation.prior_accuracy:.4f}")
    if evaluation.one_order is not None:
        shown.add_row("model, one order", f"{evaluation.one_order:.4f}", "")
    shown.add_row("model", f"{evaluation.log_loss:.4f}", f"{evaluation.accuracy:.4f}", style="bold")
    shown.add_row(f"model at {evaluation.setting} {evaluation.temperature:.3g}", f"{evaluation.log_loss_at_it:.4f}", "")
    if evaluation.best is not None:
        shown.add_row("best possible", f"{evaluation.best:.4f}", "")
    notes = [f"{title('expected_calibration_error', task)} {evaluation.calibration_error:.4f}"]
    if evaluation.swap_gain is not None:
        notes.append(f"the swap gained {evaluation.swap_gain:.4f}")
    if evaluation.way is not None:
        notes.append(f"{evaluation.way:.0%} of the way from the prior to the best possible")
    if evaluation.note:
        notes.append(evaluation.note)
    if evaluation.weighted:
        notes.append("rows count by their weight")
    if evaluation.seen:
        notes.append(
            f"in sample: the models were trained on prompts of {evaluation.seen:,} of these rows; expect worse figures "
            "on new rows"
        )
    shown.caption, shown.caption_justify = "; ".join(notes), "left"
    return shown
