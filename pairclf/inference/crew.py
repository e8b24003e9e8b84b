"""The workers of a run: processes that load one model each and draw from one queue."""

from __future__ import annotations

import atexit
import os
import signal
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from multiprocessing import connection, forkserver, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from tempfile import gettempdir
from threading import Thread

from pairclf.inference import worker as worker_module
from pairclf.inference.memory import Largest
from pairclf.inference.work import Clock, Event, Failed, Ready, Work
from pairclf.inference.worker import Assignment, Loader, load_bundle, main, under_way
from pairclf.inputs.render import Encoded
from pairclf.model.batch import Item
from pairclf.trust import granted

LONGEST = 107 - len("/pymp-12345678/listener-12345678")
"""Characters of a temporary folder that a socket's path has room for."""

_GRACE = 5.0  # seconds in which a worker that was killed, or whose channel closed, must have ended


@dataclass(frozen=True, slots=True)
class Model:
    """A member of the ensemble, as workers need it.

    Attributes:
        bundle_folder: a bundle whose hashes have been compared.
        base: folder of the base model on this machine, or None.
        overrides: `key=value`.
        encoded: by row, then order.
        largest: the largest forward pass that there will be.
    """

    bundle_folder: Path
    base: Path | None
    overrides: tuple[str, ...]
    encoded: Sequence[tuple[Encoded, ...]]
    largest: Largest


@dataclass(slots=True, eq=False)
class _Worker:
    """A process as the parent sees it; `held`: work that it was given, in the order in which it begins it."""

    number: int
    member: int
    devices: tuple[str, ...]
    process: BaseProcess
    channel: Connection
    began: float
    loading: bool = False
    ready: bool = False
    excused: bool = False  # it has said itself why it ends
    held: deque[Work] = field(default_factory=deque)
    outbox: SimpleQueue[object] = field(default_factory=SimpleQueue)

    @property
    def room(self) -> int:
        """How much more work it takes: what it is at, and one to follow on at once."""
        return 2 - len(self.held) if self.ready else 0

    def __str__(self) -> str:
        return f"worker {self.number} on {' + '.join(self.devices)}"


def warm_up() -> bool:
    """Start the server that forks workers on CPUs in milliseconds, once it has imported all that they need.

    It imports while the caller does other things; nothing happens if it is there.

    Returns:
        Whether it can be had: its socket lies in the temporary folder, and a socket's path is short (`man 7 unix`).
    """
    if len(gettempdir()) > LONGEST:
        return False
    get_context("forkserver").set_forkserver_preload([worker_module.__name__])
    forkserver.ensure_running()
    return True


