"""`--processes N`: start N training processes on this machine, forward signals to them and report the first error.

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
from pairclf.errors import ConfigError, PairclfError
from pairclf.signals import answering

ERRORS = "PAIRCLF_ERRORS"
"""Environment variable that marks a worker: the folder for the errors that its parent prints."""

LAUNCHERS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")
"""Environment variables that torchrun or `accelerate launch` set."""

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE = 5.0
"""Seconds that the other workers have to report their errors after one has failed."""

COMMAND = (sys.executable, "-m", "pairclf")

_STDERR = 2
_POLL = 0.05  # seconds
_TAIL = 30  # lines
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class WorkerError(PairclfError):
    """A worker's own error message, or how it ended; with the worker's exit code."""

    def __init__(self, what: str, *, exit_code: int, remedy: str | None = None) -> None:
        super().__init__(what, remedy=remedy)
        self.exit_code = exit_code


def is_worker() -> bool:
    """Whether this process was started by `run_processes`, to train together with others."""
    return ERRORS in os.environ


def is_first() -> bool:
    """Whether this process is the first of those that train together, or alone."""
    return os.environ.get("RANK", "0") == "0"


def spread(processes: int | None, arguments: Sequence[str]) -> int | None:
    """Run `pairclf ARGUMENTS` in `processes` processes.

    Returns:
        Their exit code; None: this process shall do the work, as a worker or alone.
    """
    if is_worker():
        become_worker()
        return None
    return None if processes is None else run_processes(processes, arguments)


def become_worker() -> None:
    """Make this process end with its parent, and leave tracebacks to it; the parent prints the first of all workers."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def leave(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        _note("traceback").write_text("".join(traceback.format_exception(kind, error, trace)), encoding="utf-8")

    sys.excepthook = leave


def leave_error(text: str) -> bool:
    """In a worker, leave the error for the parent to print once, and return True; otherwise return False."""
    if is_worker():
        _note("error").write_text(text, encoding="utf-8")
    return is_worker()


def _note(kind: str) -> Path:
    return Path(os.environ[ERRORS], f"{os.environ['RANK']}.{kind}")


def run_processes(count: int, arguments: Sequence[str], *, to_stderr: bool = False) -> int:
    """Run `pairclf ARGUMENTS` in `count` connected processes, and show the output of the first.

    SIGTERM, SIGINT and SIGHUP are forwarded to the workers, which may take time to write a checkpoint. A second SIGINT
    kills them. If one fails, the others are ended, and the error is printed once. `to_stderr`: what the first prints is
    no output of this command.

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
            workers.append(
                opened.enter_context(_worker(rank, count, arguments, notes=notes, port=port, to_stderr=to_stderr))
            )
        killed = _wait(workers, received)
        return _conclude([worker.wait() for worker in workers], killed, received, notes)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _worker(
    rank: int, count: int, arguments: Sequence[str], *, notes: Path, port: int, to_stderr: bool
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a worker, and kill it at the end of the block. Only the output of the first worker is shown."""
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
        output = None if rank == 0 else kept
        worker = subprocess.Popen(
            [*COMMAND, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=_STDERR if to_stderr and rank == 0 else output,
            stderr=output,
            process_group=0,  # Ctrl-C reaches only the parent, which forwards it once
        )
    try:
        yield worker
    finally:
        worker.kill()
        worker.wait()


@contextmanager
def _forwarding(workers: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Forward signals to the workers; yields the list of received signals."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and number in received
        received.append(number)
        for worker in workers:
            worker.send_signal(signal.SIGKILL if again else number)  # does nothing to one that has ended

    with answering(FORWARDED, forward):
        yield received


def _wait(workers: Sequence[subprocess.Popen[bytes]], received: Sequence[int]) -> set[int]:
    """Wait for all workers; after a failure the others have `GRACE` seconds, then they are killed.

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
    """Whether an exit code is neither success nor the result of a forwarded signal."""
    return code not in {None, 0, *(128 + number for number in received), *(-number for number in received)}


def _conclude(codes: Sequence[int], killed: set[int], received: Sequence[int], notes: Path) -> int:
    """The exit code of the command; raises the first error of the workers."""
    failed = {rank: code for rank, code in enumerate(codes) if _failed(code, received) and rank not in killed}
    if received.count(signal.SIGINT) > 1 and set(failed.values()) <= {-signal.SIGKILL}:
        return 128 + signal.SIGINT
    if error := _earliest(notes, "error"):  # also the message of a StopError
        raise WorkerError(error.read_text(encoding="utf-8"), exit_code=_shell_code(codes[int(error.stem)]))
    # A killed worker leaves no message, and the tracebacks of the others are only consequences.
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
    """128 + the number of a signal, as in shells; other codes unchanged."""
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
