"""Bundles and a test file in, a submission out: at once from the priors, then better while there is work and time.

prior -> submission.csv                                  in the first seconds
rows -> token caches -> what each member has to score    without texts or ids in memory
conductor, workers -> journal -> submission.csv          every half minute
scores, what was done and what was not                   at the end
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import torch
import transformers
from rich.table import Table

from pairclf import __version__
from pairclf.config import Config
from pairclf.console import Advance, console, progress, table
from pairclf.data.audit import Finding, joined, note_changes
from pairclf.data.formats import check_is_file
from pairclf.data.identity import prompt_marks, row_hashes, seen_by
from pairclf.data.tables import check_ids, scores_frame, write_scores
from pairclf.errors import ConfigError, IncompleteError, StopError
from pairclf.files import check_file_target, refuse_special_files, sha256_file
from pairclf.inference.agenda import Part
from pairclf.inference.backlog import Inputs, look_at
from pairclf.inference.conduct import Conductor, Outcome, Report
from pairclf.inference.crew import Model, ProcessCrew, warm_up
from pairclf.inference.deadline import seconds_until, spoken
from pairclf.inference.devices import Placement, choose, model_bytes, named_devices
from pairclf.inference.journal import Journal
from pairclf.inference.members import Ensemble, Member, open_ensemble
from pairclf.inference.memory import Largest
from pairclf.inference.sink import PREVIOUS, Sink
from pairclf.inference.standing import ORDERS, Standing
from pairclf.inference.work import Clock
from pairclf.inputs.cache import EncodedRows, token_cache
from pairclf.inputs.plan import token_budget
from pairclf.inputs.render import Encoded, InputBuilder
from pairclf.jobs.estimate import Cost, cost_of
from pairclf.jobs.inputs import unlabelled
from pairclf.jobs.watch import signals
from pairclf.model.backbone import pick_dtype
from pairclf.model.bundle import Bundle, open_bundle

TICK = 1.0
"""Seconds after which a signal is heard at the latest."""

SPARED = 0.2
"""Of the time until the deadline, at most, is kept for what comes after scoring: it takes `RESERVE` seconds or less."""

RESERVE = 5.0

JOURNAL, TOKENS = "journal.sqlite", "tokens"


def predict(
    paths: Sequence[Path],
    data: Path,
    out: Path,
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

    Beside `out` stands a folder `STEM.work` while it runs: the journal, from which a run that was killed goes on, and
    the token cache. What is finished takes it away.

    Args:
        paths: bundles, or the YAML file of an ensemble.
        data: unlabelled file.
        out: the submission to write.
        sample: sample submission, whose ids, order and columns `out` will have.
        scores: where to write the scores as parquet too, with what stands behind each row.
        base: folder of the base model on this machine.
        overrides: `key=value` for settings under `predict`, `model.dtype` and `model.attention`.
        deadline: when all must be over, as `deadline.seconds_until` reads it; None: when it is done.
        strict: raise at the end, if a row or a model could not be scored, or time left a row without any score.
        resume: go on where a run of the same rows and models was killed.
        spent: seconds of a deadline that is a duration which are gone already.
        clock: of the run, seconds; the workers time their passes by it too, so it can be sent to them.

    Returns:
        The scores.

    Raises:
        BundleError, DataError, ConfigError, ModelError: before hours are spent.
        IncompleteError: with `strict`; everything is written.
        StopError: a signal came; what was known by then is written.
    """
    work = out.with_name(f"{out.stem}.work")
    end = float("inf") if deadline is None else clock() + seconds_until(deadline, datetime.now(UTC), spent)
    _check_paths(out, scores, data, sample, work)
    ensemble = open_ensemble(paths, base, overrides)
    with closing(_journal(work / JOURNAL, _identity(ensemble, data), resume=resume)) as journal:
        sink = Sink(out, ensemble.task, sample, None, clock=clock, journal=journal)
        with sink.telling_of_older(work):
            at_once = sample is not None and not out.exists()
            if at_once:
                sink.write_prior(ensemble.prior)
            rows = _read(ensemble.members[0].config, data, marked=scores is not None)
            check_ids(rows.ids, ensemble.task, sample)
            sink.ids = rows.ids
            if not at_once:  # a file that is there may be a good one: it is looked at when the ids are known
                sink.begin(ensemble.prior)
            bundles = _proven(ensemble.members)
            # Now, as no time is kept for it at the end.
            seen = None if rows.marks is None else _seen(bundles, rows.marks)
            outcome = _conduct(ensemble, data, work, overrides, journal, sink, end, clock)
            found = _scores(ensemble, rows, outcome.standing, seen)
            sink.close(outcome.standing.probabilities())
        if scores is not None:
            write_scores(scores, found)
        _tidy(work, journal, done=not (outcome.left or outcome.lost or outcome.stopped))
    console.print(_account(ensemble, found, outcome))
    _conclude(outcome, found, out, strict)
    return found


