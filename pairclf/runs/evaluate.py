"""Evaluate scores against labels: figures with intervals, calibration, both orders, slices, and simpler models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pairclf.config import Config, Predict, deciding_settings, settings_before
from pairclf.console import console, counted, progress
from pairclf.data.audit import clean, note_changes
from pairclf.data.folds import folds_of_groups, prompt_groups
from pairclf.data.identity import refuse_other_rows
from pairclf.data.rows import read_rows, targets_of
from pairclf.data.scores import HASHES, class_matrix, read_logits, read_scores
from pairclf.data.traits import preferred_sides, traits
from pairclf.errors import ConfigError, DataError
from pairclf.run import (
    FOLDS,
    OOF,
    OOF_AB,
    OOF_LOGITS,
    Paths,
    check_folds,
    folds_of,
    labelled_rows,
    output_of,
    refuse_mixed_folds,
    trained_as,
    trained_otherwise,
)
from pairclf.runs.truncation import MADE_EQUAL, less_cut, lost_tokens, truncation_traits
from pairclf.scores.calibration import (
    NESTED_FOLDS,
    FittedCalibration,
    Method,
    NestedCalibration,
    Rows,
    Scores,
    fit_nested,
    methods_of,
    scores_of,
)
from pairclf.scores.figures import Judged, judge, measure, reliability, statistics_of, values_of
from pairclf.scores.intervals import Estimate, Statistic, estimate_families, mean_of
from pairclf.scores.metrics import Floats, class_prior, entropy, row_losses, way_to_best
from pairclf.scores.orders import TwoOrders, gain_curve, order_statistics, shift_quantiles, two_orders
from pairclf.scores.probabilities import Calibration, mean_of_orders
from pairclf.scores.slices import Look, Slice, looks_at, slices_of, surplus_of
from pairclf.task import Task

VISIBLE = 5_000
"""Rows from which on the work takes more than a second, and a progress bar is shown."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores to evaluate, with any calibration.

    Attributes:
        rows: `id` and the columns of `scores.HASHES`.
        at: maps a calibration to probabilities `(N, C)`.
        temperature: the temperature to evaluate.
        logits: `(N, 2, C)` of both orders, each in its own columns; None: unknown, or there is no other order.
        methods: the methods of calibration that prediction can apply in this place; None: all of the task's.
        setting: the setting that holds the temperature, as printed.
        where: the file, or the first of several.
        source: what is judged, in words.
        note: a remark to print; may be empty.
        seen: number of rows on whose prompt the models were trained.
    """

    rows: pl.DataFrame
    at: Scores
    temperature: float
    logits: Floats | None
    setting: str
    where: Path
    source: str
    methods: Sequence[Method] | None = None
    note: str = ""
    seen: int = 0


@dataclass(frozen=True, slots=True)
class Baseline:
    """A simpler model on the same rows.

    Attributes:
        name: its file or run.
        log_loss: its own.
        gain: its log loss less that of the evaluated scores, paired: below 0 if these are worse.
    """

    name: str
    log_loss: float
    gain: Estimate


@dataclass(frozen=True, slots=True)
class Orders:
    """Both orders: figures of `ORDER_TITLES`, quantiles of the largest change of a probability, and the gain of a
    second order for a share of the rows."""

    figures: Mapping[str, Estimate]
    shifts: Mapping[str, float]
    gains: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is known of one table of scores, weighted by row; log losses in nats per row.

    Attributes:
        rows: number of rows.
        without_score: number of labelled rows that have no score, and are left out.
        groups: number of prompts (groups of the folds), over which intervals are estimated.
        figures: `METRICS` of the scores, with intervals.
        figures_of_prior: values of the same figures of the class prior.
        prior: the metrics of the class prior.
        model: the metrics of the scores.
        gain: the prior's log loss less that of the scores, paired.
        one_order: the metrics of the first order alone; None: unknown, or there is no other order.
        calibrations: each method, raw, nested and flattering; empty if all rows are of one prompt.
        setting: the setting that a temperature goes to.
        source: what is judged, in words.
        folds: in which folds the calibrations are nested, in words.
        weighted: rows have different weights.
        seen: number of rows on whose prompt the models were trained; their scores are better than those of new rows.
        orders: what the two orders differ in; None: one of them is unknown.
        slices: slices and biases, those that stand out first.
        reliability: bins of `figures.reliability`.
        by_row: a line a row, for tables and plots: see `_by_row`.
        absent: classes that no row has.
        baseline: a simpler model; None: none is known.
        best: the lowest possible expected log loss; None without true probabilities.
        way: the fraction of the way from the prior's to the best log loss; None: the best is not below the prior's,
            which can happen with few rows.
        note: as in `Scored`.
    """

    rows: int
    without_score: int
    groups: int
    figures: Mapping[str, Estimate]
    figures_of_prior: Mapping[str, float]
    prior: dict[str, float]
    model: dict[str, float]
    gain: Estimate
    calibrations: Sequence[NestedCalibration]
    folds: str
    setting: str
    source: str
    weighted: bool
    slices: Sequence[Slice]
    reliability: Sequence[Mapping[str, Any]]
    by_row: pl.DataFrame
    absent: Sequence[str]
    seen: int = 0
    one_order: dict[str, float] | None = None
    orders: Orders | None = None
    baseline: Baseline | None = None
    best: float | None = None
    way: float | None = None
    note: str = ""

    @property
    def swap_gain(self) -> float | None:
        """The gain of averaging both orders, in nats per row."""
        return None if self.one_order is None else self.one_order["log_loss"] - self.model["log_loss"]

    @property
    def advised(self) -> NestedCalibration | None:
        """The calibration to use: the simplest whose nested gain is no chance and that no other one clearly beats."""
        chosen: NestedCalibration | None = None
        for candidate in self.calibrations:
            if candidate.is_worth_it and (chosen is None or candidate.is_better_than(chosen)):
                chosen = candidate
        return chosen


