"""A simulated worker pool and clock, on which `forecast` runs the prediction loop in seconds."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence

import numpy as np

from pairclf.inference.messages import BatchScored, Event, Job, WorkerReady
from pairclf.inference.pending import PendingSequences, Workload
from pairclf.inference.planner import PlannedModel


class SimulatedClock:
    """A clock that only the pool advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SimulatedPool:
    """Workers whose passes take operations / speed seconds, and whose logits are random.

    Args:
        models: the models; their `speed` and `load_seconds` are the true ones of the simulated workers.
        clock: advanced by `wait`.
        workers: number of workers.
        overhead: seconds of each forward pass besides its operations.
        layout: batch layout of the workers.
        classes: C.
        seed: of the logits.
    """

    def __init__(
        self,
        models: Sequence[PlannedModel],
        clock: SimulatedClock,
        *,
        workers: int,
        overhead: float,
        layout: str,
        classes: int,
        seed: int = 0,
    ) -> None:
        self.models = models
        self.clock = clock
        self.count = workers
        self.overhead = overhead
        self.layout = layout
        self.classes = classes
        self.random = np.random.default_rng(seed)
        self.member = -1
        self.pending = [PendingSequences(model.inputs, (0, 1)) for model in models]
        for pending in self.pending:
            pending.layout = layout
        self._numbers = 0
        self._free: set[int] = set()
        self._queue: deque[Job] = deque()
        self._events: list[tuple[float, int, Event]] = []
        self._pushed = 0

    def load(self, member: int) -> list[int]:
        self.close()
        self.member = member
        return [self._start() for _ in range(self.count)]

    def _start(self) -> int:
        self._numbers += 1
        seconds = self.seconds_to_load()
        self._push(seconds, WorkerReady(self._numbers, seconds, self.layout, "simulated"))
        return self._numbers

    def restart(self, worker: int) -> int:
        return self._start()

    def submit(self, job: Job) -> None:
        self._queue.append(job)
        self._assign()

    def wait(self, seconds: float) -> list[Event]:
        end = self.clock.now + seconds
        if not self._events or self._events[0][0] > end:
            self.clock.now = end
            return []
        event_time, _, event = heapq.heappop(self._events)
        self.clock.now = max(self.clock.now, event_time)
        if self.lives_on(event):
            self._free.add(event.worker)
        self._assign()
        return [event]

    def close(self) -> None:
        self._free, self._events = set(), []
        self._queue.clear()

    def _assign(self) -> None:
        while self._free and self._queue:
            worker, job = self._free.pop(), self._queue.popleft()
            seconds, event = self.do(worker, job)
            self._push(seconds, event)

    def _push(self, seconds: float, event: Event) -> None:
        self._pushed += 1  # breaks ties in the heap: events at the same time keep their order
        heapq.heappush(self._events, (self.clock.now + seconds, self._pushed, event))

    # --- what a test may override ------------------------------------------------------------------------------------

    def seconds_to_load(self) -> float:
        return self.models[self.member].load_seconds

    def lives_on(self, event: Event) -> bool:
        """Whether the event's worker takes more jobs."""
        return True

    def do(self, worker: int, job: Job) -> tuple[float, Event]:
        """A worker's seconds for a job, and the resulting event."""
        seconds = self.seconds(job.member, self.pending[job.member].workload_of(job.row_orders))
        return seconds, BatchScored(
            worker, job, self.random.normal(size=(len(job.sequences), self.classes)), 0, seconds
        )

    def seconds(self, member: int, workload: Workload) -> float:
        """Seconds of a forward pass."""
        model = self.models[member]
        return (
            self.overhead
            + (model.cost.linear * workload.tokens + model.cost.quadratic * workload.squares) / model.speed
        )