# --- before --------------------------------------------------------------------------------------------------------


def _check_paths(out: Path, scores: Path | None, data: Path, sample: Path | None, work: Path) -> None:
    """Found out now, and not after hours of scoring."""
    if out == work or work.is_symlink() or (work.exists() and not work.is_dir()):
        raise ConfigError(f"{work} must be free for the journal, and is no folder", remedy="give another --out")
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
        check_file_target(path)


def _journal(path: Path, identity: dict[str, object], *, resume: bool) -> Journal:
    """That of this run, locked against other processes; without `resume` an empty one."""
    journal = Journal.open(path, identity)
    if resume:
        return journal
    journal.remove()
    return Journal.open(path, identity)


@dataclass(frozen=True, slots=True)
class _Rows:
    """What is kept of the rows, besides their tokens on disk."""

    ids: list[str]
    hashes: pl.DataFrame
    marks: pl.DataFrame | None


def _read(config: Config, data: Path, *, marked: bool) -> _Rows:
    """Go through the file once: ids, hashes, marks of prompts if the scores are to be kept, and what is repaired."""
    ids: list[str] = []
    hashes, marks, findings = list[pl.DataFrame](), list[pl.DataFrame](), list[Finding]()
    for frame in unlabelled(config, data, findings.extend)():
        ids += frame["id"].to_list()
        hashes.append(row_hashes(frame, config.task))
        if marked:
            marks.append(prompt_marks(frame, config.task))
    note_changes(joined(findings))
    return _Rows(ids, pl.concat(hashes), pl.concat(marks) if marked else None)


def _proven(members: Sequence[Member]) -> list[Bundle]:
    """The bundles, every file of them hashed and found as it was."""
    console.print(f"comparing the hashes of {len(members)} bundle(s)")
    return [open_bundle(member.folder) for member in members]


def _identity(ensemble: Ensemble, data: Path) -> dict[str, object]:
    """What makes the logits of two runs the same."""
    settings = [member.config for member in ensemble.members]
    devices = [torch.device(one) for one in named_devices(settings[0].predict, torch.cuda.device_count())]
    return {
        "pairclf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": sorted({one.type for one in devices}),
        "data": sha256_file(data),
        "bundles": [member.manifest.seal for member in ensemble.members],
        "bases": [str(member.base) for member in ensemble.members],
        "dtype": [sorted({_dtype(one, device) for device in devices}) for one in settings],
        "attention": [one.model.attention for one in settings],
        "layout": [one.predict.layout for one in settings],
        "backend": [one.predict.backend for one in settings],
    }


def _dtype(config: Config, device: torch.device) -> str:
    """What the setting comes to there: `auto` is float16 on one machine and float32 on another."""
    return str(pick_dtype(config.model.dtype, device)[0]).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A member's sequences: on disk, and what is known of them without reading it."""

    encoded: EncodedRows
    inputs: Inputs


def prepare(members: Sequence[Member], data: Path, folder: Path) -> list[Prepared]:
    """Tokenise for each member; those that see the same tokens (folds of one run) have them once."""
    made: dict[str, Prepared] = {}
    prepared = []
    for member in members:
        config = member.config
        builder, key = recipe(member)
        if key not in made:
            frames = unlabelled(config, data)
            fields, processes = config.task.fields, config.inputs.processes
            encoded = EncodedRows(token_cache(folder, frames, builder.tokenizer, fields, processes=processes), builder)
            with progress("lengths", total=len(encoded)) as advance:
                made[key] = Prepared(encoded, look_at(_watched(encoded, advance)))
        prepared.append(made[key])
    return prepared


