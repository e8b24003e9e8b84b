"""A crew and a clock that are simulated: `forecast` conducts a run on them that nobody has to wait for."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence

import numpy as np

from pairclf.inference.agenda import Part
from pairclf.inference.backlog import Backlog, Load
from pairclf.inference.work import Event, Ready, Scored, Work


class SimulatedClock:
    """Stands still until the crew moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SimulatedCrew:
    """Workers that take the time that operations take at a speed, and score at random.

    Args:
        parts: the members; their `speed` and `load` are what the workers really have.
        clock: is moved by `wait`.
        workers: how many.
        overhead: seconds of each forward pass besides its operations.
        layout: that workers choose.
        classes: C.
        seed: of the scores.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        clock: SimulatedClock,
        *,
        workers: int,
        overhead: float,
        layout: str,
        classes: int,
        seed: int = 0,
    ) -> None:
        self.parts = parts
        self.clock = clock
        self.count = workers
        self.overhead = overhead
        self.layout = layout
        self.classes = classes
        self.random = np.random.default_rng(seed)
        self.member = -1
        self.loads = [Backlog(part.inputs, (0, 1)) for part in parts]
        for backlog in self.loads:
            backlog.layout = layout
        self._numbers = 0
        self._free: set[int] = set()
        self._queue: deque[Work] = deque()
        self._events: list[tuple[float, int, Event]] = []
        self._pushed = 0

    def load(self, member: int) -> list[int]:
        self.close()
        self.member = member
        return [self._start() for _ in range(self.count)]

    def _start(self) -> int:
        self._numbers += 1
        seconds = self.seconds_to_load()
        self._push(seconds, Ready(self._numbers, seconds, self.layout, "simulated"))
        return self._numbers

    def restart(self, worker: int) -> int:
        return self._start()

    def submit(self, work: Work) -> None:
        self._queue.append(work)
        self._assign()

    def wait(self, seconds: float) -> list[Event]:
        until = self.clock.now + seconds
        if not self._events or self._events[0][0] > until:
            self.clock.now = until
            return []
        at, _, event = heapq.heappop(self._events)
        self.clock.now = max(self.clock.now, at)
        if self.lives_on(event):
            self._free.add(event.worker)
        self._assign()
        return [event]

    def close(self) -> None:
        self._free, self._events = set(), []
        self._queue.clear()

    def _assign(self) -> None:
        while self._free and self._queue:
            worker, work = self._free.pop(), self._queue.popleft()
            seconds, event = self.do(worker, work)
            self._push(seconds, event)

    def _push(self, seconds: float, event: Event) -> None:
        self._pushed += 1  # breaks ties, and keeps the order of what happens at once
        heapq.heappush(self._events, (self.clock.now + seconds, self._pushed, event))

    # --- what a test may have otherwise ------------------------------------------------------------------------------

    def seconds_to_load(self) -> float:
        return self.parts[self.member].load

    def lives_on(self, event: Event) -> bool:
        """Whether the worker that it happened to takes more work."""
        return True

    def do(self, worker: int, work: Work) -> tuple[float, Event]:
        """The seconds that a worker takes for its work, and what comes of it."""
        seconds = self.seconds(work.member, self.loads[work.member].load_of(work.pieces))
        return seconds, Scored(worker, work, self.random.normal(size=(len(work.sequences), self.classes)), 0, seconds)

    def seconds(self, member: int, load: Load) -> float:
        """That a forward pass takes."""
        part = self.parts[member]
        return self.overhead + (part.shape.linear * load.tokens + part.shape.quadratic * load.squares) / part.speed