class ProcessCrew:
    """A `work.Crew` of processes.

    The queue is here: a worker is given what it computes and one piece more, so that little hangs on its life. When it
    dies, what it had begun is reported, and what it had not begun goes to the next.

    Args:
        models: the members.
        groups: the devices of each worker; more than one: the layers lie over them.
        load: what a worker makes of its assignment; a function that a new process can import.
        clock: by which loads and passes are timed; it too is sent to a new process.
    """

    def __init__(
        self,
        models: Sequence[Model],
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
        self._leaving: list[BaseProcess] = []  # killed; their memory is not back yet
        self._successor: dict[int, int] = {}
        self._former: dict[int, tuple[int, tuple[str, ...]]] = {}
        self._queue: deque[Work] = deque()
        self._latest = self._forgotten = -1  # numbers of works
        # CUDA does not survive a fork, and a library may ask for it as it is imported.
        cuda = any(device.startswith("cuda") for group in groups for device in group)
        forks = not cuda and warm_up()
        self._context = get_context("forkserver" if forks else "spawn")
        atexit.register(self.close)  # multiprocessing would wait at exit for workers that wait for work

    def load(self, member: int) -> Sequence[int]:
        """End the present workers, their work undone, and start others for `member`; returns their numbers.

        The others import while the former end, and load once the memory of these is back.
        """
        self._dismiss()
        self._queue.clear()
        return [self._start(member, devices) for devices in self._groups]

    def restart(self, worker: int) -> int:
        """Start another worker in the place of one; returns its number. Asked again, it is still the same."""
        if worker not in self._successor:
            if worker in self._workers:
                self._end(self._workers[worker])
            self._successor[worker] = self._start(*self._former[worker])
        return self._successor[worker]

    def submit(self, work: Work) -> None:
        """Give work to whichever worker is free first."""
        self._latest = max(self._latest, work.number)
        self._queue.append(work)
        self._hand_out()

    def wait(self, seconds: float) -> list[Event]:
        """What happened; returns at the first event, or empty-handed after `seconds`."""
        until = time.monotonic() + seconds
        while True:
            self._assign()
            channels = {one.channel: one for one in self._workers.values()}
            sentinels = {one.sentinel: one for one in self._leaving}
            found = connection.wait([*channels, *sentinels], timeout=max(0.0, until - time.monotonic()))
            events: list[Event] = []
            for one in found:
                if isinstance(one, int):
                    sentinels[one].join()
                    self._leaving.remove(sentinels[one])
                    sentinels[one].close()
                elif isinstance(one, Connection):
                    events += self._hear(channels[one])
            self._hand_out()
            if events or time.monotonic() >= until:
                return events

    def forget(self) -> None:
        """Nobody wants the work that was submitted so far any more: what no worker holds is not done, nor after one
        dies that held it. The numbers of works must count up."""
        self._forgotten = self._latest
        self._queue.clear()

    def close(self) -> None:
        """End all workers now, whatever they are doing."""
        self._dismiss()
        self._queue.clear()
        for process in self._leaving:
            process.join(_GRACE)  # a process that hangs in a driver can't be killed, and must not keep the run
        self._leaving.clear()
        atexit.unregister(self.close)

    def _start(self, member: int, devices: tuple[str, ...]) -> int:
        number = next(self._numbers)
        ours, theirs = self._context.Pipe()
        process = self._context.Process(  # type: ignore[attr-defined]
            target=main, args=(number, theirs, self._load, self._clock), name=f"pairclf worker {number}", daemon=True
        )
        process.start()
        theirs.close()  # so that ours ends when the worker does
        worker = _Worker(number, member, devices, process, ours, self._clock())
        Thread(target=_post, args=(worker,), daemon=True).start()
        self._workers[number] = worker
        self._former[number] = (member, devices)
        return number

    def _assign(self) -> None:
        """Let new workers load, once the memory of the former ones is back."""
        if self._leaving:
            return
        for worker in self._workers.values():
            if not worker.loading:
                worker.loading = True
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
                    trust=granted(),
                )
                _tell(worker, assignment)

    def _hand_out(self) -> None:
        """Work for those who have none, and then one to follow on."""
        while self._queue:
            worker = max(self._workers.values(), key=lambda one: one.room, default=None)
            if worker is None or worker.room <= 0:
                return
            work = self._queue.popleft()
            worker.held.append(work)
            _tell(worker, (work, _items(work, self._models[work.member].encoded)))

    def _hear(self, worker: _Worker) -> list[Event]:
        try:
            event: Event = worker.channel.recv()
        except (EOFError, OSError):
            return self._bury(worker)
        if isinstance(event, Ready):
            worker.ready = True
            return [event._replace(seconds=self._clock() - worker.began)]
        if event.work is not None:
            worker.held = deque(work for work in worker.held if work.number != event.work.number)
        if isinstance(event, Failed) and (event.work is None or event.kind == "died"):
            worker.excused = True
        return [event]

    def _bury(self, worker: _Worker) -> list[Event]:
        """Report what a worker that ended had begun; what it had not goes back to where it came from."""
        begun: list[Work | None] = [worker.held.popleft() for _ in range(under_way(worker.devices)) if worker.held]
        self._queue.extendleft(work for work in reversed(worker.held) if work.number > self._forgotten)
        worker.process.join(_GRACE)
        what = f"{worker} {_how(worker.process.exitcode)}"
        self._end(worker)
        if not begun and worker.excused:
            return []
        return [Failed(worker.number, work, "died", what) for work in begun or (None,)]

    def _end(self, worker: _Worker) -> None:
        """Kill it: it holds nothing that would have to be saved."""
        self._workers.pop(worker.number, None)
        worker.process.kill()
        worker.outbox.put(None)
        self._leaving.append(worker.process)

    def _dismiss(self) -> None:
        for worker in list(self._workers.values()):
            self._end(worker)


def _items(work: Work, encoded: Sequence[tuple[Encoded, ...]]) -> list[Item]:
    """The sequences of `work`; a row is looked up once, as it may have to be read from disk and put together."""
    shown = [(piece, encoded[piece.row]) for piece in work.pieces]
    return [Item(piece.row, order, orders[order].ids) for piece, orders in shown for order in piece.orders]


def _tell(worker: _Worker, message: object) -> None:
    worker.outbox.put(message)


def _post(worker: _Worker) -> None:
    """Send what is told, in a thread: a worker that hangs does not listen, and no deadline is to wait for it."""
    for message in iter(worker.outbox.get, None):
        with suppress(OSError):  # it has died, and its end of the channel says so to whoever waits
            worker.channel.send(message)
    worker.channel.close()


def _threads(workers: int) -> int:
    """Threads of each worker, 0 where the environment says how many."""
    if "OMP_NUM_THREADS" in os.environ:
        return 0
    return max(1, len(os.sched_getaffinity(0)) // workers)


def _how(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    reason = ", as the system does where memory runs out" if code == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{reason}"
