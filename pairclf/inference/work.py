"""What goes to a worker, what comes back, and the two things that a run is given from outside: workers and a clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

Clock = Callable[[], float]
"""Seconds from any start on, never running backwards: `time.monotonic`, or a simulated one."""


class Piece(NamedTuple):
    """A row, by its index in the table, in the orders (`task.AB`, `task.BA`) that go through the model together."""

    row: int
    orders: tuple[int, ...]


class Work(NamedTuple):
    """One forward pass: pieces of a member's rows.

    Attributes:
        number: counts up over the run.
        member: index of the model.
        pieces: what to score; a sequence stands for each order of each piece, in this order.
    """

    number: int
    member: int
    pieces: tuple[Piece, ...]

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """`(row, order)` of each sequence: the order of the logits that come back."""
        return [(piece.row, order) for piece in self.pieces for order in piece.orders]


class Ready(NamedTuple):
    """A worker has loaded its model.

    Attributes:
        worker: who.
        seconds: that it took.
        layout: how rows will lie in its batches.
        what: device, layout and why, for people.
        budget: tokens of a forward pass that its memory suffices for; None: those asked for, or nobody knows.
    """

    worker: int
    seconds: float
    layout: str
    what: str
    budget: int | None = None


class Scored(NamedTuple):
    """A piece of work came back.

    Attributes:
        worker: who did it.
        work: what was asked.
        logits: `(R, C)`, a row for each of `work.sequences`; NaN where they are not finite in float32 either.
        rescued: sequences whose logits were not finite at first, and are in float32.
        seconds: that the worker took.
    """

    worker: int
    work: Work
    logits: Floats
    rescued: int
    seconds: float


class Failed(NamedTuple):
    """A worker could not do its work, or load.

    Attributes:
        worker: who.
        work: what it was given; None: it was loading.
        kind: memory (it ran out; the worker lives), error (an exception; the worker lives), died (the worker is gone).
        what: for people.
        error: what it raised, where that is a `PairclfError` (while loading): the run ends with it.
    """

    worker: int
    work: Work | None
    kind: Literal["memory", "error", "died"]
    what: str
    error: Exception | None = None


Event = Ready | Scored | Failed


class Crew(Protocol):
    """The workers of a run, all on one member at a time. They never raise for what a worker did: that is an event."""

    def load(self, member: int) -> Sequence[int]:
        """Let the present workers end, and start those for another member; returns their numbers, all of them new.

        It does not wait: `Ready` (or `Failed`) will come of each.
        """

    def restart(self, worker: int) -> int:
        """Start another worker in the place of one that died; returns its number."""

    def submit(self, work: Work) -> None:
        """Give work to be done by whichever worker is free first; more than the workers can take is a queue."""

    def wait(self, seconds: float) -> list[Event]:
        """What happened; returns at the first event, or empty-handed after `seconds`."""

    def close(self) -> None:
        """End all workers now, whatever they are doing."""
