"""`--processes N`: so many workers on this machine, started, watched and ended together.

The workers are this command again, with the environment that torch.distributed reads. torchrun would start them too,
but it kills them 30 s after a SIGTERM, which is less than a checkpoint may take, and shows what went wrong once a
worker. Nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType, TracebackType

from pairclf.console import console
from pairclf.dispositions import answering
from pairclf.errors import ConfigError, PairclfError

ERRORS = "PAIRCLF_ERRORS"
"""Environment variable that makes a process a worker: the folder where it leaves what its parent is to say."""

LAUNCHERS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")
"""Environment variables that torchrun or `accelerate launch` set."""

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE = 5.0
"""Seconds in which the others may say what went wrong, once a worker has failed: they can only wait for it."""

COMMAND = (sys.executable, "-m", "pairclf")

_POLL = 0.05  # seconds
_TAIL = 30  # lines
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class WorkerError(PairclfError):
    """What a worker raised, as it said it, or how it ended; the exit code is the worker's."""

    def __init__(self, what: str, *, exit_code: int, remedy: str | None = None) -> None:
        super().__init__(what, remedy=remedy)
        self.exit_code = exit_code


def is_worker() -> bool:
    return ERRORS in os.environ


def become_worker() -> None:
    """Be ended with the parent, and leave a traceback to it: the first one of all workers is the one worth reading."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def leave(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        _note("traceback").write_text("".join(traceback.format_exception(kind, error, trace)), encoding="utf-8")

    sys.excepthook = leave


def leave_error(text: str) -> bool:
    """In a worker, leave an error for the parent to say, once for all; False elsewhere."""
    if is_worker():
        _note("error").write_text(text, encoding="utf-8")
    return is_worker()


def _note(kind: str) -> Path:
    return Path(os.environ[ERRORS], f"{os.environ['RANK']}.{kind}")


def run_processes(count: int, arguments: Sequence[str]) -> int:
    """Run `pairclf ARGUMENTS` in `count` processes that know of each other, and show the output of the first.

    SIGTERM, SIGINT and SIGHUP go on to the workers, which are waited for: they may be writing a checkpoint. A second
    SIGINT ends them at once. When one fails, the others are ended, and what went wrong is said once.

    Returns:
        0, or the exit code of the failure or the signal (128 and its number).

    Raises:
        ConfigError: this process was itself started by a launcher.
        WorkerError: what a worker raised, or how it ended.
    """
    if set_by := [name for name in LAUNCHERS if name in os.environ]:
        raise ConfigError(
            f"--processes {count} starts processes, and so did torchrun or accelerate launch ({set_by[0]} is set)",
            remedy="give --processes without a launcher, or the launcher without --processes",
        )
    workers: list[subprocess.Popen[bytes]] = []
    with TemporaryDirectory(prefix="pairclf-") as name, _forwarding(workers) as received, ExitStack() as opened:
        notes, port = Path(name), _free_port()
        for rank in range(count):
            workers.append(opened.enter_context(_worker(rank, count, arguments, notes=notes, port=port)))
        killed = _wait(workers, received)
        return _conclude([worker.wait() for worker in workers], killed, received, notes)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _worker(
    rank: int, count: int, arguments: Sequence[str], *, notes: Path, port: int
) -> Iterator[subprocess.Popen[bytes]]:
    """A started worker; whatever happens, it has ended afterwards. Only the first one's output is shown."""
    environment = {
        **os.environ,
        ERRORS: str(notes),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # Two processes of two threads each on two cores took ten times as long as two of one thread.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    with (notes / f"{rank}.output").open("wb") as kept:
        shown = None if rank == 0 else kept
        worker = subprocess.Popen(
            [*COMMAND, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=shown,
            stderr=shown,
            process_group=0,  # Ctrl-C reaches the parent alone, which passes it on once
        )
    try:
        yield worker
    finally:
        worker.kill()
        worker.wait()


@contextmanager
def _forwarding(workers: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass signals on to the workers meanwhile; yields those that came."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and number in received
        received.append(number)
        for worker in workers:
            worker.send_signal(signal.SIGKILL if again else number)  # does nothing to one that has ended

    with answering(FORWARDED, forward):
        yield received


def _wait(workers: Sequence[subprocess.Popen[bytes]], received: Sequence[int]) -> set[int]:
    """Wait for all workers; once one has failed, the others have `GRACE` seconds and are then killed.

    Returns:
        The ranks of those that were killed.
    """
    deadline = float("inf")
    while running := [rank for rank, worker in enumerate(workers) if worker.poll() is None]:
        if deadline == float("inf") and any(_failed(worker.returncode, received) for worker in workers):
            deadline = time.monotonic() + GRACE
        if time.monotonic() > deadline:
            for rank in running:
                workers[rank].kill()
            return set(running)
        time.sleep(_POLL)
    return set()


def _failed(code: int | None, received: Sequence[int]) -> bool:
    """Whether an exit code is neither success nor the answer to a signal that was passed on."""
    return code not in {None, 0, *(128 + number for number in received), *(-number for number in received)}


def _conclude(codes: Sequence[int], killed: set[int], received: Sequence[int], notes: Path) -> int:
    """The exit code of the whole; raises what went wrong, once, however many workers it went wrong in."""
    failed = {rank: code for rank, code in enumerate(codes) if _failed(code, received) and rank not in killed}
    if received.count(signal.SIGINT) > 1 and set(failed.values()) <= {-signal.SIGKILL}:
        return 128 + signal.SIGINT
    if error := _earliest(notes, "error"):  # the word of a signal's own, too
        raise WorkerError(error.read_text(encoding="utf-8"), exit_code=_shell_code(codes[int(error.stem)]))
    # A worker that a signal ended left no word, and the tracebacks of the others tell of its end alone.
    by_signal = [rank for rank, code in failed.items() if code < 0]
    if not by_signal and (trace := _earliest(notes, "traceback")):
        console.print(trace.read_text(encoding="utf-8"), end="")
        return 1
    for rank in by_signal or failed:
        raise _end_of(rank, codes, notes)
    return max(map(_shell_code, codes))


def _earliest(notes: Path, kind: str) -> Path | None:
    return min(notes.glob(f"*.{kind}"), key=lambda path: path.stat().st_mtime_ns, default=None)


def _shell_code(code: int) -> int:
    """A signal's number as shells give it, other codes as they are."""
    return 128 - code if code < 0 else code


def _end_of(rank: int, codes: Sequence[int], notes: Path) -> WorkerError:
    code = codes[rank]
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
    tail = (notes / f"{rank}.output").read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
    said = "".join(f"\n    {line}" for line in tail)
    return WorkerError(
        f"process {rank} of {len(codes)} {how}, and the others were ended{said}",
        exit_code=_shell_code(code),
        remedy="if nobody killed it, memory ran out: give fewer --processes" if code == -signal.SIGKILL else None,
    )
