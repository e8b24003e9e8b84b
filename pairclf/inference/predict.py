"""Predict: bundles and a test file in, a submission out. A submission of priors is written first, then improved.

prior -> submission.csv                                  in the first seconds
rows -> token caches -> sequence indices                 texts and ids stay on disk
event loop, workers -> journal -> submission.csv         every half minute
scores and a summary                                     at the end
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from rich.table import Table

from pairclf import __version__
from pairclf.approaches import approach_of
from pairclf.approaches.protocol import Prepared
from pairclf.config import Config
from pairclf.console import Advance, console, counted, progress, table
from pairclf.data.audit import Finding, joined, note_changes
from pairclf.data.formats import check_is_file
from pairclf.data.identity import prompt_marks, row_hashes, seen_by
from pairclf.data.scores import scores_frame, write_scores
from pairclf.data.submission import check_ids, describe_form, ids_by_position
from pairclf.errors import ConfigError, IncompleteError, StopError
from pairclf.files import check_file_target, refuse_special_files
from pairclf.inference.deadline import format_duration, seconds_until
from pairclf.inference.ensemble import Ensemble, EnsembleMember, open_ensemble
from pairclf.inference.journal import Journal
from pairclf.inference.loop import PredictionLoop, PredictionResult, ProgressReporter, SubmissionOutput
from pairclf.inference.messages import Clock
from pairclf.inference.planner import PlannedModel
from pairclf.inference.pool import ProcessPool
from pairclf.inference.prepare import (
    PreparationTime,
    costs_of,
    devices_of,
    placement_of,
    planned_model_of,
    prepare,
    verify_in_time,
    warm_up_workers,
    worker_model_of,
)
from pairclf.inference.state import ORDERS_HINT, PredictionState, orders_of, pass_name
from pairclf.inference.submission import PREVIOUS_SUBMISSION, SubmissionWriter
from pairclf.inputs.cache import RowDigest, RowSource
from pairclf.inputs.plan import token_budget
from pairclf.inputs.sequences import Ints, LargestPass
from pairclf.run import unlabelled
from pairclf.signals import signals

TICK = 1.0
"""Seconds within which a signal is noticed."""

RESERVED_SHARE = 0.2
"""Largest share of the time until the deadline that is reserved for writing the results (`RESERVED_SECONDS`)."""

RESERVED_SECONDS = 5.0

JOURNAL, TOKEN_FOLDER = "journal.sqlite", "tokens"
PRIVATE_SUBMISSION = "submission.csv"
"""In the work folder: the submission of a run that is to write scores alone; it goes when they are complete."""


def predict(
    paths: Sequence[Path],
    data: Path,
    out: Path | None,
    *,
    sample: Path | None = None,
    scores: Path | None = None,
    base: Path | None = None,
    overrides: Sequence[str] = (),
    deadline: str | None = None,
    strict: bool = False,
    resume: bool = True,
    spent: float = 0.0,
    clock: Clock = time.monotonic,
) -> pl.DataFrame:
    """Score `data` with every member, average, and write the submission.

    While it runs, the folder `STEM.work` beside `out` holds the token cache and the journal, from which a killed run
    resumes. It is removed when the run is complete.

    Args:
        paths: bundles, or the YAML file of an ensemble.
        data: unlabelled file.
        out: the submission to write; None: `scores` are written alone, and lie beside the folder `STEM.work`.
        sample: sample submission that gives the ids, order and columns of `out`.
        scores: parquet file for the scores, with the models and orders behind each row.
        base: folder of the base model on this machine.
        overrides: `key=value` for settings under `predict`, `model.dtype` and `model.attn_implementation`.
        deadline: when the submission must be complete, as `deadline.seconds_until` reads it; None: no deadline.
        strict: raise at the end if a row has no score, or a row or model failed.
        resume: resume an interrupted run of the same rows and models.
        spent: seconds already used of a deadline that is a duration.
        clock: seconds; must be picklable, as workers use it too.

    Returns:
        The scores.

    Raises:
        BundleError, DataError, ConfigError, ModelError: before scoring; also if there is nothing to write.
        IncompleteError: with `strict`, after everything is written.
        StopError: a signal arrived; the scores so far are written.
    """
    written = out or scores
    if written is None:
        raise ConfigError(
            "neither a submission nor scores are to be written", remedy="give --out FILE or --scores FILE"
        )
    work = written.with_name(f"{written.stem}.work")
    end = float("inf") if deadline is None else clock() + seconds_until(deadline, datetime.now(UTC), spent)
    check_paths(out, scores, data, sample, work)
    out = out or work / PRIVATE_SUBMISSION
    ensemble = open_ensemble(paths, base, overrides)
    names = ensemble.submission
    submission = SubmissionWriter(out, ensemble.task, sample, None, settings=names, clock=clock)
    with signals() as caught, submission.reporting_older(work):
        console.print(f"{out}: {describe_form(ensemble.task, sample, names)}")
        if sample is not None and not out.exists():
            submission.write_prior(ensemble.prior)
        rows = _read(ensemble.members[0].bundle.config, data, marked=scores is not None)
        if sample is not None and ensemble.data.test.columns.get("id", "id") is None:
            rows = replace(rows, ids=ids_by_position(len(rows.ids), ensemble.task, sample, names))
            console.print("note: the test file has no ids: its rows are those of the sample submission, in its order")
        check_ids(rows.ids, ensemble.task, sample, names)
        submission.ids = rows.ids
        with closing(Journal.open(work / JOURNAL, identity_of_run(ensemble, rows.digest))) as journal:
            if not resume:
                journal.clear()
            submission.journal = journal
            submission.begin(ensemble.prior)  # an existing file may be better than priors
            warm_up_workers(ensemble)
            time_left = PreparationTime(caught, clock, end - reserve(end - clock(), submission.seconds))
            console.print(f"comparing the hashes of {counted(len(ensemble.members), 'bundle')}")
            left_out = verify_in_time(ensemble.members, time_left)
            # Before scoring: no time is reserved for it at the end.
            trained_on = None if left_out or time_left.limit(1.0)() else _trained_on_rows(ensemble, rows.marks)
            file = UnscoredFile(data, rows.digest, len(rows.ids))
            result = score_file(ensemble, file, overrides, journal, submission, time_left, left_out)
            table = _scores(ensemble, rows, result.state, trained_on)
            if (table["orders"] > 0).any() or not submission.is_from_earlier_run:
                submission.close(result.state.probabilities())
        if scores is not None:
            write_scores(scores, table)
        clean_up(work, journal, done=not (result.rows_left or result.lost_models or result.stop_signal))
    console.print(_summary_table(ensemble, table, result))
    _report_incomplete(result, table, submission, written, strict)
    return table


# --- before --------------------------------------------------------------------------------------------------------


def check_paths(out: Path | None, scores: Path | None, data: Path, sample: Path | None, work: Path) -> None:
    """Fail early, before hours of scoring."""
    if work in (out, scores) or work.is_symlink() or (work.exists() and not work.is_dir()):
        raise ConfigError(
            f"{work} is needed as a folder for the journal, and is no folder", remedy="give another --out"
        )
    if work.exists():
        refuse_special_files(work)  # a link there would be written through
    for read in (data, sample):
        if read is not None:
            check_is_file(read)
    written = [path for path in (out, scores) if path is not None]
    named = [path.resolve() for path in (*written, data, sample) if path is not None]
    if len(set(named)) != len(named):
        raise ConfigError("two of the files to read and to write are the same", remedy="give each its own path")
    for path in written:
        check_file_target(path, *([".parquet"] if path == scores else []))


@dataclass(frozen=True, slots=True)
class _Rows:
    """What is kept in memory of the rows; their tokens are on disk."""

    ids: list[str]
    hashes: pl.DataFrame
    marks: pl.DataFrame | None
    digest: str


def _read(config: Config, data: Path, *, marked: bool) -> _Rows:
    """Read the file once: ids, hashes, prompt marks if scores are to be written, and a report of repairs."""
    ids: list[str] = []
    hashes, marks, findings = list[pl.DataFrame](), list[pl.DataFrame](), list[Finding]()
    digest = RowDigest(config.task.fields)
    for frame in unlabelled(config, data, findings.extend, digest.update)():
        ids += frame["id"].to_list()
        hashes.append(row_hashes(frame, config.task))
        if marked:
            marks.append(prompt_marks(frame, config.task))
    note_changes(joined(findings))
    return _Rows(ids, pl.concat(hashes), pl.concat(marks) if marked else None, digest.hexdigest())


def identity_of_run(ensemble: Ensemble, digest: str) -> dict[str, object]:
    """Everything that determines the logits of a run; `digest`: of the rows."""
    bundles = [member.bundle for member in ensemble.members]
    devices = devices_of(ensemble)
    return {
        "pairclf": __version__,
        "device": sorted({device.split(":")[0] for device in devices}),
        "data": digest,
        "columns": ensemble.data.test.columns,
        "bundles": [bundle.manifest.seal for bundle in bundles],
        "bases": [str(member.base) for member in ensemble.members],
        "models": [approach_of(bundle.config).identity(bundle, devices) for bundle in bundles],
    }


def reserve(seconds_left: float, seconds_of_a_write: float) -> float:
    """Seconds before the deadline at which scoring ends."""
    return min(RESERVED_SHARE * max(seconds_left, 0.0), RESERVED_SECONDS + 4 * seconds_of_a_write)


# --- while ---------------------------------------------------------------------------------------------------------


class UnscoredFile(NamedTuple):
    """A file whose rows are to be scored.

    Attributes:
        path: of the file.
        digest: `RowDigest` of its rows.
        rows: their number.
        groups: `(N,)`, numbers that do not decrease: rows of a group are scored together, as far as the token budget
            goes, and what they have in common once; None: each row by itself.
    """

    path: Path
    digest: str
    rows: int
    groups: Ints | None = None


def score_file(
    ensemble: Ensemble,
    file: UnscoredFile,
    overrides: Sequence[str],
    journal: Journal,
    submission: SubmissionOutput,
    time_left: PreparationTime,
    left_out: Mapping[int, str],
) -> PredictionResult:
    """Prepare the file, and score it until all is scored, the time is up or a signal arrives."""
    members, settings = ensemble.members, ensemble.settings
    costs = costs_of(members)
    placement = placement_of(ensemble, max(cost.bytes for cost in costs))

    def source_of(member: EnsembleMember, recipe: str) -> RowSource:
        digest = hashlib.sha256(f"{file.digest} {recipe}".encode()).hexdigest()
        return RowSource(unlabelled(member.bundle.config, file.path), digest, file.rows, time_left.limit)

    budget = token_budget(settings.tokens_per_batch, gpu=placement.gpu)
    prepared = prepare(members, source_of, journal.path.with_name(TOKEN_FOLDER), left_out)
    if file.groups is not None:
        prepared = _in_units(prepared, file.groups, budget)
    models = [
        planned_model_of(member, rows_of.inputs, cost, placement)
        for member, rows_of, cost in zip(members, prepared, costs, strict=True)
    ]
    worker_models = [
        worker_model_of(member, rows_of.encoded, overrides, LargestPass.of(rows_of.inputs, budget))
        for member, rows_of in zip(members, prepared, strict=True)
    ]
    pool = ProcessPool(worker_models, placement.groups, clock=time_left.clock)
    with closing(pool), _Bars() as bars:
        loop = PredictionLoop(
            models,
            ensemble.task,
            ensemble,
            pool=pool,
            clock=time_left.clock,
            swap=settings.swap,
            budget=budget,
            stop=time_left.stop,
            journal=journal,
            submission=submission,
            reporter=ProgressReporter(console.print, bars),
            unusable=left_out,
        )
        if count := loop.resume():
            console.print(f"{count:,} sequences are taken from the journal (--no-resume scores them again)")
        seconds = time_left.stop - time_left.clock()
        left = "" if seconds == float("inf") else f"; {format_duration(max(0, seconds))} for scoring"
        console.print(f"{placement.why}{left}")
        console.print(_describe_sequences(models, settings.swap))
        return loop.run(stop_signal=lambda: time_left.signals.received or 0, tick=TICK)


def _in_units(prepared: Sequence[Prepared], groups: Ints, budget: int) -> list[Prepared]:
    """Rows of a group in common units; models that share an encoding share them."""
    in_units: dict[int, Prepared] = {}
    for rows in prepared:
        if id(rows) not in in_units:
            encoded = rows.encoded if rows.inputs.lengths.shape[1] == 1 else None
            in_units[id(rows)] = replace(rows, inputs=rows.inputs.in_units(groups, budget, encoded))
    return [in_units[id(rows)] for rows in prepared]


def _describe_sequences(models: Sequence[PlannedModel], swap: str) -> str:
    """The number of sequences that may be scored, and of duplicates among the first model's."""
    used = [orders_of(swap, place, model.inputs, model.swap_share) for place, model in enumerate(models)]
    sequences = models[0].inputs.duplicate_of[:, used[0]]
    equal = sequences.size - len(np.unique(sequences))
    orders = len({order for of_model in used for order in of_model})
    passes = f" in {orders} orders" if orders > 1 else ""
    texts = f"{counted(len(sequences), 'row')}{passes} for {counted(len(models), 'model')}"
    return texts + (f"; {equal:,} of {sequences.size:,} inputs are duplicates, and scored once" if equal else "")


