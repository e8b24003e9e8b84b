"""A clock that several processes share, and that can be turned ahead: hours pass, and nobody waits for them.

A pass that is to take long says until when (`last`); whoever waits for it turns the clock (`turned_by`). So the clock
moves by what happens, and a machine that is slow or busy uses up none of the time that is rehearsed. A pass ends at
once where its waiter turned the clock that far, and a waiter sees every second of the time between.

It is copied into the image of a rehearsal, so it imports nothing of pairclf.
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
    """A function of the module `time`; sent to another process, it is that process's own."""

    def __init__(self, name: str, clock: SharedClock) -> None:
        self._name, self._real, self._clock = name, _of_time(name), clock

    def __reduce__(self) -> tuple[Callable[[str], Callable[[], float]], tuple[str]]:
        return _of_time, (self._name,)

    def __call__(self) -> float:
        return self._real() + self._clock.ahead


class SharedClock:
    """Seconds of a real clock, and those by which a process turned it ahead. It may be sent to other processes.

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
        """Seconds, as `time.monotonic` counts them where `real` does."""
        return self._real() + self.ahead

    @property
    def ahead(self) -> float:
        """Seconds by which it was turned."""
        return float(self._values[_AHEAD])

    def turn(self, seconds: float) -> None:
        """Turn it ahead."""
        self._values[_AHEAD] += seconds

    def last(self, seconds: float) -> None:
        """Return when so many seconds have passed, by real time or because somebody turned the clock."""
        end = self() + seconds
        while self() < end:
            self._values[_UNTIL] = max(self._values[_UNTIL], end)  # again and again: another may have written there
            _sleep(LOOK)

    def turned_by(self, wait: Callable[..., list[Any]], step: float = 0.0) -> Callable[..., list[Any]]:
        """`ProcessPool.wait`, which turns the clock while nothing happens but that a pass lasts.

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
        """Let the clocks of the module `time` be turned with it, in this process."""
        for name in names:
            setattr(time, name, _Turned(name, self))

    def hurry(self, least: float) -> None:
        """Let `time.sleep` turn the clock and return, in this process, where it is asked for `least` seconds or more.

        Shorter sleeps are those of a loop that watches a process, which takes real time, and so does whatever a thread
        beside the cells sleeps for: Jupyter's looks for its parent each second, for as long as the kernel lives.
        """

        def sleep(seconds: float) -> None:
            if seconds < least or current_thread() is not main_thread():
                _sleep(seconds)
            else:
                self.turn(seconds)

        time.sleep = sleep  # type: ignore[assignment]
