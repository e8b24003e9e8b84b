"""An inference server, for competitions that send their test rows in batches through `kaggle_evaluation`.

    server = Server([Path("bundle")], seconds=8.5 * 3600)    # models load in worker processes
    DefaultInferenceServer(server.predict).serve()           # Kaggle's class, which sends batch after batch

Each batch is a small prediction with the inputs, event loop, workers and blend of `pairclf predict`. The differences:
workers keep their models between batches, and the number of rows is not known in advance.

In a script, create it under `if __name__ == "__main__"`: worker processes import the script.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pairclf.approaches import approach_of
from pairclf.bundles.bundle import verify_files
from pairclf.console import console, counted
from pairclf.data.audit import clean
from pairclf.data.rows import in_memory, rows_in_memory, to_rows
from pairclf.data.submission import answer, can_fill
from pairclf.errors import ConfigError, DataError, ModelError, PairclfError
from pairclf.hardware import HEADROOM, process_memory
from pairclf.inference.deadline import format_duration
from pairclf.inference.devices import Placement
from pairclf.inference.ensemble import Ensemble, EnsembleMember, open_ensemble
from pairclf.inference.loop import (
    MAX_DEATHS,
    NullJournal,
    NullSubmission,
    PredictionLoop,
    PredictionResult,
    ProgressReporter,
)
from pairclf.inference.messages import BatchScored, Clock, Event, Job, WorkerFailure, WorkerReady
from pairclf.inference.pending import PendingSequences, Workload
from pairclf.inference.planner import PlannedModel
from pairclf.inference.pool import ProcessPool, warm_up
from pairclf.inference.prepare import costs_of, devices_of, placement_of, worker_model_of
from pairclf.inference.state import orders_of
from pairclf.inference.throughput import ThroughputModel
from pairclf.inputs.plan import token_budget
from pairclf.inputs.sequences import Ints, LargestPass, SequenceIndex
from pairclf.scores.metrics import Floats
from pairclf.task import HIDDEN_ROWS
from pairclf.trust import Trust, grant

BATCH_SECONDS = 300.0
"""Kaggle's limit for the answer to a batch, but for the first (`kaggle_evaluation`'s gateways: 60 * 5)."""

FIRST_SECONDS = 2700.0
"""Time limit for loading the models: the first answer may take an hour (`core/relay.py`, DEFAULT_DEADLINE_SECONDS)."""

RESERVED_SHARE = 0.2
"""Share of a batch's time limit that is reserved for encoding, transport, and a slow last pass."""

REMAINING_MARGIN = 1.25
"""Safety factor for the estimated time of the remaining rows."""

TICK = 0.1
"""Seconds between two looks at the clock."""

MAX_REPORTED_ROWS = 5
"""Failed rows that are reported by id, at most."""

_SILENT = ProgressReporter(lambda line: None, lambda name, done, total: None)
"""Batches are not reported: there are thousands."""


