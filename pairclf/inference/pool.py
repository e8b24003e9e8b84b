"""The worker pool: processes that each load the same model and take jobs from one queue."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from multiprocessing import connection, forkserver, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from tempfile import gettempdir
from threading import Thread
from types import ModuleType
from typing import Any, TypeVar

from pairclf.approaches.protocol import Assignment, Loader
from pairclf.inference.deadline import format_duration
from pairclf.inference.messages import Clock, Event, Job, WorkerFailure, WorkerReady
from pairclf.inference.worker import load_bundle, main, max_in_flight
from pairclf.inputs.sequences import Item, LargestPass
from pairclf.signals import work_for_parent
from pairclf.trust import granted

MAX_SOCKET_FOLDER = 107 - len("/pymp-12345678/listener-12345678")
"""Characters of the longest temporary folder below which a socket's path is legal."""

PRELOADING = "pairclf.inference.preloading"
"""The first module that the fork server imports."""

LOAD_LIMIT = 3600.0
"""Seconds after which a worker that has not loaded its model is hung: 18 GB take minutes from a network disk."""

T = TypeVar("T")

_GRACE = 5.0  # seconds that we wait for a process that was killed, or that closed its channel


@dataclass(frozen=True, slots=True)
class WorkerModel:
    """A model, as workers need it.

    Attributes:
        module: module of its approach, which workers import.
        bundle_folder: folder of a bundle whose hashes have been verified.
        base: folder of the base model on this machine, or None.
        overrides: `key=value`.
        encoded: encoded sequences, by row, then order.
        largest: the largest forward pass of the run.
        pointwise: as `Assignment.pointwise`.
    """

    module: str
    bundle_folder: Path
    base: Path | None
    overrides: tuple[str, ...]
    encoded: Sequence[tuple[Any, ...]]
    largest: LargestPass
    pointwise: bool = False


@dataclass(slots=True, eq=False)
class _Worker:
    """A worker process, as the parent sees it.

    Attributes:
        since: when it was heard of last, or got something to do while it had nothing.
        hung: why it was killed, if it did not answer in time.
        has_reported_failure: it has sent the failure that it ends for.
        jobs: those it was sent, in the order in which it starts them.
    """

    number: int
    member: int
    devices: tuple[str, ...]
    process: BaseProcess
    channel: Connection
    began: float
    since: float = 0.0
    loading: bool = False
    ready: bool = False
    hung: str = ""
    has_reported_failure: bool = False
    jobs: deque[Job] = field(default_factory=deque)
    outbox: SimpleQueue[object] = field(default_factory=SimpleQueue)

    @property
    def free_slots(self) -> int:
        """How many more jobs it takes: one to run, and one queued, so that it never waits for the parent."""
        return 2 - len(self.jobs) if self.ready else 0

    @property
    def limit(self) -> float:
        """Seconds that it may take to answer."""
        if self.jobs:
            return self.jobs[0].limit
        return LOAD_LIMIT if self.loading and not self.ready else float("inf")

    def __str__(self) -> str:
        return f"worker {self.number} on {' + '.join(self.devices)}"


def warm_up(modules: Iterable[str]) -> bool:
    """Start the fork server, from which CPU workers are forked in milliseconds with their modules imported.

    It imports the modules in the background. Does nothing if the server is running.

    Returns:
        Whether there is a server. Its socket lies in the temporary folder, and a socket's path must be short
        (`man 7 unix`).
    """
    if len(gettempdir()) > MAX_SOCKET_FOLDER:
        return False
    get_context("forkserver").set_forkserver_preload([PRELOADING, main.__module__, *modules])
    forkserver.ensure_running()
    return True


def forked(function: Callable[..., T], *arguments: object) -> T:
    """The result of a function in a process forked by the server, whose modules this process need not import.

    Args:
        function: one that a new process can import.
        arguments: what it is called with; they are pickled.

    Raises:
        BrokenProcessPool: the process was killed.
    """
    with ProcessPoolExecutor(1, get_context("forkserver"), work_for_parent) as pool:
        with _without_script():
            result = pool.submit(function, *arguments)
        return result.result()


