"""Train a fold: split, fit, score the held-out rows, write the bundle, and verify it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from pairclf.approaches import approach_of, verify_probes
from pairclf.approaches.protocol import Fitted, Process, Trainer
from pairclf.bundles.bundle import open_bundle, write_bundle
from pairclf.bundles.contents import MANIFEST
from pairclf.bundles.probes import PROBES, pick_probes
from pairclf.config import Config
from pairclf.console import console
from pairclf.data.identity import prompt_marks, row_hashes
from pairclf.data.rows import targets_of, to_rows
from pairclf.data.scores import scores_frame, write_logits, write_scores
from pairclf.errors import BundleError, ConfigError, cut
from pairclf.files import MAX_JSON, atomic_folder, locked, parsed, read_plain, write_json
from pairclf.run import OOF, OOF_AB, OOF_LOGITS, Paths, Run, Split, output_of
from pairclf.scores.metrics import ONE_ORDER, Floats, check_metric, class_prior, measure, metrics_of, title, titled
from pairclf.scores.probabilities import mean_of_orders

COUNTS = ("rows", "weight")
"""Names in a bundle's metrics: the number of held-out rows, and the sum of their weights, which weighs the fold."""
TRAINED = "trained.json"


class Session(NamedTuple):
    """A run in training: its rows are read, checked for leaks and tokenised once for all folds."""

    run: Run
    process: Process
    trainer: Trainer


def fit(config: Config, fold: int | None, *, resume: bool | None = None, trust_checkpoint: bool = False) -> Path:
    """Train one fold: `fit_fold` in a new session."""
    return fit_fold(open_session(Run(config), [fold]), fold, resume=resume, trust_checkpoint=trust_checkpoint)


def open_session(run: Run, folds: Sequence[int | None]) -> Session:
    """Read and tokenise the rows of these folds; the fold None trains on all rows.

    Raises:
        ConfigError: settings can't go together, or a fold does not exist.
        LeakError: as `Run.prove`.
    """
    config, approach = run.config, approach_of(run.config)
    if None in folds and config.train.eval_steps is not None:
        remedy = "give --fold, or train.eval_steps=null train.keep_weights=last train.early_stopping_patience=null"
        raise ConfigError("train.eval_steps looks at held-out rows, and none are", remedy=remedy)
    metrics_of(config.task)
    check_metric("train.metric_for_best_model", config.train.metric_for_best_model, config.task)
    approach.check(config)
    process = approach.start(config)
    with process.main_first():  # the main process writes the folds and tokens that the others read
        run.prove([fold for fold in folds if fold is not None])
        trainer = approach.trainer(run, process)
    return Session(run, process, trainer)


def fit_fold(session: Session, fold: int | None, *, resume: bool | None = None, trust_checkpoint: bool = False) -> Path:
    """Train on all folds but `fold` (on all rows, if it is None) and write the bundle, verified by re-scoring.

    Writes `config.yaml` beside the bundle and, for a fold, its scores: `oof.parquet` (mean of both orders),
    `oof-ab.parquet` (order of the file) and `oof-logits.parquet`. `trained.json` identifies settings and rows; a bundle
    with the same identity is kept.

    Args:
        session: the session of the run.
        fold: the fold to hold out, or None.
        resume: as in `Trainer.fit`; False also replaces a finished bundle.
        trust_checkpoint: as in `Trainer.fit`.

    Returns:
        The bundle's folder.
    """
    run, trainer, main = session.run, session.trainer, session.process.is_main
    paths, split = Paths(output_of(run.config), fold), run.split(fold)
    with locked(paths.folder / ".lock") if main else nullcontext():
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
            _save(trainer, paths, fitted, split)
            write_json(paths.folder / TRAINED, identity)
            trainer.finish(paths.folder)
    return paths.bundle


def _is_done(paths: Paths, identity: dict[str, Any]) -> bool:
    """Whether the bundle and the held-out scores exist, are intact, and belong to these settings and rows."""
    scores = [] if paths.fold is None else [paths.folder / OOF, paths.folder / OOF_AB]
    if trained_as(paths) != identity or not all(path.is_file() for path in scores):
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
    other = [name for name in (before | identity) if before.get(name) != identity.get(name)]
    if before and other:
        console.print(
            f"{paths.bundle} is of another training (different: {cut(', '.join(other))}); the new bundle replaces it "
            "when it is saved"
        )


def trained_as(paths: Paths) -> dict[str, Any]:
    """The identity (`Trainer.identity`) of the finished training; empty without one, or if the file is damaged."""
    try:
        read: Any = parsed(read_plain(paths.folder / TRAINED, MAX_JSON))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _save(trainer: Trainer, paths: Paths, fitted: Fitted, split: Split) -> None:
    """Score the held-out rows, write the bundle, and score the probes of the written bundle."""
    config, (training, held_out) = trainer.config, split
    to_score = held_out if held_out is not None else training.head(PROBES)
    logits = fitted.logits(to_score)
    metrics = {} if held_out is None else _write_held_out(config, paths, held_out, logits)
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
            trained_on=prompt_marks(training, config.task),
        )
        # Detect a head or adapter that was lost on saving now, not on Kaggle.
        difference = verify_probes(open_bundle(new))
    figures = ", ".join(f"{name} {value:.4f}" for name, value in titled(metrics, config.task).items())
    own = config.task.metric
    if config.task.swappable and own + ONE_ORDER in metrics:
        figures += f"; in one order {title(own, config.task)} {metrics[own + ONE_ORDER]:.4f}"
    console.print(f"saved and re-scored {paths.bundle} (logits differ by {difference:.1g}) {figures}")


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
        write_scores(
            paths.folder / name, scores_frame(ids.to_list(), values, task, orders, models, seen=0, hashes=hashes)
        )
        figures[name] = measure(values, targets, task, weights)
    one_order = {f"{name}{ONE_ORDER}": value for name, value in figures[OOF_AB].items()}
    counts = dict(zip(COUNTS, (float(len(ids)), float(weights.sum())), strict=True))
    return {**counts, **figures[OOF], **one_order}
