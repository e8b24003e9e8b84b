"""Monitor memory and disk of a rehearsal's processes, and kill those that Kaggle would kill."""

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
"""Seconds between two measurements."""

GB = 1_000_000_000
_PAGE = os.sysconf("SC_PAGE_SIZE")


class ResourceMonitor:
    """A context manager that monitors a process and its descendants in a thread.

    Args:
        process: number of the first process.
        ours: number of processes, from the first one, that belong to the rehearsal and are never killed.
        memory: memory limit in bytes; beyond it the largest process is killed, as on Kaggle.
        working: the kernel's working folder, as the kernel sees it.
        disk: limit of the working folder in bytes; beyond it the largest process is killed, if `enforced`.
        enforced: False if the file system has the limit.

    Attributes:
        peak: peak memory in bytes.
        disk: largest size of the working folder in bytes.
        killed: killed processes and why, for messages.
    """

    def __init__(self, process: int, ours: int, memory: float, working: Path, disk: float, *, enforced: bool) -> None:
        self.peak = 0
        self.disk = 0
        self.killed: list[str] = []
        self._process, self._ours, self._memory, self._working = process, ours, memory, working
        self._disk = disk if enforced else float("inf")
        self._over = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ResourceMonitor:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(PERIOD):
            memory = {process: memory_of(process) for process in descendants(self._process)}
            total, size = sum(memory.values()), bytes_below(_path_inside(self._process, self._working))
            self.peak, self.disk = max(self.peak, total), max(self.disk, size)
            if total > self._memory:
                self._kill(memory, f"memory of {self._memory / GB:,.2f} GB", total)
            elif size > self._disk:
                self._kill(memory, f"working folder of {self._disk / GB:,.2f} GB", size)
                self._disk = float("inf")  # killing frees no disk: report it once

    def _kill(self, memory: dict[int, int], limit: str, used: int) -> None:
        largest = max(list(memory)[self._ours :], key=lambda process: memory[process], default=None)
        if largest is None:
            return
        with suppress(ProcessLookupError):  # it has ended
            os.kill(largest, signal.SIGKILL)
            what = f"{used / GB:,.2f} GB in a {limit}: killed the largest process, with {memory[largest] / GB:,.2f} GB"
            self.killed.append(what)


def descendants(process: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = defaultdict(list)
    for number, parent in _parents():
        children[parent].append(number)
    processes = [process]
    for parent in processes:
        processes += children[parent]
    return processes


def _parents() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it ended meanwhile
                # The program's name is in brackets, and may contain brackets.
                yield int(entry.name), int((entry / "stat").read_text().rpartition(")")[2].split()[1])


def memory_of(process: int) -> int:
    """Memory of a process in bytes, with its share of shared pages; 0 if it has ended."""
    folder = Path("/proc", str(process))
    with suppress(OSError):  # before Linux 4.14, or not permitted
        for line in (folder / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    with suppress(OSError):
        return int((folder / "statm").read_text().split()[1]) * _PAGE
    return 0


def _path_inside(process: int, folder: Path) -> Path:
    """A folder as the process sees it, which may have its own file system."""
    return Path("/proc", str(process), "root", folder.relative_to("/"))


def bytes_below(folder: Path) -> int:
    """Size of a folder in bytes, without files that vanish meanwhile or can't be read."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(Path(root, name)).st_blocks * 512
    return total
