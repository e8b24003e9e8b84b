"""Models that stay loaded in their workers between the batches of an inference server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pairclf.approaches import approach_of
from pairclf.console import counted
from pairclf.errors import ModelError
from pairclf.hardware import HEADROOM, process_memory
from pairclf.inference.devices import Placement
from pairclf.inference.ensemble import Ensemble, EnsembleMember
from pairclf.inference.loop import MAX_DEATHS
from pairclf.inference.messages import BatchScored, Clock, Event, Job, WorkerFailure, WorkerReady
from pairclf.inference.pending import PendingSequences, Workload
from pairclf.inference.planner import PlannedModel
from pairclf.inference.pool import ProcessPool
from pairclf.inference.prepare import costs_of, devices_of, placement_of, planned_model_of, worker_model_of
from pairclf.inference.throughput import ThroughputModel
from pairclf.inputs.sequences import LargestPass, SequenceIndex


def placement_of_all(ensemble: Ensemble) -> Placement:
    """Devices that hold all models at once.

    Raises:
        ModelError: there are none.
    """
    size = sum(cost.bytes for cost in costs_of(ensemble.members))
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


class ResidentModel:
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
        self._cost = self.approach.cost(member.bundle, member.base)
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