def evaluate_run(
    config: Config,
    scores: Path | None,
    *,
    folds: Sequence[int] = (),
    truth: Path | None = None,
    data: Path | None = None,
    baseline: Path | None = None,
    labelled: pl.DataFrame | None = None,
) -> Evaluation:
    """`evaluate` on a run's labelled rows: a file of scores, or the out-of-fold scores of all its folds or of some.

    Args:
        config: of the run.
        scores: the file.
        folds: the folds; empty: all.
        truth: as in `evaluate`.
        data: a labelled file with the rows of `scores`, in place of `data.train`.
        baseline: a run folder or a file of scores to compare with; None: a classical run beside this one, if any.
        labelled: the rows of `data.train`, if they were read before.

    Raises:
        ConfigError: as `check_folds`, `refuse_mixed_folds` and `out_of_fold`; or both a file and folds are given; or
            `data` is given without `scores`.
        DataError: as `evaluate`.
    """
    check_folds(config, folds)
    if scores is not None and folds:
        raise ConfigError(
            "--fold chooses among the run's own scores, and --scores gives others", remedy="give only one"
        )
    if data is not None and scores is None:
        raise ConfigError(
            f"--data {data} has other rows than the run's out-of-fold scores",
            remedy="score them first (pairclf predict BUNDLE --data FILE --scores scores.parquet), and give --scores",
        )
    task, run = config.task, output_of(config)
    if scores is None:
        _check_trainings(config, run, folds)
    judged = out_of_fold(run, task, config.predict, folds) if scores is None else scored(scores, task)
    if labelled is None:
        labelled = labelled_rows(config) if data is None else _labelled_file(config, data)
    known = folds_of(config, labelled) if data is None and (run / FOLDS).is_file() else None
    lost = None
    if scores is None and known is not None:
        lost = lost_tokens(config, labelled, judged.rows.select("id").join(known, on="id"))
    if folds and known is not None:  # rows of other folds don't lack a score
        labelled = labelled.join(known.filter(pl.col("fold").is_in(folds)), on="id", how="semi")
    baseline = baseline or _classical_beside(run, config)
    return evaluate(labelled, judged, task, truth=truth, folds=known, baseline=baseline, lost=lost)


def _check_trainings(config: Config, run: Path, folds: Sequence[int]) -> None:
    """Refuse folds of different settings, and name settings that changed since the training."""
    keys = deciding_settings(config).keys()
    trained = {fold: trained_as(Paths(run, fold)) for fold in folds or range(config.folds.n_splits)}
    said = {fold: settings_before(keys, record) for fold, record in trained.items() if record}
    refuse_mixed_folds(run, said)
    if said and (differing := trained_otherwise(config, next(iter(said.values())))):
        console.print(f"note: these scores are of a training with other settings: {', '.join(differing.values())}")


def _labelled_file(config: Config, data: Path) -> pl.DataFrame:
    """The rows of a labelled file, whose columns are called as in test files, repaired by `data.rules`."""
    frame = read_rows([config.data.unlabelled(data)], config.task, labelled=True)
    frame, findings = clean(frame, config.task, config.data.rules, labelled=True)
    note_changes(findings)
    return frame


