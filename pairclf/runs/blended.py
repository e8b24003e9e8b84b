"""Held-out scores of ensembles' files: each row by weights and calibrations that were fitted to other folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pairclf.bundles.bundle import open_bundle
from pairclf.errors import ConfigError
from pairclf.inference.ensemble import EnsembleFile, MemberFile, read_ensemble
from pairclf.run import output_of
from pairclf.runs.blend import HEADER, judging_folds
from pairclf.runs.evaluate import out_of_fold
from pairclf.runs.held_out import CommonRows, ScoredRun, is_ensemble, open_runs, positions
from pairclf.runs.plan import plannable
from pairclf.scores.blend import BLENDS, cross_fit
from pairclf.scores.calibration import METHODS, Method, fit, method_of, of_rows
from pairclf.scores.metrics import Floats
from pairclf.scores.plans import PlannableRows, Seconds, Use, fit_plan, probabilities_of


def open_runs_and_ensembles(
    paths: Sequence[Path], labels: Path | None = None, *, folds: Sequence[int] = (), common: bool = False
) -> CommonRows:
    """As `open_runs`, for the files of `blend` and `evaluate --calibrated`, too: their runs need not be given.

    Raises:
        ConfigError, DataError, LeakError: as `open_runs`; or a file was written by hand.
    """
    files = {path: _read(path) for path in paths if is_ensemble(path)}
    if not files:
        return open_runs(paths, labels, folds=folds, common=common)
    plain = [path for path in paths if path not in files]
    needed = [run for file in files.values() for run in _by_run(file)]
    opened = {path.resolve(): path for path in (*needed, *plain)}  # the name of a run is that which was given
    rows = open_runs([*opened.values()], labels, folds=folds, common=common)
    runs = dict(zip(opened, rows.runs, strict=True))
    given = [_held_out(path, files[path], rows, runs) if path in files else runs[path.resolve()] for path in paths]
    return replace(rows, runs=given)


def seals_of(run: ScoredRun) -> tuple[list[str], bool]:
    """The seals of a run's bundles, and whether a submission of it has all of them; none for a file of scores."""
    whole = is_ensemble(run.path)
    bundles = [entry.bundle for entry in read_ensemble([run.path]).members] if whole else run.bundles
    return [open_bundle(bundle, verified=True).manifest.seal for bundle in bundles], whole


def _read(path: Path) -> EnsembleFile:
    file = read_ensemble([path])
    is_known = file.nested is None or file.nested.method in BLENDS
    if _calibrated_by(file) or (is_known and path.read_text(encoding="utf-8").startswith(HEADER)):
        return file
    raise ConfigError(
        f"{path} was not written by `pairclf blend` or `evaluate --calibrated`, so its weights can't be fitted to "
        "other folds",
        remedy="give the runs that it averages, or a file of held-out scores",
    )


def _calibrated_by(file: EnsembleFile) -> Method | None:
    """The method of calibration of a file with one run, as `evaluate --calibrated` writes it; None: it has none."""
    own = "" if file.nested is None or len(_by_run(file)) > 1 else file.nested.method
    return next((method for method in METHODS if method == own), None)


def _by_run(file: EnsembleFile) -> dict[Path, MemberFile]:
    """The first member of each run, by the run's folder: a bundle is `RUN/fold0/bundle`."""
    members: dict[Path, MemberFile] = {}
    for entry in file.members:
        members.setdefault(entry.bundle.parent.parent, entry)
    return members


def _held_out(path: Path, file: EnsembleFile, common: CommonRows, runs: dict[Path, ScoredRun]) -> ScoredRun:
    """The file's runs, by weights or a calibration of other folds; a plan's choice of runs and shares is the file's."""
    members = _by_run(file)
    own = replace(common, runs=[runs[folder.resolve()] for folder in members])
    folds = judging_folds(common)
    if (method := _calibrated_by(file)) is not None:
        scores = _calibrated(own, method, folds)
    elif file.nested is not None:
        scores = cross_fit(BLENDS[file.nested.method], _rows(own).rows, folds, lambda: None)
    else:  # written for a deadline
        plan = tuple(Use(place, entry.share, entry.swap_share) for place, entry in enumerate(members.values()))
        data, scores = _rows(own), np.empty_like(common.targets)
        method = method_of(file.calibration(common.task, "the blend"))
        for fold in np.unique(folds):
            rest = data.only(folds != fold)
            scores[folds == fold] = probabilities_of(plan, data.only(folds == fold), fit_plan(plan, rest, method))
    return ScoredRun(name=str(path), path=path, probabilities=scores, flips=None, config=None, trained={})


def _rows(common: CommonRows) -> PlannableRows:
    return plannable(common, [Seconds(0, 0, 0)] * len(common.runs))


def _calibrated(common: CommonRows, method: Method, folds: NDArray[np.int64]) -> Floats:
    """`(N, C)` of the one run, each fold's rows by a calibration that was fitted to the others."""
    (run,) = common.runs
    assert run.config is not None  # a file of scores has no bundle
    task = run.config.task
    read = out_of_fold(output_of(run.config), task, run.config.predict, [*run.trained])
    places = positions(common.ids, read.rows["id"])
    targets = common.targets[:, [common.task.classes.index(name) for name in task.classes]]
    scores = np.empty_like(targets)
    for fold in np.unique(folds):
        inside, rest = folds == fold, folds != fold
        fitted = fit(method, of_rows(read.at, places[rest]), targets[rest], task, common.weights[rest])
        scores[inside] = read.at(fitted, places[inside])
    return scores[:, [task.classes.index(name) for name in common.task.classes]]
