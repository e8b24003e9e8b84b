"""Monitor memory and disk of a rehearsal's processes, and kill those that Kaggle would kill."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

import psutil

PERIOD = 0.2
"""Seconds between two measurements."""

GB = 1_000_000_000


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
            memory = {process: memory_of(process) for process in with_descendants(self._process)}
            total, size = sum(memory.values()), bytes_below(_path_inside(self._process, self._working))
            self.peak, self.disk = max(self.peak, total), max(self.disk, size)
            if total > self._memory:
                self._kill(memory, f"memory of {self._memory / GB:,.2f} GB", total)
            elif size > self._disk:
                self._kill(memory, f"working folder of {self._disk / GB:,.2f} GB", size)
                self._disk = float("inf")  # killing frees no disk: report it once

    def _kill(self, memory: dict[psutil.Process, int], limit: str, used: int) -> None:
        largest = max(list(memory)[self._ours :], key=lambda process: memory[process], default=None)
        if largest is None:
            return
        with suppress(psutil.NoSuchProcess):
            largest.kill()
            what = f"{used / GB:,.2f} GB in a {limit}: killed the largest process, with {memory[largest] / GB:,.2f} GB"
            self.killed.append(what)


def with_descendants(number: int) -> list[psutil.Process]:
    """A process and all its descendants, each after its parent; none if it has ended."""
    try:
        process = psutil.Process(number)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory_of(process: psutil.Process) -> int:
    """Memory of a process in bytes, with its share of shared pages if that is permitted; 0 if it has ended."""
    with suppress(psutil.NoSuchProcess):
        try:
            return int(process.memory_full_info().pss)
        except psutil.AccessDenied:
            return int(process.memory_info().rss)
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