def _classical_beside(run: Path, config: Config) -> Path | None:
    """A classical run of the same task in the same folder; None: there is none, or it is this run."""
    wanted = {name: value for name, value in deciding_settings(config).items() if name.startswith("task")}
    wanted["approach"] = "classical"
    for folder in sorted(run.parent.glob("*/")):
        trained = trained_as(Paths(folder, 0))
        is_wanted = all(trained.get(name) == value for name, value in wanted.items())
        if is_wanted and folder.resolve() != run.resolve() and (folder / OOF).is_file():
            return folder
    return None


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
        return replace(scored(path, task), source="out-of-fold scores", note=note)
    if missing:
        raise ConfigError(
            f"{missing[0]} holds no out-of-fold scores ({OOF_LOGITS})",
            remedy="run `pairclf cv CONFIG` first; or give other scores with --scores FILE",
        )
    frame = pl.concat([read_logits(folder / OOF_LOGITS, task) for folder in folders])
    logits = np.array(frame["logits"].to_list(), dtype=np.float64)
    judged = logits[:, :1] if one_way else logits

    def at(calibration: Calibration | float, rows: Rows | None = None, /) -> Floats:
        return mean_of_orders(judged if rows is None else judged[rows], task, calibration)

    return Scored(
        rows=frame.select("id", *HASHES),
        at=at,
        temperature=settings.temperature,
        logits=logits if logits.shape[1] > 1 and not one_way else None,
        setting="predict.temperature",
        where=folders[0] / OOF_LOGITS,
        source="out-of-fold scores",
        note=note,
    )


def scored(path: Path, task: Task) -> Scored:
    """The scores of a file. Their temperature is that of an ensemble, which is applied after all means.

    It comes on top of the temperature that the scores were made with: set the product of both in the ensemble's file.

    Raises:
        DataError: as `read_scores`.
    """
    frame = read_scores(path, task, foreign=True)
    return Scored(
        rows=frame.select("id", *HASHES),
        at=scores_of(class_matrix(frame, task), task),
        temperature=1.0,
        logits=None,
        methods=("temperature",),
        setting="ensemble temperature",
        where=path,
        source=f"the scores of {path.name}",
        seen=int((frame["seen"] > 0).sum()),
    )


def evaluate(
    labelled: pl.DataFrame,
    scores: Scored,
    task: Task,
    *,
    truth: Path | None = None,
    folds: pl.DataFrame | None = None,
    baseline: Path | None = None,
    lost: pl.DataFrame | None = None,
) -> Evaluation:
    """Evaluate the rows that have a label and a score; rows are joined on id, and their text hashes must agree.

    Args:
        labelled: canonical table with targets.
        scores: from `out_of_fold` or `scored`.
        task: its classes are the columns.
        truth: file with `id` and the true probability of each class (the synthetic arena has one).
        folds: of the run that made the scores: `id`, `fold`, `group`; None: prompts are groups, and calibrations are
            nested in `NESTED_FOLDS` folds of them.
        baseline: file of scores, or run folder with out-of-fold scores, of a simpler model.
        lost: tokens that truncation cut of each row, as `lost_tokens`; None: not known.

    Raises:
        DataError: a score has no label, is another row's, or nothing is scored.
    """
    refuse_other_rows(scores.rows, labelled, task, scores.where)
    rows = _labelled_scores(labelled, scores)
    lost = None if lost is None else rows.select("id").join(lost, on="id", how="left", maintain_order="left")
    weights, raw = rows["weight"].to_numpy(), Calibration(scores.temperature)
    split = _split(rows, folds, task)
    judged = judge(scores.at(raw), targets_of(rows), task, weights)
    losses = _losses(judged.predicted, judged)
    prior = np.tile(class_prior(judged.target, weights), (len(rows), 1))
    of_prior, of_model = (measure(values, judged.target, task, weights) for values in (prior, judged.predicted))
    best = None if truth is None else _best_possible(truth, rows["id"].to_list(), weights, task)
    orders = None if scores.logits is None else two_orders(scores.logits, task, raw)
    with progress("evaluate", total=3, visible=len(rows) >= VISIBLE) as advance:
        fitted = _fit_calibrations(scores, judged, split.folds)
        advance(note="slices")
        looks = _looks(rows, judged, split, lost)
        advance(note="intervals")
        families = _statistics(judged, prior, fitted, looks, orders)
        others = None if baseline is None else _losses_of(baseline, rows, scores, judged)
        if others is not None:
            families["gains"]["baseline"] = mean_of(others - losses)
        estimates = estimate_families(families, split.groups, weights)
        advance()
    return Evaluation(
        rows=len(rows),
        without_score=int((~labelled["train_only"]).sum()) - int((~rows["train_only"]).sum()),
        groups=len(np.unique(split.groups)),
        figures=estimates["figures"],
        figures_of_prior=values_of(judge(prior, judged.target, task, weights)),
        prior=of_prior,
        model=of_model,
        gain=estimates["gains"]["prior"],
        calibrations=_worth(fitted, losses, weights, estimates["gains"]),
        setting=scores.setting,
        source=scores.source,
        folds=split.words,
        weighted=bool(np.ptp(weights) > 0),
        slices=slices_of(looks, estimates["slices"], losses, weights),
        reliability=reliability(judged),
        by_row=_by_row(rows, judged, prior, fitted, orders, split, lost),
        absent=[name for name, share in zip(task.classes, judged.held.sum(axis=0), strict=True) if share == 0],
        seen=scores.seen,
        one_order=None if orders is None else measure(orders.first, judged.target, task, weights),
        orders=None if orders is None else _compare_orders(orders, judged, estimates["orders"]),
        baseline=None if others is None else _baseline(baseline, others, weights, estimates["gains"]["baseline"]),
        best=best,
        way=_way(of_model["log_loss"], of_prior["log_loss"], best),
        note=scores.note,
    )


