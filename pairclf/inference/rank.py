"""Rank: score any number of answers to each prompt, and rank them.

reward bundles       each answer alone, behind the prompt                              -> reward -> rank
all other bundles    answers in pairs, in both orders -> P(victory), P(defeat), P(tie) -> strength -> rank
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from pairclf.config.data import Unlabelled
from pairclf.console import console, counted, progress
from pairclf.data.answers import (
    WRITERS,
    pairwise_rows,
    pointwise_rows,
    ranking,
    read_answers,
    write_ranking,
    write_rows,
)
from pairclf.errors import ConfigError, IncompleteError, StopError
from pairclf.inference.deadline import format_duration, seconds_until
from pairclf.inference.ensemble import Ensemble, open_ensemble
from pairclf.inference.journal import Journal
from pairclf.inference.loop import NO_SUBMISSION, PredictionResult
from pairclf.inference.messages import Clock
from pairclf.inference.predict import (
    JOURNAL,
    TOKEN_FOLDER,
    UnscoredFile,
    check_paths,
    clean_up,
    identity_of_run,
    reserve,
    score_file,
)
from pairclf.inference.prepare import PreparationTime, verify_in_time, warm_up_workers
from pairclf.inference.state import PredictionState
from pairclf.inputs.cache import RowDigest
from pairclf.scores.metrics import Floats
from pairclf.scores.probabilities import Calibration
from pairclf.scores.strengths import fit_strengths
from pairclf.signals import Signals, signals
from pairclf.task import AB, REWARD, Task

STRENGTH = "strength"
"""The column of a ranking by pairs; by rewards it is `REWARD`."""

FIT_SECONDS = (2e-3, 1.5e-4)
"""Expected time of the fit of strengths, for a prompt and for each of its pairs. On one thread, 4 answers took 1.8 ms,
64 (2,016 pairs) 9 ms, and 2,000 (20,000 pairs) 3 s."""

ROWS = "rows.parquet"
"""In the folder of tokens: the rows that are scored."""


class Contest(NamedTuple):
    """What is scored.

    Attributes:
        ensemble: as it scores these rows: its task is pointwise for rewards.
        rows: one a sequence, or pair, of the task: `id`, fields, `group` and which answers they are.
    """

    ensemble: Ensemble
    rows: pl.DataFrame

    @property
    def pointwise(self) -> bool:
        return not self.ensemble.task.swappable


def rank(
    paths: Sequence[Path],
    data: Path,
    out: Path,
    *,
    pairs: int | None = None,
    base: Path | None = None,
    overrides: Sequence[str] = (),
    deadline: str | None = None,
    strict: bool = False,
    resume: bool = True,
    spent: float = 0.0,
    clock: Clock = time.monotonic,
) -> pl.DataFrame:
    """Rank the answers of each prompt by the bundles, and write the ranking.

    While it runs, the folder `STEM.work` beside `out` holds the journal, from which a killed run resumes.

    Args:
        paths: bundles, or the YAML file of an ensemble; all of reward models, or none.
        data: prompts and answers, as `data.answers` reads them.
        out: the ranking: .csv, .parquet or .jsonl.
        pairs: most pairs of a prompt's answers; None: all of them. Reward models compare no pairs.
        base: folder of the base model on this machine.
        overrides: as for `predict`.
        deadline: when the ranking must be complete, as `deadline.seconds_until` reads it; None: no deadline.
        strict: raise at the end if an answer has no rank.
        resume: resume an interrupted run of the same answers and models.
        spent: seconds already used of a deadline that is a duration.
        clock: seconds; must be picklable, as workers use it too.

    Returns:
        `id`, `answer` (its number in the prompt, from 0), `reward` or `strength`, and `rank` (1 is the best; equal
        answers share a rank); null where an answer could not be scored.

    Raises:
        BundleError, DataError, ConfigError, ModelError: before scoring.
        IncompleteError: with `strict`, after the ranking is written.
        StopError: a signal arrived; what is known so far is written.
    """
    work = out.with_name(f"{out.stem}.work")
    end = float("inf") if deadline is None else clock() + seconds_until(deadline, datetime.now(UTC), spent)
    if out.suffix.lower() not in WRITERS:
        raise ConfigError(f"--out {out}: a ranking's file ends in {', '.join(WRITERS)}", remedy="give another name")
    check_paths(out, None, data, None, work)
    ensemble = open_ensemble(paths, base, ["predict.swap=full", *overrides])
    check_kinds(ensemble, pairs)
    with signals() as caught:
        answers = read_answers(data, ensemble.task, ensemble.data.rules, ensemble.data.test.columns)
        contest = contest_of(ensemble, answers, pairs)
        result = _score(contest, work, overrides, caught, clock, end, resume=resume) if len(contest.rows) else None
        table = ranking_of(answers, contest, None if result is None else result.state)
        write_ranking(out, table)
    _report(table, result, contest.rows["id"].to_list(), out, strict)
    return table


def check_kinds(ensemble: Ensemble, pairs: int | None) -> None:
    """Raise `ConfigError` unless all members score answers in the same way, which `pairs` goes with."""
    task, kinds = ensemble.task, {member.name: member.bundle.config.model.one_sided for member in ensemble.members}
    if not task.swappable:
        raise ConfigError(f"the task {task.name} has no two sides: its models compare no answers")
    if len({*kinds.values()}) > 1:
        rewarding, comparing = (
            next(name for name, kind in kinds.items() if kind is wanted) for wanted in (True, False)
        )
        raise ConfigError(
            f"{rewarding} gives each answer a reward, and {comparing} compares pairs of answers",
            remedy="rank with bundles of one kind at a time",
        )
    if pairs is not None and any(kinds.values()):
        raise ConfigError(
            f"--pairs {pairs} changes nothing: reward models score each answer once", remedy="leave it away"
        )


def contest_of(ensemble: Ensemble, answers: pl.DataFrame, pairs: int | None) -> Contest:
    """The rows to score, and the ensemble as it reads them."""
    reader = ensemble_of_contest(ensemble)
    paired = reader.task.swappable
    rows = pairwise_rows(answers, ensemble.task, pairs) if paired else pointwise_rows(answers, ensemble.task)
    return Contest(reader, rows)


def ensemble_of_contest(ensemble: Ensemble) -> Ensemble:
    """The ensemble as it reads the rows of a contest: under our own names of columns, and rewards one text a row."""
    task, prior = ensemble.task, ensemble.prior
    pointwise = ensemble.members[0].bundle.config.model.one_sided
    if pointwise:
        task, prior = task.pointwise, np.array([0.5])

    def calibration_of(given: Calibration) -> Calibration:
        """A reward has no tie to be scaled."""
        return Calibration(given.temperature) if pointwise else given

    members = []
    for member in ensemble.members:
        config = member.bundle.config.pointwise() if pointwise else member.bundle.config
        data = config.data.model_copy(update={"test": Unlabelled()})
        bundle = replace(member.bundle, config=config.model_copy(update={"data": data}))
        members.append(replace(member, bundle=bundle, calibration=calibration_of(member.calibration)))
    calibration = calibration_of(ensemble.calibration)
    return replace(ensemble, members=tuple(members), calibration=calibration, task=task, prior=prior)


def _score(
    contest: Contest, work: Path, overrides: Sequence[str], caught: Signals, clock: Clock, end: float, *, resume: bool
) -> PredictionResult:
    """Score the rows, or take their scores from the journal."""
    ensemble, rows = contest.ensemble, contest.rows
    path = work / TOKEN_FOLDER / ROWS
    digest = RowDigest(ensemble.task.fields).update(rows).hexdigest()
    file = UnscoredFile(path, digest, len(rows), rows["group"].to_numpy().astype(np.int64))
    with closing(Journal.open(work / JOURNAL, identity_of_run(ensemble, digest))) as journal:
        write_rows(path, rows)  # no other process reads it: the journal is locked
        if not resume:
            journal.clear()
        warm_up_workers(ensemble)
        prompts = rows["group"].n_unique()
        fitting = 0.0 if contest.pointwise else FIT_SECONDS[0] * prompts + FIT_SECONDS[1] * len(rows)
        time_left = PreparationTime(caught, clock, end - reserve(end - clock(), fitting))
        left_out = verify_in_time(ensemble.members, time_left)
        result = score_file(ensemble, file, overrides, journal, NO_SUBMISSION, time_left, left_out)
        clean_up(work, journal, done=not (result.rows_left or result.lost_models or result.stop_signal))
    return result


# --- from logits to one number an answer -----------------------------------------------------------------------------


def ranking_of(answers: pl.DataFrame, contest: Contest, state: PredictionState | None) -> pl.DataFrame:
    """The ranking of answers from the scores of a contest's rows; `state` is None where it has no rows."""
    if contest.pointwise and state is not None:
        return ranking(answers, _rewards(contest, state), REWARD)
    return ranking(answers, _strengths(answers, contest, state), STRENGTH)