def recipe(member: Member) -> tuple[InputBuilder, str]:
    """What makes a member's inputs, and a key that members have in common whose inputs are the same."""
    config = member.config
    builder = Bundle(member.folder, member.manifest, config).builder()
    inputs = config.inputs.model_dump(mode="json", exclude={"processes"})
    rules = config.data.rules.model_dump(mode="json")
    return builder, json.dumps([builder.tokenizer.fingerprint, inputs, rules])


def _watched(encoded: EncodedRows, advance: Advance) -> Iterator[tuple[Encoded, ...]]:
    for shown in encoded:
        yield shown
        advance()


# --- while ---------------------------------------------------------------------------------------------------------


def _conduct(
    ensemble: Ensemble,
    data: Path,
    work: Path,
    overrides: Sequence[str],
    journal: Journal,
    sink: Sink,
    end: float,
    clock: Clock,
) -> Outcome:
    members, settings = ensemble.members, ensemble.members[0].config.predict
    sizes = [model_bytes(Bundle(one.folder, one.manifest, one.config), one.base) for one in members]
    placement = choose(settings, max(sizes))
    if not placement.gpu:
        warm_up()
    prepared = prepare(members, data, work / TOKENS)
    parts = [
        part_of(member, one.inputs, size, placement) for member, one, size in zip(members, prepared, sizes, strict=True)
    ]
    budget = token_budget(settings.tokens_per_batch, gpu=placement.gpu)
    models = [
        Model(member.folder, member.base, tuple(overrides), one.encoded, Largest.of(one.inputs, budget))
        for member, one in zip(members, prepared, strict=True)
    ]
    left = end - clock()
    reserve = min(SPARED * max(left, 0.0), RESERVE + 4 * sink.seconds)
    with closing(ProcessCrew(models, placement.groups, clock=clock)) as crew, signals() as caught, _Bars() as bars:
        conductor = Conductor(
            parts,
            ensemble.task,
            ensemble,
            crew=crew,
            clock=clock,
            journal=journal,
            sink=sink,
            report=Report(console.print, bars),
            swap=settings.swap,
            budget=budget,
            stop=end - reserve,
        )
        if known := conductor.resume():
            console.print(f"{known:,} sequences were scored before (--no-resume scores them anew)")
        console.print(placement.why + ("" if left == float("inf") else f"; {spoken(max(0, left))} to the deadline"))
        console.print(_counted(prepared))
        return conductor.run(asked=lambda: caught.received or 0, tick=TICK)


def _counted(prepared: Sequence[Prepared]) -> str:
    """How many sequences there are, and why they are fewer than rows times orders."""
    inputs = prepared[0].inputs
    rows, orders = inputs.lengths.shape
    equal = inputs.twin.size - int(inputs.first.sum())
    texts = f"{rows:,} rows in {orders} order(s) for {len(prepared)} model(s)"
    return texts + (f"; {equal:,} of {rows * orders:,} inputs are equal to others, and scored once" if equal else "")


def part_of(member: Member, inputs: Inputs, size: int, placement: Placement) -> Part:
    """A member as it is planned before anything of it was seen."""
    return Part(
        name=member.manifest.name,
        inputs=inputs,
        shape=shape_of(member),
        speed=SPEED["cuda" if placement.gpu else "cpu"],
        load=10.0 + size / READ,
        gain=member.gain_member,
        gain_swap=member.gain_swap,
        share=member.share,
    )


def shape_of(member: Member) -> Cost:
    """Operations of a sequence, from the config of the member's model."""
    config = member.config
    base = member.folder / "backbone" if config.model.lora is None else member.base
    model = config.model if base is None else config.model.model_copy(update={"base": str(base)})
    return cost_of(config.model_copy(update={"model": model}))


READ = 3e8
"""Bytes of a model that are loaded in a second, before one was: a network disk's."""

SPEED = {"cuda": 24e12, "cpu": 3e10}
"""FLOP/s of a worker before a pass was made: what a T4 sustains, and a CPU's core."""


class _Bars(ExitStack):
    """A progress bar for the member at work: `bars(name, done, total)`."""

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