def _labelled_scores(labelled: pl.DataFrame, scores: Scored) -> pl.DataFrame:
    """The canonical rows that are scored, in the order of the scores."""
    joined = scores.rows.select("id").join(labelled, on="id", how="left", maintain_order="left")
    if unknown := joined.filter(pl.col("target").is_null())["id"].to_list():
        raise DataError(
            "scored rows have no label",
            where=scores.where,
            rows=unknown,
            remedy="give the labelled file they were made from",
        )
    if joined.is_empty():
        raise DataError("there is nothing to evaluate: no row is scored", where=scores.where)
    return joined


class _Split(NamedTuple):
    """The prompt groups `(N,)`, over which intervals are estimated, and the folds `(N,)` in which calibrations are
    nested, with words for them; `of_run`: they are those that held the rows out."""

    groups: NDArray[np.object_]
    folds: NDArray[np.int64]
    words: str
    of_run: bool


def _split(rows: pl.DataFrame, folds: pl.DataFrame | None, task: Task) -> _Split:
    if folds is not None:
        known = rows.select("id").join(folds, on="id", how="left", maintain_order="left")
        if known["fold"].n_unique() > 1 and known["fold"].null_count() == 0:
            return _Split(known["group"].to_numpy(), known["fold"].to_numpy(), "the run's folds", True)
    groups = prompt_groups(rows, task)
    return _Split(groups.to_numpy(), folds_of_groups(groups, NESTED_FOLDS), f"{NESTED_FOLDS} folds of prompts", False)


def _losses(predicted: Floats, judged: Judged) -> Floats:
    return row_losses(predicted, judged.target, multi_label=judged.task.multi_label)


def _fit_calibrations(scores: Scored, judged: Judged, folds: NDArray[np.int64]) -> list[FittedCalibration]:
    if len(np.unique(folds)) < 2:
        return []
    return [fit_nested(method, scores.at, judged, folds) for method in scores.methods or methods_of(judged.task)]


def _worth(
    fitted: Sequence[FittedCalibration], losses: Floats, weights: Floats, gains: Mapping[str, Estimate]
) -> list[NestedCalibration]:
    raw = float(np.average(losses, weights=weights))
    return [
        NestedCalibration(found, raw, float(np.average(found.losses, weights=weights)), gains[found.method])
        for found in fitted
    ]


def _statistics(
    judged: Judged,
    prior: Floats,
    fitted: Sequence[FittedCalibration],
    looks: Mapping[str, Look],
    orders: TwoOrders | None,
) -> dict[str, dict[str, Statistic]]:
    """All that gets an interval: figures, gains over the prior and of calibrations, slices, orders."""
    losses = _losses(judged.predicted, judged)
    gains = {"prior": mean_of(_losses(prior, judged) - losses)}
    return {
        "figures": statistics_of(judged),
        "gains": gains | {found.method: mean_of(losses - found.losses) for found in fitted},
        "slices": {name: look.gap for name, look in looks.items()},
        "orders": {} if orders is None else order_statistics(orders, judged.target, judged.task),
    }


def _compare_orders(orders: TwoOrders, judged: Judged, figures: Mapping[str, Estimate]) -> Orders:
    curve = gain_curve(orders, judged.target, judged.weights)
    return Orders(figures, shift_quantiles(orders), curve)


