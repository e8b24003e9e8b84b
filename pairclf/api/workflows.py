"""The workflows of a run as functions: train, cross-validate, evaluate, report, compare, blend and sweep."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from rich.table import Table

from pairclf.api.arguments import checked
from pairclf.bundles.manifest import read_manifest
from pairclf.config import Config, dump_config
from pairclf.console import Tables, number, table
from pairclf.data.scores import read_scores
from pairclf.files import check_file_target, write_text
from pairclf.reports.report import write_report
from pairclf.run import OOF, check_training, output_of
from pairclf.runs.blend import BlendReport, blend_runs, note_written, write_ensemble
from pairclf.runs.compare import Comparison, compare_runs
from pairclf.runs.evaluate import evaluate_run
from pairclf.runs.evaluation_report import ReportedEvaluation
from pairclf.runs.held_out import open_runs
from pairclf.runs.sweep import SweepResult, effects_of, plan_sweep, train_arms
from pairclf.scores.figures import METRICS, metrics_of, read_config
from pairclf.task import Task
from pairclf.trust import Trust, grant

AnyConfig = str | os.PathLike[str] | Mapping[str, Any] | Config
"""Settings of a run: the path of a YAML file, a mapping with its sections, or a checked config."""

SWEEP_CONFIG = "sweep.yaml"
"""In the run folder: the settings of a sweep that was not given as a file."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainedFolds(Tables):
    """A cross-validated run.

    Attributes:
        task: of its rows.
        folder: the run's.
        bundles: of the folds that were trained, in their order.
    """

    task: Task
    folder: Path
    bundles: list[Path]

    @property
    def scores(self) -> pl.DataFrame:
        """Out-of-fold probabilities of all folds so far: `id`, one column a class, and what is known of each row."""
        return read_scores(self.folder / OOF, self.task)

    @property
    def metrics(self) -> dict[int, dict[str, float]]:
        """Metrics of the held-out rows, by fold."""
        manifests = [read_manifest(bundle) for bundle in self.bundles]
        return {manifest.fold: manifest.metrics for manifest in manifests if manifest.fold is not None}

    def tables(self) -> Iterator[Table]:
        names = metrics_of(self.task)
        folds = table(f"Folds of {self.folder}", "fold", "rows", *(METRICS[name].title for name in names))
        for fold, figures in self.metrics.items():
            folds.add_row(str(fold), f"{figures['rows']:,.0f}", *(number(figures.get(name)) for name in names))
        yield folds


