"""Evaluate scores: metrics against labels, beside the class prior and, if it is known, the best possible log loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.table import Table

from pairclf.config import Config, Predict, deciding_settings
from pairclf.console import console, counted, number, table
from pairclf.data.identity import refuse_other_rows
from pairclf.data.scores import HASHES, class_matrix, read_logits, read_scores
from pairclf.errors import ConfigError, DataError
from pairclf.run import (
    OOF,
    OOF_AB,
    OOF_LOGITS,
    Paths,
    check_folds,
    labelled_rows,
    output_of,
    refuse_mixed_folds,
    trained_as,
    trained_otherwise,
)
from pairclf.scores.calibration import RANGE as TEMPERATURES
from pairclf.scores.calibration import fit_temperature
from pairclf.scores.metrics import METRICS, Floats, class_prior, entropy, labels_hint, measure, way_to_best
from pairclf.scores.probabilities import apply_temperature, mean_of_orders
from pairclf.task import Task


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores to evaluate, at any temperature.

    Attributes:
        rows: `id` and the columns of `scores.HASHES`.
        at: maps a temperature to probabilities `(N, C)`, with the temperature in its final place.
        temperature: the temperature to evaluate.
        one_order: probabilities `(N, C)` of the first order alone; None: unknown, or there is no other order.
        setting: the setting that holds the temperature, as printed.
        where: the file, or the first of several.
        note: a remark to print; may be empty.
        seen: number of rows on whose prompt the models were trained.
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
    """The metrics of one table of scores, weighted by row; log losses in nats per row.

    Attributes:
        prior: of the class prior.
        model: of the scores.
        one_order: of the first order alone; None: unknown, or there is no other order.
        temperature: the one with the lowest log loss on these rows; `setting` names the setting to give it to.
        tempered: at this temperature.
        best: the lowest possible expected log loss; None without true probabilities.
        way: the fraction of the way from the prior's to the best log loss; None: the best is not below the prior's,
            which can happen with few rows.
        weighted: rows have different weights.
        note: as in `Scored`.
        seen: number of rows on whose prompt the models were trained; their scores are better than those of new rows.
    """

    rows: int
    prior: dict[str, float]
    model: dict[str, float]
    temperature: float
    tempered: dict[str, float]
    setting: str
    weighted: bool
    seen: int = 0
    one_order: dict[str, float] | None = None
    best: float | None = None
    way: float | None = None
    note: str = ""

    @property
    def swap_gain(self) -> float | None:
        """The gain of averaging both orders, in nats per row."""
        return None if self.one_order is None else self.one_order["log_loss"] - self.model["log_loss"]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"swap_gain": self.swap_gain}


def evaluate_run(
    config: Config, scores: Path | None, *, folds: Sequence[int] = (), truth: Path | None = None
) -> Evaluation:
    """`evaluate` on a run's labelled rows: a file of scores, or the out-of-fold scores of all its folds or of some.

    Raises:
        ConfigError: as `check_folds`, `refuse_mixed_folds` and `out_of_fold`; or both a file and folds are given.
        DataError: as `evaluate`.
    """
    check_folds(config, folds)
    if scores is not None and folds:
        raise ConfigError(
            "--fold chooses among the run's own scores, and --scores gives others", remedy="give only one"
        )
    task, run = config.task, output_of(config)
    if scores is None:
        keys = deciding_settings(config).keys()
        trained = {fold: trained_as(Paths(run, fold)) for fold in folds or range(config.folds.n_splits)}
        said = {fold: {key: record.get(key) for key in keys} for fold, record in trained.items() if record}
        refuse_mixed_folds(run, said)
        if said and (differing := trained_otherwise(config, next(iter(said.values())))):
            console.print(f"note: these scores are of a training with other settings: {', '.join(differing.values())}")
    judged = out_of_fold(run, task, config.predict, folds) if scores is None else scored(scores, task)
    return evaluate(labelled_rows(config), judged, task, truth=truth)


def out_of_fold(run: Path, task: Task, settings: Predict, folds: Sequence[int] = ()) -> Scored:
    """The out-of-fold scores of a run, or of some folds, computed from logits as `predict` does with these settings.

    `swap: off` uses order AB alone. `budget` and `split` are evaluated like `full`, because their mean over models also
    contains both orders. A run of an older pairclf has no logits, so its scores are used as they are.

    Raises:
        ConfigError: there are none.
        DataError: as `read_logits` and `scored`.
    """
    folders, one_way = [Paths(run, fold).folder for fold in folds] or [run], task.swappable and settings.swap == "off"
    note = "order AB alone, as predict.swap=off has it" if one_way else ""
    missing = [folder for folder in folders if not (folder / OOF_LOGITS).is_file()]
    if missing == [run] and (path := run / (OOF_AB if one_way else OOF)).is_file():
        return replace(scored(path, task), note=note)
    if missing:
        raise ConfigError(
            f"{missing[0]} holds no out-of-fold scores ({OOF_LOGITS})",
            remedy="run `pairclf cv CONFIG` first; or give other scores with --scores FILE",
        )
    frame = pl.concat([read_logits(folder / OOF_LOGITS, task) for folder in folders])
    logits = np.array(frame["logits"].to_list(), dtype=np.float64)
    first = mean_of_orders(logits[:, :1], task, settings.temperature)
    judged = logits[:, :1] if one_way else logits
    return Scored(
        rows=frame.select("id", *HASHES),
        at=lambda temperature: mean_of_orders(judged, task, temperature),
        temperature=settings.temperature,
        one_order=first if logits.shape[1] > 1 and not one_way else None,
        setting="predict.temperature",
        where=folders[0] / OOF_LOGITS,
        note=note,
    )


def scored(path: Path, task: Task) -> Scored:
    """The scores of a file. Their temperature is that of an ensemble, which is applied after all means.

    It comes on top of the temperature that the scores were made with: set the product of both in the ensemble's file.

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
    """Evaluate the rows that have a label and a score; rows are joined on id, and their text hashes must agree.

    Args:
        labelled: canonical table with targets.
        scores: from `out_of_fold` or `scored`.
        task: its classes are the columns.
        truth: file with `id` and the true probability of each class (the synthetic arena has one).

    Raises:
        DataError: a score has no label, is another row's, or nothing is scored.
    """
    refuse_other_rows(scores.rows, labelled, task, scores.where)
    ids, targets, weights = _labels(labelled, scores)
    prior = np.tile(class_prior(targets, weights), (len(targets), 1))
    of_prior, of_model = (measure(values, targets, task, weights) for values in (prior, scores.at(scores.temperature)))
    temperature = fit_temperature(scores.at, targets, task, weights)
    best = None if truth is None else _best_possible(truth, ids, weights, task)
    return Evaluation(
        rows=len(ids),
        prior=of_prior,
        model=of_model,
        temperature=temperature,
        tempered=measure(scores.at(temperature), targets, task, weights),
        setting=scores.setting,
        weighted=bool(np.ptp(weights) > 0),
        seen=scores.seen,
        one_order=None if scores.one_order is None else measure(scores.one_order, targets, task, weights),
        best=best,
        way=None
        if best is None or best >= of_prior["log_loss"]
        else way_to_best(of_model["log_loss"], of_prior["log_loss"], best),
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
    """The lowest possible log loss: the entropy of the true probabilities in a file."""
    truth = read_scores(path, task, foreign=True)
    rows = pl.DataFrame({"id": ids})
    joined = rows.join(truth.select("id", *task.classes), on="id", how="left", maintain_order="left")
    if missing := joined.filter(pl.any_horizontal(pl.all().is_null()))["id"].to_list():
        raise DataError("rows are missing", where=path, rows=missing, remedy="give true probabilities of all of them")
    return entropy(class_matrix(joined, task), weights, multi_label=task.multi_label)


def render(evaluation: Evaluation, task: Task) -> Table:
    """The metrics as a table, from the class prior to the best possible."""
    lines: dict[str, dict[str, float] | None] = {
        "class prior": evaluation.prior,
        "model, one order": evaluation.one_order,
        "model": evaluation.model,
        f"model at {evaluation.setting} {evaluation.temperature:.3g}": evaluation.tempered,
        "best possible": None if evaluation.best is None else {"log_loss": evaluation.best},
    }
    evaluation_table = table(
        f"Evaluation of {counted(evaluation.rows, 'row')}", "", *(METRICS[name].title for name in evaluation.model)
    )
    for name, figures in lines.items():
        if figures is not None:
            cells = (number(figures[metric]) if metric in figures else "" for metric in evaluation.model)
            evaluation_table.add_row(name, *cells, style="bold" if name == "model" else None)
    notes = [*([hint] if (hint := labels_hint(task)) else []), *_cautions(evaluation, task)]
    if evaluation.swap_gain is not None:
        notes.append(f"the swap gained {evaluation.swap_gain:.4f} nats a row")
    if evaluation.way is not None:
        notes.append(f"{evaluation.way:.0%} of the way from the prior to the best possible")
    if evaluation.note:
        notes.append(evaluation.note)
    if evaluation.weighted:
        notes.append("rows count by their weight")
    evaluation_table.caption, evaluation_table.caption_justify = "\n".join(notes), "left"
    return evaluation_table


def _cautions(evaluation: Evaluation, task: Task) -> Iterator[str]:
    """What a reader of the table may overlook, the gravest first."""
    if evaluation.seen:
        yield (
            f"in sample: the models were trained on prompts of {evaluation.seen:,} of these rows; expect worse figures "
            "on new rows"
        )
    loss, prior = evaluation.model["log_loss"], evaluation.prior["log_loss"]
    if loss > prior:
        yield f"worse than the class prior: log loss {loss:.4f} against {prior:.4f}, which needs no model"
    low, high = TEMPERATURES
    if not low * 1.001 < evaluation.temperature < high / 1.001:
        yield (
            f"the temperature {evaluation.temperature:.3g} is at the bound of its range ({low:g} to {high:g}): the "
            "scores are no probabilities, or there are too few rows; do not use it"
        )
    yield f"the temperature {evaluation.temperature:.3g} was fitted on these very rows: its figures flatter it a little"
    for name, value in evaluation.model.items():
        if task.multi_label and METRICS[name].labels == "label sum":
            count = len(task.classes)
            yield f"{METRICS[name].title} adds up {count} labels; their mean, as Kaggle has it, is {value / count:.4f}"
