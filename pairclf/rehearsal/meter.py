"""How much memory and disk the processes of a rehearsal take; what Kaggle would end for it, is ended."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

PERIOD = 0.2
"""Seconds between two looks."""

GB = 1_000_000_000
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Meter:
    """Watches a process and all that it started, in a thread, while it is entered.

    Args:
        process: number of the first process.
        ours: how many processes, from the first one down, are the rehearsal's own: they are never killed.
        memory: bytes that all may hold together; beyond that the largest is killed, as the system does it on Kaggle.
        working: its working folder, as it sees it.
        disk: bytes that may lie in there; beyond that the largest process is killed, if `enforced`.
        enforced: False where the folder's file system sees to it.

    Attributes:
        peak: the most bytes of memory that were held at once.
        disk: the most bytes that lay in the working folder.
        killed: what was killed and why, for people.
    """

    def __init__(self, process: int, ours: int, memory: float, working: Path, disk: float, *, enforced: bool) -> None:
        self.peak = 0
        self.disk = 0
        self.killed: list[str] = []
        self._process, self._ours, self._memory, self._working = process, ours, memory, working
        self._disk = disk if enforced else float("inf")
        self._over = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(PERIOD):
            held = {process: held_by(process) for process in descendants(self._process)}
            total, size = sum(held.values()), size_of(_seen_by(self._process, self._working))
            self.peak, self.disk = max(self.peak, total), max(self.disk, size)
            if total > self._memory:
                self._kill(held, f"memory of {self._memory / GB:,.2f} GB", total)
            elif size > self._disk:
                self._kill(held, f"working folder of {self._disk / GB:,.2f} GB", size)
                self._disk = float("inf")  # killing frees no disk: once is enough to be told of

    def _kill(self, held: dict[int, int], limit: str, found: int) -> None:
        largest = max(list(held)[self._ours :], key=lambda process: held[process], default=None)
        if largest is None:
            return
        with suppress(ProcessLookupError):  # it ended by itself
            os.kill(largest, signal.SIGKILL)
            what = (
                f"{found / GB:,.2f} GB in a {limit}: the largest process, with {held[largest] / GB:,.2f} GB, was killed"
            )
            self.killed.append(what)


def descendants(process: int) -> list[int]:
    """The process and all that it started, by the table of processes."""
    children: dict[int, list[int]] = defaultdict(list)
    for number, parent in _parents():
        children[parent].append(number)
    found = [process]
    for one in found:
        found += children[one]
    return found


def _parents() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it ended meanwhile
                # The name of the program stands in brackets, and may hold some itself.
                yield int(entry.name), int((entry / "stat").read_text().rpartition(")")[2].split()[1])


def held_by(process: int) -> int:
    """Bytes in memory, pages that several share by their share; 0 where it has ended."""
    folder = Path("/proc", str(process))
    with suppress(OSError):  # not there before Linux 4.14, or not for us to see
        for line in (folder / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    with suppress(OSError):
        return int((folder / "statm").read_text().split()[1]) * _PAGE
    return 0


def _seen_by(process: int, folder: Path) -> Path:
    """A folder as a process has it, which may have another file system there."""
    return Path("/proc", str(process), "root", folder.relative_to("/"))


def size_of(folder: Path) -> int:
    """Bytes that lie below `folder`; what is removed meanwhile, or not for us to see, counts for nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(Path(root, name)).st_blocks * 512
    return total