class ProcessPool:
    """A `messages.WorkerPool` of processes.

    The queue lies in the parent. A worker is sent one job to run and one more, so that its death affects few jobs: the
    jobs that it had started are reported as failed, the others return to the queue.

    Args:
        models: the ensemble's models.
        groups: the devices of each worker; the layers are split over several devices.
        load: loads a model in the worker; a function that a new process can import.
        clock: measures loads and passes; a callable that can be pickled, as it is sent to the workers.
    """

    def __init__(
        self,
        models: Sequence[WorkerModel],
        groups: Sequence[tuple[str, ...]],
        *,
        load: Loader = load_bundle,
        clock: Clock = time.monotonic,
    ) -> None:
        self._models = models
        self._groups = groups
        self._load = load
        self._clock = clock
        self._numbers = count()
        self._workers: dict[int, _Worker] = {}
        self._terminating: list[BaseProcess] = []  # killed processes that have not freed their memory yet
        self._replacements: dict[int, int] = {}
        self._launched: dict[int, tuple[int, tuple[str, ...]]] = {}
        self._queue: deque[Job] = deque()
        self._latest_number = self._dropped_up_to = -1  # job numbers
        # CUDA does not survive a fork, and a library may ask for it as it is imported.
        cuda = any(device.startswith("cuda") for group in groups for device in group)
        forks = not cuda and warm_up({model.module for model in models})
        self._context = get_context("forkserver" if forks else "spawn")
        atexit.register(self.close)  # multiprocessing would wait at exit for workers that wait for work

    def load(self, member: int) -> Sequence[int]:
        """Terminate the workers, drop their jobs, and start workers for `member`; returns their numbers.

        New workers import their modules meanwhile, and load the model once the old ones have freed their memory.
        """
        self._terminate_all()
        self._queue.clear()
        return [self._start_worker(member, devices) for devices in self._groups]

    def restart(self, worker: int) -> int:
        """Replace a worker; returns the new worker's number, the same at each call for the same worker."""
        if worker not in self._replacements:
            if worker in self._workers:
                self._terminate(self._workers[worker])
            self._replacements[worker] = self._start_worker(*self._launched[worker])
        return self._replacements[worker]

    def submit(self, job: Job) -> None:
        """Queue a job for the first free worker."""
        self._latest_number = max(self._latest_number, job.number)
        self._queue.append(job)
        self._dispatch()

    def wait(self, seconds: float) -> list[Event]:
        """Wait for events: returns at the first ones, or an empty list after `seconds`."""
        end = time.monotonic() + seconds
        while True:
            self._send_assignments()
            channels = {worker.channel: worker for worker in self._workers.values()}
            sentinels = {process.sentinel: process for process in self._terminating}
            ready = connection.wait([*channels, *sentinels], timeout=max(0.0, end - time.monotonic()))
            self._kill_hung(channels[source] for source in channels.keys() - set(ready))
            events: list[Event] = []
            for source in ready:
                if isinstance(source, int):
                    sentinels[source].join()
                    self._terminating.remove(sentinels[source])
                    sentinels[source].close()
                elif isinstance(source, Connection):
                    events += self._receive(channels[source])
            self._dispatch()
            if events or time.monotonic() >= end:
                return events

    def drop_queue(self) -> None:
        """Drop all queued jobs. Jobs that were sent to a worker are not queued again if it dies. Job numbers must
        increase."""
        self._dropped_up_to = self._latest_number
        self._queue.clear()

    def close(self) -> None:
        """Terminate all workers at once."""
        self._terminate_all()
        self._queue.clear()
        for process in self._terminating:
            process.join(
                _GRACE
            )  # with a limit: a process that hangs in a driver can't be killed, and must not block the run
        self._terminating.clear()
        atexit.unregister(self.close)

    def _start_worker(self, member: int, devices: tuple[str, ...]) -> int:
        number = next(self._numbers)
        ours, theirs = self._context.Pipe()
        process = self._context.Process(  # type: ignore[attr-defined]
            target=main, args=(number, theirs, self._load, self._clock), name=f"pairclf worker {number}", daemon=True
        )
        with _without_script():
            process.start()
        theirs.close()  # so that our end reports EOF when the worker ends
        worker = _Worker(number, member, devices, process, ours, self._clock())
        Thread(target=_send_messages, args=(worker,), daemon=True).start()
        self._workers[number] = worker
        self._launched[number] = (member, devices)
        return number

    def _send_assignments(self) -> None:
        """Let new workers load, once all terminated workers have freed their memory."""
        if self._terminating:
            return
        for worker in self._workers.values():
            if not worker.loading:
                worker.loading, worker.since = True, self._clock()
                model = self._models[worker.member]
                threads = _threads(len(self._groups))
                beside = sum(group[0] == worker.devices[0] for group in self._groups)
                assignment = Assignment(
                    bundle=model.bundle_folder,
                    base=model.base,
                    overrides=model.overrides,
                    devices=worker.devices,
                    threads=threads,
                    largest=model.largest,
                    beside=beside,
                    pointwise=model.pointwise,
                    trust=granted(),
                )
                _send(worker, assignment)

    def _kill_hung(self, silent: Iterable[_Worker]) -> None:
        """Kill workers that have not answered in time; their deaths are then reported as any other."""
        for worker in silent:
            seconds = self._clock() - worker.since
            if seconds > worker.limit and not worker.hung:
                worker.hung = f"hung: it did not answer for {format_duration(seconds)}, and was ended"
                worker.process.kill()

    def _dispatch(self) -> None:
        """Send queued jobs: first to idle workers, then one more to each."""
        while self._queue:
            worker = max(self._workers.values(), key=lambda candidate: candidate.free_slots, default=None)
            if worker is None or worker.free_slots <= 0:
                return
            job = self._queue.popleft()
            worker.since = worker.since if worker.jobs else self._clock()
            worker.jobs.append(job)
            _send(worker, (job, _items(job, self._models[job.member].encoded)))

    def _receive(self, worker: _Worker) -> list[Event]:
        try:
            event: Event = worker.channel.recv()
        except (EOFError, OSError):
            return self._reap(worker)
        worker.since = self._clock()
        if isinstance(event, WorkerReady):
            worker.ready = True
            return [event._replace(seconds=self._clock() - worker.began)]
        if event.job is not None:
            worker.jobs = deque(job for job in worker.jobs if job.number != event.job.number)
        if isinstance(event, WorkerFailure) and (event.job is None or event.kind == "died"):
            worker.has_reported_failure = True
        return [event]

    def _reap(self, worker: _Worker) -> list[Event]:
        """Handle a worker that ended: report the jobs that it had started, and return the others to the queue."""
        begun: list[Job | None] = [worker.jobs.popleft() for _ in range(max_in_flight(worker.devices)) if worker.jobs]
        self._queue.extendleft(job for job in reversed(worker.jobs) if job.number > self._dropped_up_to)
        worker.process.join(_GRACE)
        what = f"{worker} {worker.hung or _exit_reason(worker.process.exitcode)}"
        self._terminate(worker)
        if not begun and worker.has_reported_failure:
            return []
        return [WorkerFailure(worker.number, job, "died", what) for job in begun or (None,)]

    def _terminate(self, worker: _Worker) -> None:
        """Kill a worker: it has no state to be saved."""
        self._workers.pop(worker.number, None)
        worker.process.kill()
        worker.outbox.put(None)
        self._terminating.append(worker.process)

    def _terminate_all(self) -> None:
        for worker in list(self._workers.values()):
            self._terminate(worker)