@checked
def fit(
    config: AnyConfig,
    *overrides: str,
    fold: int | None = None,
    resume: bool | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Train one classifier, as `pairclf train` does, in this process.

    Args:
        config: the settings; a mapping has to name `output_dir`.
        overrides: `key=value`, such as `train.num_train_epochs=2`.
        fold: to hold out, counted from 0; None: train on all rows.
        resume: True: continue from the last checkpoint; False: delete checkpoints and results, and train again; None:
            keep a finished fold, and fail on an unfinished one.
        trust_remote_code: run the Python files that come with a model.

    Returns:
        The bundle's folder, for `pairclf.load`.

    Raises:
        ConfigError, DataError, LeakError, ModelError, CheckpointError: as the command.
    """
    settings = _settings(config, overrides, trust_remote_code)
    check_training(settings, [] if fold is None else [fold])
    from pairclf.runs.fit import fit as train

    return train(settings, fold, resume=resume, config_file=_file(config))


@checked
def cross_validate(
    config: AnyConfig,
    *overrides: str,
    folds: Sequence[int] | None = None,
    resume: bool | None = None,
    trust_remote_code: bool = False,
) -> TrainedFolds:
    """Train one classifier a fold, as `pairclf cv` does, in this process.

    Args:
        config: the settings; a mapping has to name `output_dir`.
        overrides: `key=value`.
        folds: to train, counted from 0; None: as `folds.run` says, or all.
        resume: as for `fit`.
        trust_remote_code: run the Python files that come with a model.

    Raises:
        ConfigError, DataError, LeakError, ModelError, CheckpointError: as the command.
    """
    chosen = [] if folds is None else [f"folds.run={[int(fold) for fold in folds]}"]
    settings = _settings(config, [*overrides, *chosen], trust_remote_code)
    check_training(settings, settings.folds.run or [])
    from pairclf.runs.cv import cross_validate as train

    bundles = train(settings, resume=resume, config_file=_file(config))
    return TrainedFolds(settings.task, output_of(settings), bundles)


@checked
def evaluate(
    config: AnyConfig,
    *overrides: str,
    scores: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    folds: Sequence[int] = (),
    truth: str | os.PathLike[str] | None = None,
    baseline: str | os.PathLike[str] | None = None,
) -> ReportedEvaluation:
    """Compare scores with labels, as `pairclf evaluate` does: figures with intervals, calibration, orders, slices.

    Args:
        config: the run's settings.
        overrides: `key=value`.
        scores: file of scores; None: the run's out-of-fold scores.
        data: labelled file with the rows of `scores`; None: `data.train`.
        folds: of the run's scores; empty: all.
        truth: file of true probabilities, as `pairclf demo` writes it.
        baseline: run folder or scores of a simpler model; None: a classical run beside, if there is one.

    Returns:
        The figures. `seen` is the number of rows that the models were trained on: with any, they hold for no new rows.

    Raises:
        ConfigError, DataError: as the command.
    """
    settings = read_config(_source(config), overrides)
    judged = evaluate_run(
        settings, _path(scores), folds=folds, truth=_path(truth), data=_path(data), baseline=_path(baseline)
    )
    return ReportedEvaluation.of(judged, settings.task)


@checked
def report(
    *runs: AnyConfig, out: str | os.PathLike[str] | None = None, config: str | os.PathLike[str] | None = None
) -> Path:
    """Write one HTML file about a run, as `pairclf report` does: figures, plots, checks, and rows to look at.

    Args:
        runs: run folders, configs of runs, or files of scores; the report is about the first, and compares the others.
        out: the file; None: report.html in the folder of the first run.
        config: config file whose `data.train` has the labels; None: that of the first run.

    Returns:
        The file.

    Raises:
        ConfigError, DataError, LeakError: as the command.
    """
    return write_report([_run(run) for run in runs], _path(out), _path(config))


@checked
def compare(
    *runs: AnyConfig,
    config: str | os.PathLike[str] | None = None,
    folds: Sequence[int] = (),
    common: bool = False,
    public_rows: int | None = None,
) -> Comparison:
    """Compare runs on the same rows, as `pairclf compare` does: figures, paired differences, costs.

    Args:
        runs: run folders, configs of runs, or files of scores.
        config: config file whose `data.train` has the labels; None: that of the first run.
        folds: whose rows are used; empty: all that were scored.
        common: use the rows that all have scored, where runs have scored different ones.
        public_rows: rows of the public leaderboard; None: those of the hidden test.

    Raises:
        ConfigError, DataError, LeakError: as the command.
    """
    rows = open_runs([_run(run) for run in runs], _path(config), folds=folds, common=common)
    return compare_runs(rows, public_rows=public_rows)


@checked
def blend(
    *runs: AnyConfig,
    out: str | os.PathLike[str] | None = None,
    method: str | None = None,
    config: str | os.PathLike[str] | None = None,
    folds: Sequence[int] = (),
    common: bool = False,
) -> BlendReport:
    """Fit weights to held-out scores and judge them on other folds, as `pairclf blend` does.

    Args:
        runs: run folders, configs of runs, or files of scores.
        out: the ensemble's file to write, for `pairclf.load`; None: none is written.
        method: the blend to write, by its name in the table; None: the lowest log loss.
        config: as for `compare`.
        folds: as for `compare`.
        common: as for `compare`.

    Raises:
        ConfigError, DataError, LeakError: as the command.
    """
    from pairclf.inference.ensemble import SUFFIXES

    file = _path(out)
    if file is not None:
        check_file_target(file, *SUFFIXES)
    rows = open_runs([_run(run) for run in runs], _path(config), folds=folds, common=common)
    report = blend_runs(rows, method=method)
    if file is not None:
        note_written(file, write_ensemble(file, report, rows.runs))
    return report


@checked
def sweep(
    config: AnyConfig, *entries: str, folds: Sequence[int] = (), hours: float | None = None, processes: int = 1
) -> SweepResult:
    """Train a run for each combination of values, as `pairclf sweep` does, each in processes of its own.

    Args:
        config: the settings, or the path of a sweep's file. A mapping has to name `output_dir`, where its settings are
            written as `sweep.yaml`.
        entries: `key=value,value`: settings to vary; `key+key=value+value,value+value` in step.
        folds: to train; empty: as the file says, or fold 0.
        hours: start no run that would end later; None: no limit.
        processes: of each training.

    Raises:
        ConfigError, DataError: as the command.
    """
    source = _source(config)
    if not isinstance(source, Path):
        settings = read_config(source)
        source = output_of(settings) / SWEEP_CONFIG
        source.parent.mkdir(parents=True, exist_ok=True)
        write_text(source, dump_config(settings))
    planned = plan_sweep(source, entries, folds)
    return effects_of(planned, train_arms(planned, hours=hours, processes=processes))


def _settings(config: AnyConfig, overrides: Sequence[str], trust_remote_code: bool) -> Config:
    grant(Trust(remote_code=trust_remote_code))
    return read_config(_source(config), overrides)


def _source(config: AnyConfig) -> Path | Mapping[str, Any] | Config:
    return config if isinstance(config, Mapping | Config) else Path(config)


def _file(config: AnyConfig) -> Path | None:
    source = _source(config)
    return source if isinstance(source, Path) else None


def _path(path: str | os.PathLike[str] | None) -> Path | None:
    return None if path is None else Path(path)


def _run(run: AnyConfig) -> Path:
    """A run's folder or config file, or a file of scores."""
    source = _source(run)
    return source if isinstance(source, Path) else output_of(read_config(source))