def _scores(ensemble: Ensemble, rows: _Rows, standing: Standing, seen: Sequence[pl.Series] | None) -> pl.DataFrame:
    """The blend, with what stands behind each row: the prior alone has no order and no model."""
    names = [member.manifest.name for member in ensemble.members]
    known = np.stack([standing.known(member).any(axis=1) for member in range(len(names))])  # (M, N)
    behind = [[name for name, did in zip(names, column, strict=True) if did] for column in known.T]
    return scores_frame(
        rows.ids,
        standing.probabilities(),
        ensemble.task,
        orders=standing.orders().tolist(),
        models=pl.Series("models", behind, dtype=pl.List(pl.String)),
        seen=None if seen is None else _models_that_saw(seen, known),
        hashes=rows.hashes,
    )


def _seen(bundles: Sequence[Bundle], marks: pl.DataFrame) -> list[pl.Series]:
    """For each bundle, whether it was trained on (nearly) the row's prompt; null where it does not know."""
    return seen_by(marks, [one.trained_on() for one in bundles], [one.config.folds.near for one in bundles])


def _models_that_saw(seen: Sequence[pl.Series], behind: np.ndarray[tuple[int, int], np.dtype[np.bool_]]) -> pl.Series:
    """How many of the models behind each row were trained on its prompt; null where one does not know."""
    none = pl.repeat(0, behind.shape[1], dtype=pl.UInt16, eager=True)
    total = none
    for own, mine in zip(seen, behind, strict=True):
        total = total + own.cast(pl.UInt16).zip_with(pl.Series(mine), none)
    return total


def _account(ensemble: Ensemble, found: pl.DataFrame, outcome: Outcome) -> Table:
    """How many rows were scored how."""
    made = table(f"Prediction of {len(found):,} rows in {spoken(outcome.seconds)}", "scored by", "rows")
    known = [outcome.standing.known(member) for member in range(len(ensemble.members))]
    names = [
        f"{member.manifest.name} {ORDERS[order]}"
        for member, one in zip(ensemble.members, known, strict=True)
        for order in range(one.shape[1])
    ]
    ways, counts = np.unique(np.concatenate(known, axis=1), axis=0, return_counts=True)
    for place in np.argsort(-counts, kind="stable").tolist():
        who = ", ".join(name for name, did in zip(names, ways[place], strict=True) if did)
        made.add_row(who or "nobody: the prior alone", f"{counts[place]:,}")
    for what, rows in outcome.left.items():
        made.add_row(f"(not done: {what})", f"{rows:,}")
    if outcome.rescued:
        made.add_row("(in float32, as float16 overflowed)", f"{outcome.rescued:,}")
    made.caption, made.caption_justify = "AB: the order of the file; BA: sides exchanged", "left"
    return made


def _tidy(work: Path, journal: Journal, *, done: bool) -> None:
    """Take the tokens away, and the journal where nothing is left to go on with; what others put there stays."""
    shutil.rmtree(work / TOKENS, ignore_errors=True)
    if done:
        journal.remove()
        (work / PREVIOUS).unlink(missing_ok=True)
        if work.is_dir() and not any(work.iterdir()):
            work.rmdir()


def _conclude(outcome: Outcome, found: pl.DataFrame, out: Path, strict: bool) -> None:
    """Name what could not be scored, and raise where asked."""
    ids = found["id"].to_list()
    failed = {ids[row]: why for one in outcome.standing.failed for (row, _), why in one.items()}
    for row, why in list(failed.items())[:5]:
        console.print(f"row {row} could not be scored: {why}")
    if len(failed) > 5:
        console.print(f"and {len(failed) - 5:,} rows more")
    console.print(f"wrote {out}: {len(found):,} rows")
    alone = found.filter(pl.col("orders") == 0)["id"].to_list()
    if alone:
        console.print(f"WARNING: {len(alone):,} of {len(found):,} rows have nothing but the prior")
    if outcome.stopped:
        raise StopError(
            f"stopped by a signal; {out} holds what was known",
            signal=outcome.stopped,
            remedy="the same command goes on where it was",
        )
    lost = [f"{name} ({why})" for name, why in outcome.lost.items()]
    if strict and (failed or lost or alone):
        raise IncompleteError(
            "not all could be scored" + (f": without {', '.join(lost)}" if lost else ""),
            where=out,
            rows=list(dict.fromkeys([*failed, *alone])),
            remedy="the submission has the other order, other models or the prior in their place",
        )
