"""What a report is made of: the run's evaluation and trainings, suspect labels, and the other runs beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from pairclf.approaches.protocol import LABEL_MASS
from pairclf.config import Config
from pairclf.errors import ConfigError, DataError
from pairclf.run import TRAINING, Paths, output_of, training_log
from pairclf.runs.blend import BlendReport, blend_runs
from pairclf.runs.compare import Comparison, compare_runs
from pairclf.runs.evaluate import Evaluation, evaluate_run
from pairclf.runs.held_out import ScoredRun, open_runs
from pairclf.runs.suspects import other_labels, suspects_among


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """What is known of a run.

    Attributes:
        run: the run that the report is about, the first that was given.
        config: its own; of a file of scores, that with its labels.
        labelled: canonical table of the labelled rows.
        folds: the fold that held each row out, by id; None: not known.
        evaluation: of its held-out scores.
        curves: the lines of metrics.jsonl, by fold.
        label_mass: the labels' share of all tokens' probability after the training, by fold.
        suspicions: by id, the probability that the label is wrong; empty: not known.
        reasons: by id, what speaks against the label; without suspicions, other labels of the same texts alone.
        comparison: of all runs; None: there is one.
        blends: of all runs; None: there is one.
        missing: what the report has to leave out, and why.
    """

    run: ScoredRun
    config: Config
    labelled: pl.DataFrame
    folds: Mapping[str, int | None]
    evaluation: Evaluation
    curves: Mapping[int, Sequence[Mapping[str, Any]]]
    label_mass: Mapping[int, float]
    suspicions: Mapping[str, float]
    reasons: Mapping[str, Sequence[str]]
    comparison: Comparison | None
    blends: BlendReport | None
    missing: Mapping[str, str]

    @property
    def is_foreign(self) -> bool:
        """Whether the scores come from a file, which does not say how they were made."""
        return self.run.config is None


def gather(paths: Sequence[Path], labels: Path | None = None) -> Contents:
    """Evaluate the first of these runs, find its suspect labels, and compare and blend it with the others.

    Args:
        paths: run folders, config files of runs, or files of scores; several are compared on the rows that all have
            scored.
        labels: config file whose `data.train` has the labels; None: that of the first run.

    Raises:
        ConfigError, DataError, LeakError: as `open_runs` and `evaluate_run`.
    """
    common = open_runs(paths, labels, common=True)
    run, missing = common.runs[0], dict[str, str]()
    config = run.config or common.config
    trained = [*run.trained] if len(run.trained) < config.folds.n_splits else []
    scores = run.path if run.config is None else None
    evaluation = evaluate_run(config, scores, folds=trained, labelled=common.labelled)
    suspicions, reasons = {}, {}
    try:
        suspects = suspects_among(common).rows
        suspicions = dict(suspects.select("id", "p_wrong").iter_rows())
        reasons = dict(suspects.select("id", "reasons").iter_rows())
    except (ConfigError, DataError) as error:
        missing["suspect labels"] = error.what
        if not common.task.multi_label:
            reasons = dict(zip(common.ids, other_labels(common), strict=True))
    curves = {} if run.config is None else _curves(config, [*run.trained], missing)
    comparison = blends = None
    if len(paths) > 1:
        comparison = compare_runs(common)
        try:
            blends = blend_runs(common)
        except DataError as error:
            missing["blends"] = error.what
    records = {fold: record.get(TRAINING) or {} for fold, record in run.trained.items()}
    return Contents(
        run=run,
        config=config,
        labelled=common.labelled,
        folds=dict(common.frame.select("id", "fold").iter_rows()),
        evaluation=evaluation,
        curves=curves,
        label_mass={fold: float(record[LABEL_MASS]) for fold, record in records.items() if LABEL_MASS in record},
        suspicions=suspicions,
        reasons=reasons,
        comparison=comparison,
        blends=blends,
        missing=missing,
    )


def _curves(config: Config, folds: Sequence[int], missing: dict[str, str]) -> dict[int, list[dict[str, Any]]]:
    """The lines of each fold's metrics.jsonl."""
    curves = {}
    for fold in folds:
        try:
            if lines := training_log(Paths(output_of(config), fold)):
                curves[fold] = [line for line in lines if isinstance(line.get("step"), int)]
        except DataError as error:
            missing[f"learning curve of fold {fold}"] = error.what
    return curves