class _Bars(ExitStack):
    """A progress bar for the current model: `bars(name, done, total)`."""

    def __init__(self) -> None:
        super().__init__()
        self._name = ""
        self._done = 0
        self._advance: Advance | None = None

    def __call__(self, name: str, done: int, total: int) -> None:
        if self._advance is None or name != self._name:
            self.close()
            self._name, self._done = name, done
            self._advance = self.enter_context(progress(name, total=total, done=done))
        self._advance(done - self._done)
        self._done = done


# --- after ---------------------------------------------------------------------------------------------------------


def _scores(ensemble: Ensemble, rows: _Rows, state: PredictionState, seen: Sequence[pl.Series] | None) -> pl.DataFrame:
    """The blend, with the models and orders behind each row; a row with the prior alone has none."""
    names = [member.name for member in ensemble.members]
    is_scored = np.stack([state.is_scored(member).any(axis=1) for member in range(len(names))])  # (M, N)
    names_behind = [
        [name for name, has_scored in zip(names, column, strict=True) if has_scored] for column in is_scored.T
    ]
    return scores_frame(
        rows.ids,
        state.probabilities(),
        ensemble.task,
        orders=state.num_orders().tolist(),
        models=pl.Series("models", names_behind, dtype=pl.List(pl.String)),
        seen=None if seen is None else _models_that_saw(seen, is_scored),
        hashes=rows.hashes,
    )