def _rewards(contest: Contest, state: PredictionState) -> pl.DataFrame:
    """The rewards of different answers: the mean of the models that scored all answers of a prompt.

    Where none has, it is the first model's, as rewards of different models can't be compared.
    """
    ensemble, rows = contest.ensemble, contest.rows
    rewards = np.stack(
        [
            state.logits(member)[:, 0, 0] / (np.asarray(calibration.temperature) * ensemble.calibration.temperature)
            for member, calibration in enumerate(ensemble.calibrations)
        ]
    )  # (M, N)
    group = rows["group"].to_numpy()
    missing = np.stack([np.bincount(group, weights=np.isnan(values))[group] for values in rewards])
    counts = np.array([member.weight for member in ensemble.members])[:, None] * (missing == 0)
    counts[0] += ~counts.any(axis=0)
    sums = np.where(counts > 0, counts * rewards, 0.0).sum(axis=0)
    return rows.select("group", "answer", pl.Series(REWARD, sums / counts.sum(axis=0)))


def rewards_of_pairs(ensemble: Ensemble, state: PredictionState) -> Floats:
    """Rewards of the two sides of rows that reward models scored as pairs, `(N, 2)`: the mean of the models.

    Where no answer is cut, they are the rewards of each answer scored alone. `model.readout.RewardHead` makes logits of
    two rewards, and the logits of the two victories have the same sum as the rewards.
    """
    task, rewards = ensemble.task, []
    sides = [task.classes.index(name) for name in task.swap_classes or ()]
    for place, member in enumerate(ensemble.members):
        logits = state.logits(place)[:, AB]
        each = logits[:, sides]
        if member.bundle.config.model.tie_model == "rao_kupper":
            # The log odds of a victory are a - b - log(theta), or b - a - log(theta).
            odds = [logits[:, side] - np.logaddexp.reduce(np.delete(logits, side, 1), axis=1) for side in sides]
            each = each.mean(axis=1, keepdims=True) + np.subtract(*odds)[:, None] / 4 * [1.0, -1.0]
        rewards.append(each / (np.asarray(member.calibration.temperature) * ensemble.calibration.temperature))
    return np.asarray(np.average(rewards, axis=0, weights=[member.weight for member in ensemble.members]))


