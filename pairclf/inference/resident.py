"""Models that stay loaded in their workers between batches of rows, for the inference server and for `Judge`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import polars as pl

from pairclf.approaches import approach_of
from pairclf.approaches.protocol import ModelCost
from pairclf.bundles.bundle import Bundle, verify_files
from pairclf.console import counted
from pairclf.data.audit import clean
from pairclf.data.rows import rows_in_memory, to_rows
from pairclf.errors import ModelError
from pairclf.hardware import HEADROOM, process_memory
from pairclf.inference.devices import Placement
from pairclf.inference.ensemble import Ensemble, EnsembleMember
from pairclf.inference.loop import MAX_DEATHS, PredictionLoop, PredictionResult
from pairclf.inference.messages import BatchScored, Clock, Event, Job, WorkerFailure, WorkerReady
from pairclf.inference.pending import PendingSequences, Workload
from pairclf.inference.planner import PlannedModel
from pairclf.inference.pool import ProcessPool
from pairclf.inference.prepare import (
    costs_of,
    devices_of,
    placement_of,
    planned_model_of,
    warm_up_workers,
    worker_model_of,
)
from pairclf.inference.throughput import ThroughputModel
from pairclf.inputs.plan import token_budget
from pairclf.inputs.sequences import LargestPass, SequenceIndex

TICK = 0.1
"""Seconds between two looks at the clock."""


def placement_of_all(ensemble: Ensemble, costs: Sequence[ModelCost]) -> Placement:
    """Devices that hold all models at once.

    Raises:
        ModelError: there are none.
    """
    size = sum(cost.bytes for cost in costs)
    on_gpu = devices_of(ensemble)[0] != "cpu"
    others = len(ensemble.members) - 1 if on_gpu else 0  # further processes, each with its own CUDA context
    remedy = "serve one bundle, or the folds averaged into one (pairclf merge); or export them quantised"
    try:
        placement = placement_of(ensemble, size + round(others * HEADROOM[1]))
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


def encode_rows(
    bundle: Bundle, rows: pl.DataFrame, columns: Mapping[str, str | None] | None = None
) -> Sequence[tuple[Any, ...]]:
    """Rows in memory, repaired by the bundle's rules, as its model sees them: by row, then order.

    Args:
        bundle: of the model.
        rows: with a column for each field of the task.
        columns: how they are called; None: as `data.test.columns` says.

    Raises:
        DataError: a column is missing.
    """
    config = bundle.config
    task, data = config.task, config.data
    names = {**(data.test.columns if columns is None else columns), "id": None}
    frame, _ = clean(rows_in_memory(rows, task, names), task, data.rules, labelled=False)
    return approach_of(config).encode(bundle, to_rows(frame, task))


class ResidentModel:
    """A model that stays loaded in its workers.

    Attributes:
        encoded: the sequences of the present batch, which the pool sends to the workers.
        total_workload: workload of all rows so far, in all orders wanted.
        speed: operations a second, as measured in the last batch.
        is_measured: whether any batch has been measured.
    """

    def __init__(
        self,
        member: EnsembleMember,
        cost: ModelCost,
        placement: Placement,
        overrides: Sequence[str],
        budget: int,
        clock: Clock,
    ) -> None:
        self.member = member
        self.approach = approach_of(member.bundle.config)
        self.recipe = self.approach.recipe(member.bundle)
        self.encoded: list[tuple[Any, ...]] = []
        self.total_workload = Workload(0.0, 0.0, 0.0)
        self._cost = cost
        self.speed, self.is_measured = self._cost.speed_on(placement.gpu), False
        self._placement = placement
        largest = LargestPass(self.approach.longest(member.bundle), budget, member.bundle.config.orders)
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
        planned = planned_model_of(self.member, inputs, self._cost, self._placement)
        return replace(planned, speed=self.speed, load_seconds=0.0)

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
        return ThroughputModel(self._cost, self.speed).seconds(workload) / len(self._placement.groups)


class BatchPool:
    """A `messages.WorkerPool` for one batch, over persistent workers.

    `load` loads nothing. Results of earlier batches are ignored.

    Args:
        resident: the models.
        number: number of the first job; numbers count up over all batches.
    """

    def __init__(self, resident: Sequence[ResidentModel], number: int) -> None:
        self.next_number = number
        self._first = number
        self._resident = resident
        self._current = resident[0]
        self._first_events: list[Event] = []

    def load(self, member: int) -> Sequence[int]:
        self._current = self._resident[member]
        self._first_events = self._current.events_for_batch()
        return list(self._current.workers)

    def restart(self, worker: int) -> int:
        return self._current.restart(worker)

    def submit(self, job: Job) -> None:
        """`member=0`: a resident model's pool has no other."""
        self._current.pool.submit(job._replace(number=self._first + job.number, member=0))
        self.next_number = max(self.next_number, self._first + job.number + 1)

    def wait(self, seconds: float) -> list[Event]:
        if self._first_events:
            news, self._first_events = self._first_events, []
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


