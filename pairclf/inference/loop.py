"""The event loop of a prediction.

    planner -> job -> worker pool -> logits -> journal, prediction state -> submission
       ^                               |
       +---- throughput model <--------+

Workers and clock are injected, so `forecast` runs this same loop in simulation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pairclf.errors import ModelError
from pairclf.inference.deadline import format_duration
from pairclf.inference.messages import BatchScored, Clock, Event, Job, RowOrders, WorkerFailure, WorkerPool, WorkerReady
from pairclf.inference.planner import PlannedModel, Planner
from pairclf.inference.state import Blender, PredictionState
from pairclf.scores.metrics import Floats
from pairclf.task import Task

MAX_DEATHS = 10
"""Workers that may die in a row before the model is dropped. Batches are halved after each death, so this many deaths
isolate a row that kills its worker. A worker that dies while loading counts as half of them: a second load would die
too."""


STALL_SECONDS, STALL_FACTOR = 20.0, 5.0
"""A job is stalled when it takes this many seconds, and this many times the expected seconds. An idle worker then gets
the same job."""
HANG_SECONDS, HANG_FACTOR, UNMEASURED_FACTOR = 120.0, 20.0, 10.0
"""A worker is hung, and is restarted, when it takes this many seconds for a job, and this many times the expected
seconds. Before the first pass was measured, both count ten times as much: the expected seconds are a guess."""


class ScoreJournal(Protocol):
    """Keeps scores on disk, so that a killed run can resume (`journal.Journal`)."""

    def add(self, member: int, sequences: Sequence[tuple[int, int]], logits: Floats) -> None: ...
    def fail(self, member: int, row: int, order: int, what: str) -> None: ...
    def scored(self) -> Iterable[tuple[int, int, int, Floats]]: ...
    def failed(self) -> Iterable[tuple[int, int, int, str]]: ...


class SubmissionOutput(Protocol):
    """Receives the current probabilities (`submission.SubmissionWriter`)."""

    def due(self, now: float) -> bool: ...
    def write(self, probabilities: Floats) -> None: ...


class NullJournal:
    """A journal that stores nothing."""

    def add(self, member: int, sequences: Sequence[tuple[int, int]], logits: Floats) -> None: ...
    def fail(self, member: int, row: int, order: int, what: str) -> None: ...
    def scored(self) -> list[tuple[int, int, int, Floats]]:
        return []

    def failed(self) -> list[tuple[int, int, int, str]]:
        return []


class NullSubmission:
    """A submission that is never written."""

    def due(self, now: float) -> bool:
        return False

    def write(self, probabilities: Floats) -> None: ...


@dataclass(frozen=True, slots=True)
class ProgressReporter:
    """Reports progress to the user; by default to nobody.

    Attributes:
        say: prints a line.
        advance: updates a model's progress bar: its name, scored sequences, all sequences.
    """

    say: Callable[[str], object] = lambda line: None
    advance: Callable[[str, int, int], object] = lambda name, done, total: None


NO_JOURNAL, NO_SUBMISSION, SILENT = NullJournal(), NullSubmission(), ProgressReporter()
"""For loops whose scores are kept in memory alone."""


@dataclass(slots=True)
class PredictionResult:
    """The result of a run.

    Attributes:
        state: all logits, failures and the blend.
        seconds: duration of the run.
        passes: forward passes that succeeded.
        tokens: tokens computed in them.
        rescored: sequences that were scored again in float32.
        rows_left: rows that were not scored for lack of time, by pass (`fold0 BA`).
        lost_models: models that could not be used, and why.
        stop_signal: number of the signal that ended the run; 0: no signal.
    """

    state: PredictionState
    seconds: float = 0.0
    passes: int = 0
    tokens: float = 0.0
    rescored: int = 0
    rows_left: dict[str, int] = field(default_factory=dict)
    lost_models: dict[str, str] = field(default_factory=dict)
    stop_signal: int = 0


class PredictionLoop:
    """One prediction run.

    Args:
        models: the ensemble's members, in the order in which they run.
        task: its swap maps the second order's columns to the first order's.
        blender: blends the members.
        pool: the workers.
        clock: seconds.
        swap: `predict.swap`.
        budget: initial token budget of a forward pass.
        stop: clock time at which scoring ends; infinite: no deadline.
        journal: has the scores of an interrupted run, and gets the new ones.
        submission: gets the probabilities when it is due.
        reporter: gets messages and progress.
        unusable: models that must not be loaded, by index, and why.
    """

    def __init__(
        self,
        models: Sequence[PlannedModel],
        task: Task,
        blender: Blender,
        *,
        pool: WorkerPool,
        clock: Clock,
        swap: str,
        budget: int,
        stop: float = float("inf"),
        journal: ScoreJournal = NO_JOURNAL,
        submission: SubmissionOutput = NO_SUBMISSION,
        reporter: ProgressReporter = SILENT,
        unusable: Mapping[int, str] | None = None,
    ) -> None:
        self.state = PredictionState(
            [model.inputs for model in models], task, blender, swap, [model.swap_share for model in models]
        )
        self.planner = Planner(models, self.state, clock, swap=swap, budget=budget, stop=stop)
        self.result = PredictionResult(self.state)
        for member, why in (unusable or {}).items():
            self.planner.unusable.add(member)
            self.result.lost_models[models[member].name] = why
        self._pool = pool
        self._clock = clock
        self._journal = journal
        self._submission = submission
        self._reporter = reporter
        self._warmed_up: dict[int, bool] = {}  # by worker: whether it has completed its first pass
        self._ready_workers: set[int] = set()
        self._in_flight: dict[int, Job] = {}
        self._workers_free_at = clock()  # expected time at which all jobs in flight are done
        self._deaths_in_a_row = 0
        self._attempts: Counter[tuple[RowOrders, ...]] = Counter()
        self._jobs_submitted = 0
        self._resumed = 0
        self._submitted_at: dict[int, float] = {}  # by job number; a job that was submitted twice is not in it
        self._reported: set[str] = set()
        self._reported_plan: dict[tuple[int, int], int] = {}

    def resume(self) -> int:
        """Load the journal's scores; returns the number of sequences that need no scoring any more."""
        count = 0
        for member, row, order, logits in self._journal.scored():
            self.state.add(member, [(row, order)], logits[None])
            self.planner.pending_by_model[member].mark_taken([RowOrders(row, (order,))])
            count += 1
        for member, row, order, what in self._journal.failed():
            self.state.mark_failed(member, [(row, order)], what)
            self.planner.pending_by_model[member].mark_taken([RowOrders(row, (order,))])
        self._resumed = count
        if count:
            self._submission.write(self.state.probabilities())
        return count

    # --- the loop --------------------------------------------------------------------------------------------------

    def run(self, *, tick: float, stop_signal: Callable[[], int] = lambda: 0) -> PredictionResult:
        """Score until all sequences are scored, the time is up or a signal arrives. The pool is closed in any case.

        Args:
            tick: seconds between two calls of `stop_signal`.
            stop_signal: returns the number of the signal received, or 0.

        Raises:
            PairclfError: no model could be loaded; the error of the last one.
        """
        start = self._clock()
        try:
            for member in self._models_to_run():
                if stop_signal():
                    break
                self._switch_to(member)
                while member not in self.planner.unusable and not self._is_time_up() and not stop_signal():
                    self._submit_jobs()
                    if self._ready_workers and not self._in_flight:
                        break
                    for event in self._pool.wait(min(tick, max(0.0, self.planner.stop - self._clock()))):
                        self._handle(event)
                    if self.result.passes and self._submission.due(self._clock()):
                        self._submission.write(self.state.probabilities())
                self._return_jobs_in_flight()
        finally:
            self._pool.close()
        self.result.stop_signal = stop_signal()
        self.result.seconds = self._clock() - start
        self.result.rows_left = dict(self._rows_left())
        return self.result

    def _is_time_up(self) -> bool:
        return self._clock() >= self.planner.stop

    def _models_to_run(self) -> Iterator[int]:
        """Yield the next model with planned work; skip one that just made no progress until another has."""
        without_progress: set[int] = set()
        while not self._is_time_up():
            self.planner.plan()
            candidates = self.planner.worth_reloading() - without_progress
            if not candidates:
                return
            member = self.planner.current if self.planner.current in candidates else min(candidates)
            passes = self.result.passes
            yield member
            without_progress = without_progress | {member} if self.result.passes == passes else {member}

    def _switch_to(self, member: int) -> None:
        self.planner.start_model(member)
        self._warmed_up = dict.fromkeys(self._pool.load(member), False)
        self._ready_workers, self._reported = set(), set()
        self._deaths_in_a_row, self._attempts = 0, Counter()
        self._reporter.say(f"{self._name}: loading")
        self._workers_free_at = self._clock()
        self.planner.num_workers = len(self._warmed_up)

    def _submit_jobs(self) -> None:
        """Submit jobs until every ready worker has one running and one queued, so that no worker waits for us."""
        while self._ready_workers and len(self._in_flight) < 2 * len(self._ready_workers):
            batch = self.planner.next_batch(max(self._workers_free_at, self._clock()))
            self._report_plan()
            if not batch:
                self._resubmit_stalled()
                return
            job = Job(self._jobs_submitted, self.planner.current, batch, self._limit(batch))
            self._jobs_submitted += 1
            self._in_flight[job.number], self._submitted_at[job.number] = job, self._clock()
            expected = self.planner.seconds(batch) / self.planner.num_workers
            self._workers_free_at = max(self._workers_free_at, self._clock()) + expected
            self._pool.submit(job)

    def _limit(self, batch: Sequence[RowOrders]) -> float:
        """`Job.limit`; twice as long after each death, as the machine may have become slow."""
        limit = max(HANG_SECONDS, HANG_FACTOR * self.planner.seconds(batch)) * 2.0**self._deaths_in_a_row
        return limit if self.planner.throughput.is_fitted else UNMEASURED_FACTOR * limit

    def _resubmit_stalled(self) -> None:
        """Give a stalled job to a second worker when no other work is left; the first answer counts."""
        for number, job in self._in_flight.items():
            limit = max(STALL_SECONDS, STALL_FACTOR * len(self._in_flight) * self.planner.seconds(job.row_orders))
            waited = self._clock() - self._submitted_at.get(number, self._clock())
            if len(self._ready_workers) > 1 and waited > limit:
                del self._submitted_at[number]
                self._pool.submit(job)

    def _report_plan(self) -> None:
        """Print the plan if it differs from the last one printed."""
        planner, plan = self.planner, self.planner.plan_key
        is_reported = bool(self._reported_plan) and (
            planner.has_no_deadline or not plan.items() - self._reported_plan.items()
        )
        if not planner.throughput.is_fitted or is_reported:
            return
        self._reported_plan = plan
        if planner.has_no_deadline:
            seconds = sum(planned.seconds for planned in planner.planned_passes)
            self._reporter.say(f"scoring is expected to take {format_duration(seconds)} more")
        else:
            seconds = planner.stop - self._clock()
            self._reporter.say(f"plan for the remaining {format_duration(seconds)} of scoring: {planner.describe()}")

    def _return_jobs_in_flight(self) -> None:
        """Make the sequences of unfinished jobs pending again: the pool drops them when it loads another model."""
        for job in self._in_flight.values():
            self.planner.pending_by_model[job.member].put_back(job.row_orders)
        self._in_flight = {}
        self.planner.drop_retries()

    def _rows_left(self) -> Iterator[tuple[str, int]]:
        for member, pending in enumerate(self.planner.pending_by_model):
            for rank in (1, 2):
                if rows := int(pending.rows_left(rank).sum()):
                    yield self.planner.name(member, rank), rows
            if rows := int((~pending.inputs.is_known).sum()):
                yield f"{self.planner.models[member].name} (not prepared)", rows

    # --- events ----------------------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        if isinstance(event, WorkerReady):
            self._on_ready(event)
            return
        if event.job is not None and event.job.number not in self._in_flight:  # a second worker finished it first
            if isinstance(event, BatchScored) or event.kind != "died":
                return
            event = event._replace(job=None)
        if event.job is not None:
            self._remove_in_flight(event.job)
        if isinstance(event, BatchScored):
            self._on_scored(event)
        elif event.kind == "died":
            self._on_death(event)
        elif event.job is None:
            self._on_load_failure(event)
        else:
            self._on_job_failure(event, event.job)

    def _remove_in_flight(self, job: Job) -> None:
        del self._in_flight[job.number]
        self._submitted_at.pop(job.number, None)
        seconds = sum(self.planner.seconds(other.row_orders) for other in self._in_flight.values())
        self._workers_free_at = self._clock() + seconds / self.planner.num_workers

    def _on_ready(self, event: WorkerReady) -> None:
        self._ready_workers.add(event.worker)
        self.planner.observe_load(event.seconds)
        self.planner.budget = min(self.planner.budget, event.budget or self.planner.budget)
        for pending in self.planner.pending_by_model:
            pending.layout = event.layout
        if event.what not in self._reported:  # workers of equal devices report the same
            self._reported.add(event.what)
            self._reporter.say(f"{self._name}: {event.what}")

    @property
    def _name(self) -> str:
        return self.planner.models[self.planner.current].name

    def _on_scored(self, event: BatchScored) -> None:
        member, sequences = self.planner.current, event.job.sequences
        workload = self.planner.pending.workload_of(event.job.row_orders)
        warming_up = not self._warmed_up.get(event.worker, True)
        self.planner.throughput.observe(workload, event.seconds, warming_up=warming_up)
        self._warmed_up[event.worker] = True
        self._deaths_in_a_row = 0
        self.result.passes += 1
        self.result.tokens += workload.tokens
        self.result.rescored += event.rescored
        finite = np.asarray(np.isfinite(event.logits).all(axis=1))
        scored = [sequence for sequence, is_finite in zip(sequences, finite, strict=True) if is_finite]
        self.state.add(member, scored, event.logits[finite])
        # Duplicates, too: a resumed run that is stopped before it has compared the rows then knows all their scores.
        self._journal.add(member, *self.state.with_duplicates(member, scored, event.logits[finite]))
        failed = [sequence for sequence, is_finite in zip(sequences, finite, strict=True) if not is_finite]
        self._mark_failed(failed, "its logits are not finite, even in float32")
        self._reporter.advance(self._name, *self._progress())

    def _progress(self) -> tuple[int, int]:
        wanted, is_pending = self.planner.pending.rank > 0, self.planner.pending.is_pending
        in_flight = sum(len(job.sequences) for job in self._in_flight.values())
        return int((wanted & ~is_pending).sum()) - in_flight, int(wanted.sum())

    def _mark_failed(self, sequences: Sequence[tuple[int, int]], why: str) -> None:
        self.state.mark_failed(self.planner.current, sequences, why)
        for row, order in sequences:
            self._journal.fail(self.planner.current, row, order, why)

    def _on_job_failure(self, event: WorkerFailure, job: Job) -> None:
        """Retry in halves, down to one sequence. A single sequence is retried once: another process may have freed
        memory meanwhile."""
        if event.kind == "memory":
            tokens = self.planner.pending.workload_of(job.row_orders).tokens
            if self.planner.lower_budget(tokens):
                self._reporter.say(f"out of memory: token budget of a forward pass lowered to {self.planner.budget:,}")
        self._attempts[job.row_orders] += 1
        is_single = len(job.sequences) == 1
        if is_single and self._attempts[job.row_orders] > 1:
            self._mark_failed(job.sequences, event.what)
            return
        # The batch may not be the cause of a crash: retry it unchanged once before splitting it.
        is_first_crash = event.kind == "died" and self._attempts[job.row_orders] == 1
        self.planner.retry(job.row_orders, whole=is_single or is_first_crash)

    def _on_death(self, event: WorkerFailure) -> None:
        self._warmed_up.pop(event.worker, None)
        self._ready_workers.discard(event.worker)
        self._reporter.say(f"{self._name}: a worker died ({event.what})")
        if event.job is not None:
            self._on_job_failure(event, event.job)
        self._deaths_in_a_row += 1 if event.job is not None else MAX_DEATHS // 2
        if self._deaths_in_a_row < MAX_DEATHS:
            self._warmed_up[self._pool.restart(event.worker)] = False
        else:
            self._continue_without(event)

    def _on_load_failure(self, event: WorkerFailure) -> None:
        self._warmed_up.pop(event.worker, None)
        self._continue_without(event)

    def _continue_without(self, event: WorkerFailure) -> None:
        """Continue without the worker; if it was the last, without the model.

        Raises:
            PairclfError: no model is left, and no row was scored.
        """
        self.planner.num_workers = max(1, len(self._warmed_up))
        if self._warmed_up:
            return
        self.planner.unusable.add(self.planner.current)
        self.result.lost_models[self._name] = event.what
        self._reporter.say(f"{self._name} is dropped: {event.what}")
        if len(self.planner.unusable) == len(self.planner.models) and not self.result.passes and not self._resumed:
            raise event.error or ModelError(f"{self._name} can't be loaded: {event.what}")
