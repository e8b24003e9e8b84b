"""Train a fold: split, fit, score the held-out rows, write the bundle, and verify it."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from pairclf import __version__
from pairclf.approaches import approach_of, verify_probes
from pairclf.approaches.protocol import (
    CALIBRATION_GAIN,
    KEPT_STEP,
    LABEL_MASS,
    SECONDS_BEFORE,
    Fitted,
    Process,
    Trainer,
)
from pairclf.bundles.bundle import open_bundle, write_bundle
from pairclf.bundles.contents import MANIFEST
from pairclf.bundles.probes import PROBES, pick_probes
from pairclf.config import Config, deciding_settings, setting_changes
from pairclf.console import console, copied_to
from pairclf.data.folds import folds_of_groups, prompt_groups
from pairclf.data.identity import prompt_marks, row_hashes
from pairclf.data.rows import targets_of, to_rows
from pairclf.data.scores import scores_frame, with_labels, write_logits, write_scores
from pairclf.errors import BundleError, ConfigError, PairclfError, cut
from pairclf.files import atomic_folder, locked, open_to_append, write_json
from pairclf.run import (
    LOG,
    OOF,
    OOF_AB,
    OOF_LOGITS,
    SCORED_ROWS,
    SCORED_SECONDS,
    TRAINED,
    TRAINING,
    Paths,
    Run,
    Split,
    check_rows,
    output_of,
    trained_as,
    variant_name,
)
from pairclf.runs.processes import is_first
from pairclf.scores.calibration import FLATTERING, NESTED, NESTED_FOLDS, Rows, fit_nested
from pairclf.scores.figures import ONE_ORDER, check_metric, judge, measure, metrics_of, title, titled
from pairclf.scores.metrics import Floats, class_prior
from pairclf.scores.probabilities import Calibration, mean_of_orders
from pairclf.scores.thresholds import fit_thresholds

COUNTS = ("rows", "weight")
"""Names in a bundle's metrics: the number of held-out rows, and the sum of their weights, which weighs the fold."""

FITTED = (KEPT_STEP, LABEL_MASS, CALIBRATION_GAIN)
"""Names of `Fitted.record` that a bundle's metrics have too."""


class Session(NamedTuple):
    """Some folds of a run in training: the rows are read, checked for leaks and tokenised once for all of them."""

    run: Run
    folds: Sequence[int | None]
    process: Process
    trainer: Trainer
    config_file: Path | None


def fit(
    config: Config,
    fold: int | None,
    *,
    resume: bool | None = None,
    trust_checkpoint: bool = False,
    config_file: Path | None = None,
) -> Path:
    """Train one fold: `fit_fold` in a new session. `config_file` is noted for `pairclf runs`."""
    with run_log(output_of(config)):
        session = open_session(Run(config), [fold], resume=resume, config_file=config_file)
        return fit_fold(session, fold, resume=resume, trust_checkpoint=trust_checkpoint)


@contextmanager
def run_log(output: Path) -> Iterator[None]:
    """Append what this command prints while it trains, and its error, to `log.txt` in the run folder."""
    if not is_first():
        yield
        return
    output.mkdir(parents=True, exist_ok=True)
    with TextIOWrapper(open_to_append(output / LOG), encoding="utf-8", line_buffering=True) as log, copied_to(log):
        log.write(f"\n{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, pairclf {__version__}: {shlex.join(sys.argv[1:])}\n")
        try:
            yield
        except PairclfError as error:
            log.write(f"error: {error}\n")
            raise


def open_session(
    run: Run, folds: Sequence[int | None], *, resume: bool | None = None, config_file: Path | None = None
) -> Session:
    """Read and tokenise the rows of these folds; the fold None trains on all rows.

    Raises:
        ConfigError: settings can't go together; or as `check_rows` and `_refuse_other_settings`.
        LeakError: as `Run.prove`.
    """
    config, numbers = run.config, [fold for fold in folds if fold is not None]
    check_rows(config, numbers)
    if None in folds and config.train.eval_steps is not None:
        remedy = "give --fold, or train.eval_steps=null train.keep_weights=last train.early_stopping_patience=null"
        raise ConfigError("train.eval_steps looks at held-out rows, and none are", remedy=remedy)
    metrics_of(config.task)
    check_metric("train.metric_for_best_model", config.train.metric_for_best_model, config.task)
    approach = approach_of(config)
    approach.check(config)
    process = approach.start(config)
    with process.main_first():  # the main process writes the folds and tokens that the others read
        run.prove(numbers)
        trainer = approach.trainer(run, process)
    _refuse_other_settings(trainer.config, folds, replace=resume is False)
    return Session(run, folds, process, trainer, config_file)