class Server:
    """Keeps models loaded and scores batches of rows. Not thread-safe.

    Args:
        members: bundles, or the YAML file of an ensemble.
        base: folder of the base model on this machine.
        seconds: time limit for all rows, from now on. Rows that arrive later get the prior.
        overrides: `key=value` for settings under `predict`, `model.dtype` and `model.attn_implementation`.
        rows: expected number of rows. If the time does not suffice for both orders, rows are scored in one.
        batch_seconds: time limit for a batch; the first may take longer, as it waits for the models.
        strict: raise if no model can be loaded; else all rows get the prior.
        trust: permissions for this process from now on; None: unchanged.
        clock: seconds; must be picklable, as workers use it too.

    Raises:
        BundleError, ConfigError: as `open_ensemble`; or a member scores only a share of the rows.
        ModelError: the models don't fit into memory together.
    """

    def __init__(
        self,
        members: Sequence[Path],
        *,
        base: Path | None = None,
        seconds: float,
        overrides: Sequence[str] = (),
        rows: int = HIDDEN_ROWS,
        batch_seconds: float = BATCH_SECONDS,
        strict: bool = True,
        trust: Trust | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        if trust is not None:
            grant(trust)
        self._clock = clock
        self._end = clock() + seconds
        self._rows = rows
        self._batch_seconds = batch_seconds
        self._strict = strict
        self._ensemble = open_ensemble(members, base, overrides)
        _check_shares(self._ensemble)
        placement = _placement_of_all(self._ensemble)
        if not placement.gpu:
            warm_up({approach_of(member.bundle.config).module for member in self._ensemble.members})
        members_count, settings = len(self._ensemble.members), self._ensemble.settings
        # Between passes each process keeps its memory for activations, so the models share one budget.
        self._budget = max(1, token_budget(settings.tokens_per_batch, gpu=placement.gpu) // members_count)
        self._swap = settings.swap
        self._resident = [
            _ResidentModel(member, placement, overrides, self._budget, clock) for member in self._ensemble.members
        ]
        # In the background: Kaggle expects `serve()` within 15 minutes, and hashing 18 GB takes minutes.
        pool = ThreadPoolExecutor(1)
        self._verifications = [pool.submit(verify_files, member.bundle) for member in self._ensemble.members]
        pool.shutdown(wait=False)
        self._jobs_submitted = 0
        self._counts: Counter[str] = Counter(dict.fromkeys(("rows", "both", "one", "priors", "failed", "batches"), 0))
        self._seconds_spent = 0.0
        self._lost: set[str] = set()
        models, time_limit = counted(members_count, "model"), format_duration(seconds)
        console.print(f"serving {models}: {placement.why}; {time_limit} for {counted(rows, 'row')}")

    def close(self) -> None:
        """Terminate the workers."""
        for resident in self._resident:
            resident.pool.close()

    def report(self) -> dict[str, float]:
        """Statistics so far: `rows`, scored in `both` orders, in `one`, or with the prior (`priors`); `failed` rows;
        `batches`, and their `seconds`."""
        return {**self._counts, "seconds": self._seconds_spent}

    def predict(self, test: Any, *others: Any) -> pl.DataFrame:
        """Score a batch.

        Args:
            test: a polars or pandas DataFrame with the task's columns and `id`.
            others: other tables of the competition. If one is the sample submission of these rows, the answer has its
                ids, order and columns.

        Returns:
            `id`, in its original type, and a column for each class (or the label column); one row for each input row.

        Raises:
            DataError: a column is missing, or the sample has other ids.
            BundleError: a file of a bundle was changed.
            PairclfError: with `strict`, no model can be loaded.
        """
        start = self._clock()
        rows, task = in_memory(test), self._ensemble.task
        if "id" not in rows.columns:
            raise DataError(
                f"a batch has columns {rows.columns}, and no id", remedy="pass the test rows as the first argument"
            )
        sample = self._sample(others)
        probabilities, orders = self._score(rows) if len(rows) else self._priors(0)
        self._counts.update(rows=len(rows), batches=1, both=int((orders > 1).sum()), one=int((orders == 1).sum()))
        self._counts.update(priors=int((orders == 0).sum()))
        self._seconds_spent += self._clock() - start
        return answer(rows["id"], probabilities, task, sample)

    def _sample(self, others: Sequence[Any]) -> pl.DataFrame | None:
        """The first table that has a submission's columns."""
        tables = (
            frame
            for frame in others
            if hasattr(frame, "columns") and can_fill(list(frame.columns), self._ensemble.task)
        )
        sample = next(tables, None)
        return None if sample is None else in_memory(sample)

    def _priors(self, rows: int) -> tuple[Floats, Ints]:
        """The result of `_score` for rows that are not scored."""
        return np.tile(self._ensemble.prior, (rows, 1)), np.zeros(rows, dtype=np.int64)

    def _score(self, rows: pl.DataFrame) -> tuple[Floats, Ints]:
        """Probabilities `(N, C)`, and the number of orders behind each row, `(N,)`."""
        self._wait_for_models()
        start = self._clock()
        inputs = self._encode(rows)
        stop, swap = self._plan(inputs, start)
        if stop <= self._clock():
            return self._priors(len(rows))
        try:
            result = self._score_batch(inputs, stop, swap)
        except PairclfError as error:
            if self._strict:
                raise
            self._report_lost("all models", str(error))
            return self._priors(len(rows))
        self._report_failures(rows["id"], result)
        return result.state.probabilities(), result.state.num_orders()

    def _wait_for_models(self) -> None:
        """Before the first batch: wait until the bundles are verified and the models loaded."""
        if not self._verifications:
            return
        for verification in self._verifications:
            verification.result()
        self._verifications = []
        end = min(self._clock() + FIRST_SECONDS, self._end)
        for resident in self._resident:
            while not resident.is_settled and self._clock() < end:
                resident.wait(TICK)

    def _encode(self, rows: pl.DataFrame) -> list[SequenceIndex]:
        """Encode the rows for each model; models with the same recipe share the encoding."""
        by_recipe: dict[str, tuple[Sequence[tuple[Any, ...]], SequenceIndex]] = {}
        for resident in self._resident:
            if resident.recipe not in by_recipe:
                task, rules = self._ensemble.task, resident.member.bundle.config.data.rules
                frame, _ = clean(rows_in_memory(rows, task), task, rules, labelled=False)
                encoded = resident.approach.encode(resident.member.bundle, to_rows(frame, task))
                by_recipe[resident.recipe] = encoded, resident.approach.index(encoded)
            resident.encoded[:] = by_recipe[resident.recipe][0]
        return [by_recipe[resident.recipe][1] for resident in self._resident]

    def _plan(self, inputs: Sequence[SequenceIndex], began: float) -> tuple[float, str]:
        """Clock time at which this batch's scoring ends, and `predict.swap` for it.

        If the remaining time suffices for both orders of all expected rows, at the measured cost of a row, the batch
        may use its whole time limit. Otherwise its rows are scored in one order, within the batch's share of the
        remaining time but at least by the first model. Unused time is left to later batches, which may get both orders
        again.
        """
        limit = min(began + (1 - RESERVED_SHARE) * self._batch_seconds, self._end)
        rows, served = len(inputs[0].lengths), self._counts["rows"]
        expected = mean = 0.0
        for member, (resident, index) in enumerate(zip(self._resident, inputs, strict=True)):
            workload = resident.add_batch(index, orders_of(self._swap, member, index), self._budget)
            if resident.is_measured:  # others have not scored anything yet, or are lost
                expected += resident.seconds(workload)
                mean += resident.seconds(resident.total_workload) / (served + rows)
        seconds_left, rows_to_come = self._end - began, max(self._rows - served, served // 10, rows)
        shortage = REMAINING_MARGIN * mean * rows_to_come / max(seconds_left, 1e-9)
        if shortage <= 1:
            return limit, self._swap
        swap = "split" if self._swap == "split" else "off"
        if len(self._resident) == 1:  # one order of one model is the minimum
            return limit, swap
        share_of_time = expected / shortage
        first = self._resident[0].seconds(
            self._resident[0].workload(inputs[0], orders_of(swap, 0, inputs[0]), self._budget)
        )
        return min(limit, began + max(share_of_time, REMAINING_MARGIN * first)), swap

    def _score_batch(self, inputs: Sequence[SequenceIndex], stop: float, swap: str) -> PredictionResult:
        models = [resident.planned_model(index) for resident, index in zip(self._resident, inputs, strict=True)]
        pool = _BatchPool(self._resident, self._jobs_submitted)
        loop = PredictionLoop(
            models,
            self._ensemble.task,
            self._ensemble,
            pool=pool,
            clock=self._clock,
            journal=NullJournal(),
            submission=NullSubmission(),
            reporter=_SILENT,
            swap=swap,
            budget=self._budget,
            stop=stop,
        )
        try:
            result = loop.run(stop_signal=lambda: 0, tick=TICK)
        finally:
            self._jobs_submitted = pool.next_number
        for resident, throughput in zip(self._resident, loop.planner.throughput_by_model, strict=True):
            if throughput.is_fitted:
                resident.speed, resident.is_measured = throughput.speed, True
        return result

    def _report_failures(self, ids: pl.Series, result: PredictionResult) -> None:
        for name, why in result.lost_models.items():
            self._report_lost(name, why)
        for row, why in {row: why for failures in result.state.failed for (row, _), why in failures.items()}.items():
            self._counts["failed"] += 1
            if self._counts["failed"] <= MAX_REPORTED_ROWS:
                console.print(f"row {ids[row]} could not be scored: {why}")

    def _report_lost(self, name: str, why: str) -> None:
        """Print a warning, once for each model."""
        if name not in self._lost:
            self._lost.add(name)
            console.print(f"WARNING: {name} can't be used: {why}")


def _check_shares(ensemble: Ensemble) -> None:
    """Refuse cascades: the most uncertain rows can only be selected when all rows are known."""
    for place, member in enumerate(ensemble.members):
        if member.share < 1:
            raise ConfigError(
                f"members.{place}.share={member.share:g} selects the most uncertain of all rows, and a server gets "
                "rows in batches",
                remedy="set share: 1, or package the ensemble as a notebook (package.kernel_type=notebook)",
            )


def _placement_of_all(ensemble: Ensemble) -> Placement:
    """Devices that hold all models at once.

    Raises:
        ModelError: there are none.
    """
    size = sum(cost.bytes for cost in costs_of(ensemble.members))
    on_gpu = devices_of(ensemble.members)[0] != "cpu"
    others = len(ensemble.members) - 1 if on_gpu else 0  # further processes, each with its own CUDA context
    remedy = "serve one bundle, or the folds averaged into one (pairclf merge); or export them quantised"
    try:
        placement = placement_of(ensemble.members, size + round(others * HEADROOM[1]))
    except ModelError as error:
        raise ModelError(f"all models must fit into memory together: {error.what}", remedy=remedy) from error
    if not placement.gpu:
        copies = len(placement.groups)
        free = process_memory(copies)
        if size > free:
            processes = counted(copies, "process", "processes")
            what = f"the models take {size / 1e9:.1f} GB in each of {processes}, and {free / 1e9:.1f} GB are free"
            raise ModelError(f"all models must fit into memory together: {what}", remedy=remedy)
    return placement


class _ResidentModel:
    """A model that stays loaded in its workers.

    Attributes:
        encoded: the sequences of the present batch, which the pool sends to the workers.
        total_workload: workload of all rows so far, in all orders wanted.
        speed: operations a second, as measured in the last batch.
        is_measured: whether any batch has been measured.
    """

    def __init__(
        self, member: EnsembleMember, placement: Placement, overrides: Sequence[str], budget: int, clock: Clock
    ) -> None:
        self.member = member
        self.approach = approach_of(member.bundle.config)
        self.recipe = self.approach.recipe(member.bundle)
        self.encoded: list[tuple[Any, ...]] = []
        self.total_workload = Workload(0.0, 0.0, 0.0)
        self._shape = self.approach.cost(member.bundle, member.base)
        self.speed, self.is_measured = self._shape.speed_on(placement.gpu), False
        self._num_workers = len(placement.groups)
        orders = 2 if member.bundle.config.task.swappable else 1
        largest = LargestPass(self.approach.longest(member.bundle), budget, orders)
        model = worker_model_of(member, self.encoded, overrides, largest)
        self.pool = ProcessPool([model], placement.groups, clock=clock)
        self.workers = list(self.pool.load(0))
        self._last_events: dict[int, WorkerReady | WorkerFailure] = {}
        self._budget = budget
        self._deaths = 0
        self.wait(0.0)  # the pool sends assignments in `wait`

    @property
    def is_settled(self) -> bool:
        """Whether each worker has loaded the model or failed."""
        return all(worker in self._last_events for worker in self.workers)

    def wait(self, seconds: float) -> list[Event]:
        """Wait for events; keeps each worker's last state for later batches."""
        events = self.pool.wait(seconds)
        for event in events:
            if isinstance(event, WorkerReady):
                self._last_events[event.worker] = event
            elif isinstance(event, WorkerFailure) and (event.kind == "died" or event.job is None):
                self._last_events[event.worker] = event._replace(job=None)
                self._deaths += event.kind == "died"
            elif isinstance(event, BatchScored):
                self._deaths = 0
        return events

    def lower_budget(self, job: Job) -> None:
        """Halve the token budget after an out-of-memory error, for the following batches."""
        tokens = sum(len(self.encoded[row][order].ids) for row, order in job.sequences)
        self._budget = max(1, min(self._budget, tokens // 2))

    def events_for_batch(self) -> list[Event]:
        """Each worker's state, as first events of a batch; the loop restarts dead workers, at most `MAX_DEATHS`."""
        events: list[Event] = []
        for event in (self._last_events[worker] for worker in self.workers if worker in self._last_events):
            if isinstance(event, WorkerReady):
                events.append(event._replace(budget=min(self._budget, event.budget or self._budget)))
            else:
                events.append(event._replace(kind="error") if self._deaths >= MAX_DEATHS else event)
        return events

    def restart(self, worker: int) -> int:
        number = self.pool.restart(worker)
        self.workers = [number if other == worker else other for other in self.workers]
        return number

    # --- workload -----------------------------------------------------------------------------------------------------

    def planned_model(self, inputs: SequenceIndex) -> PlannedModel:
        """The model, as the planner needs it: already loaded."""
        member = self.member
        return PlannedModel(
            name=member.bundle.manifest.name,
            inputs=inputs,
            cost=self._shape,
            speed=self.speed,
            load_seconds=0.0,
            gain=member.gain_member,
            gain_swap=member.gain_swap,
            approach=member.bundle.config.approach,
        )

    def add_batch(self, inputs: SequenceIndex, orders: Sequence[int], budget: int) -> Workload:
        """The workload of a batch, which is added to `total_workload`."""
        workload = self.workload(inputs, orders, budget)
        self.total_workload = Workload(
            *(left + right for left, right in zip(self.total_workload, workload, strict=True))
        )
        return workload

    def workload(self, inputs: SequenceIndex, orders: Sequence[int], budget: int) -> Workload:
        """The workload of these orders of a batch."""
        pending = PendingSequences(inputs, orders)
        pending.layout = next(
            (event.layout for event in self._last_events.values() if isinstance(event, WorkerReady)), pending.layout
        )
        return pending.workload_left(budget)

    def seconds(self, workload: Workload) -> float:
        """Expected seconds of all workers together, at the last batch's speed."""
        return ThroughputModel(self._shape, self.speed).seconds(workload) / self._num_workers


class _BatchPool:
    """A `messages.WorkerPool` for one batch, over persistent workers.

    `load` loads nothing. Results of earlier batches are ignored.

    Args:
        resident: the models.
        number: number of the first job; numbers count up over all batches.
    """

    def __init__(self, resident: Sequence[_ResidentModel], number: int) -> None:
        self.next_number = number
        self._first = number
        self._resident = resident
        self._current = resident[0]
        self._passes_since_plan: list[Event] = []

    def load(self, member: int) -> Sequence[int]:
        self._current = self._resident[member]
        self._passes_since_plan = self._current.events_for_batch()
        return list(self._current.workers)

    def restart(self, worker: int) -> int:
        return self._current.restart(worker)

    def submit(self, job: Job) -> None:
        """`member=0`: a resident model's pool has no other."""
        self._current.pool.submit(job._replace(number=self._first + job.number, member=0))
        self.next_number = max(self.next_number, self._first + job.number + 1)

    def wait(self, seconds: float) -> list[Event]:
        if self._passes_since_plan:
            news, self._passes_since_plan = self._passes_since_plan, []
            return news
        return [self._renumbered(event) for event in self._current.wait(seconds)]

    def _renumbered(self, event: Event) -> Event:
        """The event with the loop's own job number; jobs of earlier batches get negative numbers, which it ignores."""
        if isinstance(event, WorkerReady) or event.job is None:
            return event
        number, member = event.job.number - self._first, self._resident.index(self._current)
        if isinstance(event, WorkerFailure) and event.kind == "memory" and number >= 0:
            self._current.lower_budget(event.job)
        return event._replace(job=event.job._replace(number=number, member=member))

    def close(self) -> None:
        for resident in self._resident:
            resident.pool.drop_queue()