def _looks(rows: pl.DataFrame, judged: Judged, split: _Split, lost: pl.DataFrame | None) -> dict[str, Look]:
    """Slices by the traits of the texts, by what truncation cut, by file and by fold, and biases for a side."""
    task, columns = judged.task, traits(rows, judged.task)
    by_trait: dict[str, Sequence[str | None]] = {name: columns[name].to_list() for name in columns.columns}
    if lost is not None:
        by_trait |= truncation_traits(lost, task)
    if split.of_run:
        by_trait["fold"] = [f"fold {fold}" for fold in split.folds]
    surplus = {}
    if task.swap_classes is not None:
        sides = (task.classes.index(task.swap_classes[0]), task.classes.index(task.swap_classes[1]))
        preferred = preferred_sides(rows, task)
        if lost is not None:
            preferred["the answer that truncation cut less"] = less_cut(lost, task)
        surplus = {
            name: surplus_of(judged.predicted, judged.target, favoured, sides) for name, favoured in preferred.items()
        }
    return looks_at(_losses(judged.predicted, judged), by_trait, surplus)


def _losses_of(path: Path, rows: pl.DataFrame, scores: Scored, judged: Judged) -> Floats | None:
    """The losses `(N,)` of a simpler model's scores; None: it does not know all of these rows.

    Raises:
        DataError: as `read_scores`.
    """
    task = judged.task
    others = read_scores(path / OOF if path.is_dir() else path, task, foreign=True)
    joined = scores.rows.select("id", "row_hash").join(others, on="id", how="left", maintain_order="left")
    differing = (joined["row_hash"] != joined["row_hash_right"]).fill_null(value=False)
    if missing := int((joined[task.classes[0]].is_null() | differing).sum()):
        console.print(f"note: {path} is no baseline: it has no score of {counted(missing, 'row')} of {len(rows):,}")
        return None
    return _losses(class_matrix(joined, task), judged)


def _baseline(path: Path | None, losses: Floats, weights: Floats, gain: Estimate) -> Baseline:
    return Baseline(str(path), float(np.average(losses, weights=weights)), gain)


def _by_row(
    rows: pl.DataFrame,
    judged: Judged,
    prior: Floats,
    fitted: Sequence[FittedCalibration],
    orders: TwoOrders | None,
    split: _Split,
    lost: pl.DataFrame | None,
) -> pl.DataFrame:
    """A line a row: `id`, `fold` (in which calibrations are nested), `group`, `weight`, `target_CLASS`, `p_CLASS`,
    `p_ab_CLASS` and `p_ba_CLASS` of both orders, the losses `loss`, `loss_prior`, `loss_METHOD` (nested), `loss_ab` and
    `loss_ba`; `cut_FIELD` (tokens), and `MADE_EQUAL`."""
    classes = judged.task.classes
    matrices = {"target": judged.target, "p": judged.predicted}
    losses = {"loss": _losses(judged.predicted, judged), "loss_prior": _losses(prior, judged)}
    losses |= {f"loss_{found.method.replace(' ', '_')}": found.losses for found in fitted}
    if orders is not None:
        losses |= {"loss_ab": _losses(orders.first, judged), "loss_ba": _losses(orders.second, judged)}
        matrices |= {"p_ab": orders.first, "p_ba": orders.second}
    cut = [] if lost is None else [lost[name].alias(f"cut_{name}") for name in judged.task.fields] + [lost[MADE_EQUAL]]
    return rows.select(
        "id",
        pl.Series("fold", split.folds, dtype=pl.Int64),
        pl.Series("group", split.groups, dtype=pl.String),
        "weight",
        *(
            pl.Series(f"{part}_{name}", values[:, column], dtype=pl.Float64)
            for part, values in matrices.items()
            for column, name in enumerate(classes)
        ),
        *(pl.Series(name, values, dtype=pl.Float64) for name, values in losses.items()),
        *cut,
    )


def _best_possible(path: Path, ids: list[str], weights: Floats, task: Task) -> float:
    """The lowest possible log loss: the entropy of the true probabilities in a file."""
    truth = read_scores(path, task, foreign=True)
    rows = pl.DataFrame({"id": ids})
    joined = rows.join(truth.select("id", *task.classes), on="id", how="left", maintain_order="left")
    if missing := joined.filter(pl.any_horizontal(pl.all().is_null()))["id"].to_list():
        raise DataError("rows are missing", where=path, rows=missing, remedy="give true probabilities of all of them")
    return entropy(class_matrix(joined, task), weights, multi_label=task.multi_label)


def _way(loss: float, prior: float, best: float | None) -> float | None:
    return None if best is None or best >= prior else way_to_best(loss, prior, best)