def _refuse_other_settings(config: Config, chosen: Sequence[int | None], *, replace: bool) -> None:
    """Refuse to replace, or to mix with others, folds that were trained with other settings.

    Args:
        config: with the chat template written out, as in a bundle.
        chosen: folds to train; None: one model on all rows, which stands beside the folds.
        replace: whether the chosen ones may be replaced.

    Raises:
        ConfigError: it names the folds, the settings that differ and a run folder for these settings.
    """
    output, settings = output_of(config), deciding_settings(config)
    folds = [None] if None in chosen else list(range(config.folds.n_splits))
    trained = {fold: trained_as(Paths(output, fold)) for fold in folds if not (replace and fold in chosen)}
    changes = {fold: setting_changes(settings, before) for fold, before in trained.items() if before}
    if others := [fold for fold, changed in changes.items() if changed]:
        lost = [Paths(output, fold).folder.name for fold in others if fold in chosen]
        kept = [Paths(output, fold).folder.name for fold in others if fold not in chosen]
        fates = [f"{', '.join(lost)} would be replaced"] * bool(lost)
        fates += [f"the scores of {', '.join(kept)} could not be joined with the new ones"] * bool(kept)
        differing = changes[others[0]]
        raise ConfigError(
            f"this run was trained with other settings: {', '.join(differing.values())}; {' and '.join(fates)}",
            where=output,
            remedy=f"keep both: output_dir={output / variant_name(settings, differing)}; or replace the old folds: "
            "--no-resume, without folds.run",
        )


def fit_fold(session: Session, fold: int | None, *, resume: bool | None = None, trust_checkpoint: bool = False) -> Path:
    """Train on all folds but `fold` (on all rows, if it is None) and write the bundle, verified by re-scoring.

    Writes `config.yaml` beside the bundle and, for a fold, its scores: `oof.parquet` (mean of both orders),
    `oof-ab.parquet` (order of the file) and `oof-logits.parquet`. `trained.json` identifies settings and rows (a bundle
    with the same identity is kept), and has the record of the training.

    Args:
        session: the session of the run.
        fold: the fold to hold out, or None.
        resume: as in `Trainer.fit`; False also replaces a finished bundle.
        trust_checkpoint: as in `Trainer.fit`.

    Returns:
        The bundle's folder.

    Raises:
        ConfigError: as `_refuse_other_settings`.
    """
    run, trainer, main = session.run, session.trainer, session.process.is_main
    paths, split = Paths(output_of(run.config), fold), run.split(fold)
    with locked(paths.folder / ".lock") if main else nullcontext():
        if main:  # another command may have trained folds since this one began
            _refuse_other_settings(trainer.config, session.folds, replace=resume is False)
        identity = trainer.identity(split)
        if resume is not False and _is_done(paths, identity):
            if main:
                console.print(f"{paths.bundle} exists for these settings and rows (--no-resume trains it again)")
            return paths.bundle
        if main:
            _note_other(paths, identity)
            (paths.folder / TRAINED).unlink(missing_ok=True)
        fitted = trainer.fit(split, paths.folder, resume=resume, trust_checkpoint=trust_checkpoint)
        if fitted is not None:
            record = _save(trainer, paths, fitted, split) | _record(fitted, session.config_file)
            write_json(paths.folder / TRAINED, identity | {TRAINING: record})
            trainer.finish(paths.folder)
    return paths.bundle


def _record(fitted: Fitted, config_file: Path | None) -> dict[str, Any]:
    """What `pairclf runs` lists of a training that has just finished."""
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    return {**fitted.record, "finished": finished, "config_file": None if config_file is None else str(config_file)}


def _is_done(paths: Paths, identity: dict[str, Any]) -> bool:
    """Whether the bundle and the held-out scores exist, are intact, and belong to these settings and rows."""
    scores = [] if paths.fold is None else [paths.folder / OOF, paths.folder / OOF_AB]
    before = trained_as(paths)
    if not before or setting_changes(identity, before) or not all(path.is_file() for path in scores):
        return False
    try:
        open_bundle(paths.bundle)
    except BundleError as error:
        console.print(f"training again: {error}")
        return False
    return True


def _note_other(paths: Paths, identity: dict[str, Any]) -> None:
    """Print how a finished training differs from this one, which will replace its bundle."""
    before = trained_as(paths)
    if before and (other := setting_changes(identity, before)):
        console.print(
            f"{paths.bundle} is of another training (different: {cut(', '.join(other))}); the new bundle replaces it "
            "when it is saved"
        )