@contextmanager
def _without_script() -> Iterator[None]:
    """Processes that are started within do not import the user's script.

    multiprocessing imports the module `__main__` in each new process, so that a script without
    `if __name__ == "__main__"` would run again in every worker. A worker needs nothing of it.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _items(job: Job, encoded: Sequence[tuple[Any, ...]]) -> list[Item]:
    """The job's sequences. Each row is looked up once, as it may have to be read from disk and assembled."""
    rows = [(row, orders, encoded[row]) for row, orders in job.row_orders]
    return [Item(row, order, by_order[order].ids) for row, orders, by_order in rows for order in orders]


def _send(worker: _Worker, message: object) -> None:
    worker.outbox.put(message)


def _send_messages(worker: _Worker) -> None:
    """Send messages, in a thread: sending blocks when a worker hangs, and the parent must keep its deadline."""
    for message in iter(worker.outbox.get, None):
        with suppress(OSError):  # it has died; `wait` sees that its channel is closed
            worker.channel.send(message)
    worker.channel.close()


def _threads(workers: int) -> int:
    """Threads of each worker; 0: as the environment says."""
    if "OMP_NUM_THREADS" in os.environ:
        return 0
    return max(1, len(os.sched_getaffinity(0)) // workers)


def _exit_reason(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    reason = ", as the system does where memory runs out" if code == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{reason}"