def _strengths(answers: pl.DataFrame, contest: Contest, state: PredictionState | None) -> pl.DataFrame:
    """The strengths of different answers, from the pairs that were scored; a prompt's only answer has strength 0."""
    table = answers.filter(pl.col("answer") == pl.col("same_as")).select("group", "answer")
    if state is None:
        return table.with_columns(pl.lit(0.0).alias(STRENGTH))
    rows = contest.rows
    outcomes, is_scored = _outcomes(state.probabilities(), contest.ensemble.task), state.num_orders() > 0
    pairs = (
        rows.select("group", "first", "second").with_columns(row=pl.int_range(pl.len())).filter(pl.Series(is_scored))
    )
    pairs_of = pairs.partition_by("group", as_dict=True)
    strengths = []
    by_prompt = table.group_by("group", maintain_order=True).agg("answer")
    with progress("strengths", total=len(by_prompt)) as advance:
        for group, numbers in by_prompt.iter_rows():
            of_prompt = pairs_of.get((group,), pairs.clear())
            places = np.searchsorted(numbers, of_prompt.select("first", "second").to_numpy())
            strengths.append(fit_strengths(places, outcomes[of_prompt["row"].to_numpy()], len(numbers)))
            advance()
    return table.with_columns(pl.Series(STRENGTH, np.concatenate(strengths)))


def _outcomes(probabilities: Floats, task: Task) -> Floats:
    """`(N, C)` as the probabilities that the first side wins, that the second does, and, where it can be, neither."""
    sides = [task.classes.index(name) for name in task.swap_classes or ()]
    neither = np.delete(probabilities, sides, axis=1).sum(axis=1, keepdims=True)
    return np.concatenate([probabilities[:, sides], neither], axis=1)[:, : min(3, len(task.classes))]


# --- after -----------------------------------------------------------------------------------------------------------


def _report(table: pl.DataFrame, result: PredictionResult | None, ids: Sequence[str], out: Path, strict: bool) -> None:
    """Print what was ranked and what was not; raise if the run was stopped, or is incomplete under `strict`."""
    taken = "" if result is None else f" in {format_duration(result.seconds)}"
    prompts = counted(table["id"].n_unique(), "prompt")
    console.print(f"wrote {out}: {counted(len(table), 'answer')} of {prompts}, by {table.columns[2]}{taken}")
    failed = {} if result is None else {row: why for rows in result.state.failed for (row, _), why in rows.items()}
    for row, why in list(failed.items())[:5]:
        console.print(f"{ids[row]}: could not be scored: {why}")
    without = table.filter(pl.col("rank").is_null())["id"]
    if len(without):
        console.print(f"WARNING: {len(without):,} of {counted(len(table), 'answer')} could not be ranked")
    if result is not None and result.stop_signal:
        raise StopError(
            f"stopped by a signal; {out} holds the ranking so far",
            signal=result.stop_signal,
            remedy="run the same command again to resume",
        )
    lost = [] if result is None else [f"{name} ({why})" for name, why in result.lost_models.items()]
    if strict and (len(without) or failed or lost):
        raise IncompleteError(
            "the ranking is incomplete" + (f": without {', '.join(lost)}" if lost else ""),
            where=out,
            rows=without.unique(maintain_order=True).to_list(),
            remedy="answers without a rank could not be scored",
        )