class ResidentEnsemble:
    """All models of an ensemble, loaded in worker processes until `close`. Not thread-safe.

    Each batch of rows is a small prediction, with the inputs, event loop, workers and blend of `pairclf predict`.

    Args:
        ensemble: the models.
        overrides: those with which it was opened, for the workers.
        clock: seconds; must be picklable, as workers use it too.

    Attributes:
        models: those of the ensemble, in its order.
        placement: their devices.
        budget: tokens of a forward pass.

    Raises:
        ModelError: the models don't fit into memory together.
    """

    def __init__(self, ensemble: Ensemble, overrides: Sequence[str], clock: Clock) -> None:
        self._ensemble = ensemble
        self._clock = clock
        warm_up_workers(ensemble)
        costs = costs_of(ensemble.members)
        self.placement = placement_of_all(ensemble, costs)
        # Between passes each process keeps its memory for activations, so the models share one budget.
        tokens = token_budget(ensemble.settings.tokens_per_batch, gpu=self.placement.gpu)
        self.budget = max(1, tokens // len(ensemble.members))
        self.models = [
            ResidentModel(member, cost, self.placement, overrides, self.budget, clock)
            for member, cost in zip(ensemble.members, costs, strict=True)
        ]
        # In the background: Kaggle expects `serve()` within 15 minutes, and hashing 18 GB takes minutes.
        pool = ThreadPoolExecutor(1)
        self._verifications = [pool.submit(verify_files, member.bundle) for member in ensemble.members]
        pool.shutdown(wait=False)
        self._jobs_submitted = 0

    def close(self) -> None:
        """Terminate the workers."""
        for model in self.models:
            model.pool.close()

    def wait_until_loaded(self, end: float) -> None:
        """Wait until all bundles are verified and all models loaded, or until the clock time `end`; at once later on.

        Raises:
            BundleError: a file of a bundle was changed.
        """
        if not self._verifications:
            return
        for verification in self._verifications:
            verification.result()
        self._verifications = []
        for model in self.models:
            while not model.is_settled and self._clock() < end:
                model.wait(TICK)

    def encode(self, rows: pl.DataFrame, columns: Mapping[str, str | None] | None = None) -> list[SequenceIndex]:
        """Encode a batch for each model; models with the same recipe share the encoding.

        Args:
            rows: with a column for each field of the task.
            columns: how they are called; None: as `data.test.columns` of each model says.

        Raises:
            DataError: a column is missing.
        """
        by_recipe: dict[str, tuple[Sequence[tuple[Any, ...]], SequenceIndex]] = {}
        for model in self.models:
            if model.recipe not in by_recipe:
                encoded = encode_rows(model.member.bundle, rows, columns)
                by_recipe[model.recipe] = encoded, model.approach.index(encoded)
            model.encoded[:] = by_recipe[model.recipe][0]
        return [by_recipe[model.recipe][1] for model in self.models]

    def score(self, inputs: Sequence[SequenceIndex], *, swap: str, stop: float = float("inf")) -> PredictionResult:
        """Score the batch that was encoded last, in the orders of `swap`, until the clock time `stop`.

        Raises:
            PairclfError: no model can be loaded.
        """
        planned = [model.planned_model(index) for model, index in zip(self.models, inputs, strict=True)]
        pool = BatchPool(self.models, self._jobs_submitted)
        loop = PredictionLoop(
            planned,
            self._ensemble.task,
            self._ensemble,
            pool=pool,
            clock=self._clock,
            swap=swap,
            budget=self.budget,
            stop=stop,
        )
        try:
            result = loop.run(tick=TICK)
        finally:
            self._jobs_submitted = pool.next_number
        for model, throughput in zip(self.models, loop.planner.throughput_by_model, strict=True):
            if throughput.is_fitted:
                model.speed, model.is_measured = throughput.speed, True
        return result
