"""Messages to and from workers, and the two injected dependencies of a run: worker pool and clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from pairclf.scores.metrics import Floats

Clock = Callable[[], float]
"""Monotonic seconds from any origin: `time.monotonic`, or a simulated clock."""


class RowOrders(NamedTuple):
    """A row's index in the table, and the orders (`task.AB`, `task.BA`) that are scored in one batch."""

    row: int
    orders: tuple[int, ...]


class Job(NamedTuple):
    """One forward pass over rows of one model.

    Attributes:
        number: counts up over the run.
        member: index of the model.
        row_orders: rows and orders to score.
        limit: seconds after which a worker that has not answered is hung.
    """

    number: int
    member: int
    row_orders: tuple[RowOrders, ...]
    limit: float = float("inf")

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """`(row, order)` of each sequence, in the order in which its logits are returned."""
        return [(row, order) for row, orders in self.row_orders for order in orders]


class WorkerReady(NamedTuple):
    """A worker has loaded its model.

    Attributes:
        worker: its number.
        seconds: load time.
        layout: layout of its batches.
        what: device, layout and reasons, for messages.
        budget: token budget that fits its memory; None: the requested budget fits, or this is unknown.
    """

    worker: int
    seconds: float
    layout: str
    what: str
    budget: int | None = None


class BatchScored(NamedTuple):
    """A worker has finished a job.

    Attributes:
        worker: its number.
        job: the job.
        logits: `(R, C)`, one row for each of `job.sequences`; NaN where even float32 gives no finite logits.
        rescored: sequences whose logits overflowed, and were computed again in float32.
        seconds: of the worker for this job.
    """

    worker: int
    job: Job
    logits: Floats
    rescored: int
    seconds: float


class WorkerFailure(NamedTuple):
    """A worker failed in a job, or while loading.

    Attributes:
        worker: its number.
        job: the job; None: the worker was loading.
        kind: memory (out of memory; the worker lives), error (an exception; the worker lives), died (its process
            ended).
        what: for messages.
        error: the exception, if it is a `PairclfError`; raised if no model can be loaded.
    """

    worker: int
    job: Job | None
    kind: Literal["memory", "error", "died"]
    what: str
    error: Exception | None = None


Event = WorkerReady | BatchScored | WorkerFailure


class WorkerPool(Protocol):
    """Workers that all have the same model loaded. Worker failures are returned as events, never raised."""

    def load(self, member: int) -> Sequence[int]:
        """Terminate the workers and start others that load this model; returns their new numbers.

        It does not wait: each worker sends `WorkerReady` or `WorkerFailure`.
        """

    def restart(self, worker: int) -> int:
        """Replace a worker that died; returns the new worker's number."""

    def submit(self, job: Job) -> None:
        """Queue a job for the first free worker."""

    def wait(self, seconds: float) -> list[Event]:
        """Wait for events: returns at the first ones, or an empty list after `seconds`."""

    def close(self) -> None:
        """Terminate all workers at once."""