def _trained_on_rows(ensemble: Ensemble, marks: pl.DataFrame | None) -> list[pl.Series] | None:
    """For each bundle, whether it was trained on the row's prompt or a near duplicate; null: unknown."""
    bundles = [member.bundle for member in ensemble.members]
    if marks is None:
        return None
    return seen_by(
        marks,
        [bundle.trained_on() for bundle in bundles],
        [bundle.config.folds.near_duplicate_threshold for bundle in bundles],
    )


def _models_that_saw(seen: Sequence[pl.Series], behind: np.ndarray[tuple[int, int], np.dtype[np.bool_]]) -> pl.Series:
    """Number of models behind each row that were trained on its prompt; null if unknown for one of them."""
    none = pl.repeat(0, behind.shape[1], dtype=pl.UInt16, eager=True)
    total = none
    for was_seen, has_scored in zip(seen, behind, strict=True):
        total = total + was_seen.cast(pl.UInt16).zip_with(pl.Series(has_scored), none)
    return total


def _summary_table(ensemble: Ensemble, rows: pl.DataFrame, result: PredictionResult) -> Table:
    """Numbers of rows by the models and orders that scored them."""
    summary = table(
        f"Prediction of {counted(len(rows), 'row')} in {format_duration(result.seconds)}", "scored by", "rows"
    )
    scored = [result.state.is_scored(member) for member in range(len(ensemble.members))]
    names = [
        pass_name(member.name, order, by_order.shape[1])
        for member, by_order in zip(ensemble.members, scored, strict=True)
        for order in range(by_order.shape[1])
    ]
    ways, counts = np.unique(np.concatenate(scored, axis=1), axis=0, return_counts=True)
    for way in np.argsort(-counts, kind="stable").tolist():
        models = ", ".join(name for name, has_scored in zip(names, ways[way], strict=True) if has_scored)
        summary.add_row(models or "none: the prior alone", f"{counts[way]:,}")
    for name, count in result.rows_left.items():
        summary.add_row(f"(not scored for lack of time: {name})", f"{count:,}")
    if result.rescored:
        summary.add_row("(in float32, as float16 overflowed)", f"{result.rescored:,}")
    if ensemble.orders > 1:
        summary.caption, summary.caption_justify = ORDERS_HINT, "left"
    return summary


