"""A clock that several processes share and can turn ahead, so that hours pass without waiting.

A long pass sets the time at which it ends (`last`), and the process that waits for it turns the clock (`turned_by`). So
only events move the clock, and a slow or busy machine uses up none of the rehearsed time. A waiter turns the clock in
steps of the time that it waits, so it sees all moments between.

The file is copied into the image of a rehearsal, so it imports nothing of pairclf.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

LOOK = 0.01
"""Real seconds between two looks at the clock, and for which a waiter waits before it turns the clock again."""

_AHEAD, _UNTIL, _SIZE = 0, 1, 16  # places of the two numbers in the file, and its bytes
_NAMES = ("time", "monotonic", "perf_counter")
_sleep = time.sleep


def _of_time(name: str) -> Callable[[], float]:
    function: Callable[[], float] = getattr(time, name)
    return function


class _Turned:
    """A function of the module `time`; in another process, it becomes that process's own function."""

    def __init__(self, name: str, clock: SharedClock) -> None:
        self._name, self._real, self._clock = name, _of_time(name), clock

    def __reduce__(self) -> tuple[Callable[[str], Callable[[], float]], tuple[str]]:
        return _of_time, (self._name,)

    def __call__(self) -> float:
        return self._real() + self._clock.ahead


class SharedClock:
    """A real clock plus the seconds by which processes turned it ahead. It can be sent to other processes.

    Args:
        path: a file that the processes share; it is made where there is none.
        real: the clock that is turned.
    """

    def __init__(self, path: Path, real: Callable[[], float] = time.monotonic) -> None:
        self._path, self._real = path, real
        with path.open("a+b") as file:
            file.truncate(_SIZE)
            self._values = memoryview(mmap.mmap(file.fileno(), _SIZE)).cast("d")

    def __reduce__(self) -> tuple[type[SharedClock], tuple[Path, Callable[[], float]]]:
        return type(self), (self._path, self._real)

    def __call__(self) -> float:
        """The time in seconds."""
        return self._real() + self.ahead

    @property
    def ahead(self) -> float:
        """Seconds by which it was turned."""
        return float(self._values[_AHEAD])

    def turn(self, seconds: float) -> None:
        """Turn it ahead."""
        self._values[_AHEAD] += seconds

    def last(self, seconds: float) -> None:
        """Return after so many seconds, by real time or because somebody turned the clock."""
        end = self() + seconds
        while self() < end:
            self._values[_UNTIL] = max(self._values[_UNTIL], end)  # again and again: another may have written there
            _sleep(LOOK)

    def turned_by(self, wait: Callable[..., list[Any]], step: float = 0.0) -> Callable[..., list[Any]]:
        """A `ProcessPool.wait` that turns the clock while passes last and nothing else happens.

        Args:
            wait: the method.
            step: it is turned by so many seconds at once where a shorter time is waited for: fewer turns.
        """

        def waits(crew: Any, seconds: float) -> list[Any]:
            left = self._values[_UNTIL] - self()
            events = wait(crew, 0.0 if left > 0 else min(seconds, LOOK))
            if left > 0 and not events:
                self.turn(min(left, max(seconds, step)))
            return events

        return waits

    def rule(self, names: Sequence[str] = _NAMES) -> None:
        """Make the clocks of the module `time` follow this clock, in this process."""
        for name in names:
            setattr(time, name, _Turned(name, self))

    def hurry(self, least: float) -> None:
        """Make `time.sleep` turn the clock and return, in this process, if it gets `least` seconds or more.

        Shorter sleeps are those of a loop that watches a process, which takes real time, and so does whatever a thread
        beside the cells sleeps for: Jupyter's looks for its parent each second, for as long as the kernel lives.
        """

        def sleep(seconds: float) -> None:
            if seconds < least or current_thread() is not main_thread():
                _sleep(seconds)
            else:
                self.turn(seconds)

        time.sleep = sleep  # type: ignore[assignment]