def _save(trainer: Trainer, paths: Paths, fitted: Fitted, split: Split) -> dict[str, float]:
    """Score the held-out rows, write the bundle, and score the probes of the written bundle; returns `SCORED_ROWS` and
    `SCORED_SECONDS`, if rows are held out."""
    config, (training, held_out) = trainer.config, split
    to_score = held_out if held_out is not None else training.head(PROBES)
    start = time.perf_counter()
    logits = fitted.logits(to_score)
    seconds = time.perf_counter() - start + len(to_score) * fitted.record.get(SECONDS_BEFORE, 0.0)
    metrics = {} if held_out is None else _write_held_out(config, paths, held_out, logits)
    metrics |= {name: value for name, value in fitted.record.items() if name in FITTED}
    thresholds = [] if held_out is None or not config.task.multi_label else _thresholds(config, held_out, logits)
    with atomic_folder(paths.bundle, known_by=MANIFEST) as new:
        write_bundle(
            new,
            config,
            fitted.save(new),
            name="-".join([*paths.output.parts[-1:], paths.folder.name]),
            fold=paths.fold,
            metrics=metrics,
            prior=class_prior(targets_of(training), training["weight"]).tolist(),
            probes=pick_probes(to_rows(to_score, config.task), logits),
            thresholds=thresholds,
            trained_on=prompt_marks(training, config.task),
        )
        # Detect a head or adapter that was lost on saving now, not on Kaggle.
        difference = verify_probes(open_bundle(new))
    figures = ", ".join(f"{name} {value:.4f}" for name, value in titled(metrics, config.task).items())
    own = config.task.metric
    if config.orders > 1 and own + ONE_ORDER in metrics:
        figures += f"; in one order {title(own, config.task)} {metrics[own + ONE_ORDER]:.4f}"
    console.print(f"saved and re-scored {paths.bundle} (logits differ by {difference:.1g}): {figures}")
    return {} if held_out is None else {SCORED_ROWS: len(held_out), SCORED_SECONDS: seconds}


def _thresholds(config: Config, held_out: pl.DataFrame, logits: Floats) -> list[float]:
    """Thresholds `(L,)` of the labels, fitted to the held-out rows."""
    probabilities = mean_of_orders(logits, config.task, config.predict.temperature)
    fitted = fit_thresholds(probabilities, targets_of(held_out), "macro", held_out["weight"].to_numpy())
    return [float(threshold) for threshold in fitted]


def _write_held_out(config: Config, paths: Paths, held_out: pl.DataFrame, logits: Floats) -> dict[str, float]:
    """Write the scores of the held-out rows from their logits `(N, O, C)`, and measure them."""
    task, temperature = config.task, config.predict.temperature
    ids, models, hashes = held_out["id"], [f"fold{paths.fold}"], row_hashes(held_out, config.task)
    targets, weights = targets_of(held_out), held_out["weight"]
    write_logits(paths.folder / OOF_LOGITS, ids, logits, hashes)
    figures = {}
    for name, orders in ((OOF, logits.shape[1]), (OOF_AB, 1)):
        values = mean_of_orders(logits[:, :orders], task, temperature)
        # `Run.split` has asserted that no held-out prompt was trained on: seen=0.
        scores = scores_frame(ids.to_list(), values, task, orders, models, seen=0, hashes=hashes)
        if name == OOF and paths.fold is not None:
            scores = with_labels(scores, task, fold=paths.fold, targets=targets, logits=logits)
        write_scores(paths.folder / name, scores)
        figures[name] = measure(values, targets, task, weights)
    one_order = {f"{name}{ONE_ORDER}": value for name, value in figures[OOF_AB].items()}
    calibrated = _calibrated(config, logits, held_out)
    counts = dict(zip(COUNTS, (float(len(ids)), float(weights.sum())), strict=True))
    return {**counts, **figures[OOF], **one_order, **calibrated}


def _calibrated(config: Config, logits: Floats, held_out: pl.DataFrame) -> dict[str, float]:
    """What a temperature is worth on held-out rows, nested in folds of their prompts; nothing if they have one fold."""
    task, weights = config.task, held_out["weight"].to_numpy().astype(np.float64)

    def at(calibration: Calibration | float, rows: Rows | None = None, /) -> Floats:
        return mean_of_orders(logits if rows is None else logits[rows], task, calibration)

    folds = folds_of_groups(prompt_groups(held_out, task), NESTED_FOLDS)
    if len(np.unique(folds)) < 2:
        return {}
    judged = judge(at(config.predict.temperature), targets_of(held_out), task, weights)
    fitted = fit_nested("temperature", at, judged, folds)
    return {NESTED: float(np.average(fitted.losses, weights=weights)), FLATTERING: fitted.flattering}