def clean_up(work: Path, journal: Journal, *, done: bool) -> None:
    """Remove the tokens, and the journal if the run is complete; other files in the folder stay."""
    shutil.rmtree(work / TOKEN_FOLDER, ignore_errors=True)
    if not done:
        return
    try:
        journal.remove()
        for name in (PREVIOUS_SUBMISSION, PRIVATE_SUBMISSION):
            (work / name).unlink(missing_ok=True)
        if work.is_dir() and not any(work.iterdir()):
            work.rmdir()
    except OSError as error:  # all is written: what can't be tidied up does not make the run fail
        console.print(f"note: {work} can't be removed: {error}")


def _report_incomplete(
    result: PredictionResult, table: pl.DataFrame, submission: SubmissionWriter, out: Path, strict: bool
) -> None:
    """Report failed rows and models; raise if the run was stopped or is incomplete under `strict`."""
    ids = table["id"].to_list()
    failed = {ids[row]: why for failures in result.state.failed for (row, _), why in failures.items()}
    for row, why in list(failed.items())[:5]:
        console.print(f"row {row} could not be scored: {why}")
    if len(failed) > 5:
        console.print(f"and {counted(len(failed) - 5, 'more row')}")
    content = "the scores so far"
    if submission.is_from_earlier_run and out == submission.out:
        content = "the submission of an earlier run, as this run has scored no row"
        console.print(f"{out} holds {content}")
    else:
        console.print(f"wrote {out}: {counted(len(table), 'row')}")
    prior_only = table.filter(pl.col("orders") == 0)["id"].to_list()
    if prior_only:
        console.print(f"WARNING: {len(prior_only):,} of {len(table):,} rows have only the prior")
    if result.stop_signal:
        raise StopError(
            f"stopped by a signal; {out} holds {content}",
            signal=result.stop_signal,
            remedy="run the same command again to resume",
        )
    lost = [f"{name} ({why})" for name, why in result.lost_models.items()]
    if strict and (failed or lost or prior_only):
        raise IncompleteError(
            "the prediction is incomplete" + (f": without {', '.join(lost)}" if lost else ""),
            where=out,
            rows=list(dict.fromkeys([*failed, *prior_only])),
            remedy="the submission has the other order, other models or the prior in their place",
        )
