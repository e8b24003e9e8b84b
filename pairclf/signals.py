"""Signal handling: catch SIGTERM, SIGINT and SIGHUP during a job, and keep ignoring those that the process ignores."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Thread
from types import FrameType
from typing import Any

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask a process to end. A terminal, or a queue of jobs, sends them to all processes of a command."""

Handler = Callable[[int, FrameType | None], object]


@contextmanager
def answering(numbers: Sequence[signal.Signals], handler: Handler) -> Iterator[None]:
    """Handle these signals with `handler` in this block, except those that the process was started to ignore.

    `nohup` starts a command with SIGHUP ignored, and the shell of a script starts one in the background (`&`) with
    SIGINT ignored: a closed terminal, or a Ctrl-C that is meant for another command, must not end the job then.

    Args:
        numbers: the signals.
        handler: as `signal.signal` takes it; Python calls it in the main thread, where this must be entered too.
    """
    former = {number: signal.getsignal(number) for number in numbers}
    answered = [number for number, before in former.items() if before is not signal.SIG_IGN]
    for number in answered:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in answered:
            signal.signal(number, former[number])


HASTE = 1.0
"""Seconds within which a second Ctrl-C counts as a repetition of the first."""


class Signals:
    """The signal that asked the process to end, or None; loops read it at the end of a step."""

    def __init__(self) -> None:
        self.received: int | None = None

    def asked(self) -> bool:
        return self.received is not None


@contextmanager
def signals(clock: Callable[[], float] = time.monotonic) -> Iterator[Signals]:
    """Catch SIGTERM (a queue's time limit), SIGINT (Ctrl-C) and SIGHUP (a closed terminal) while it lasts.

    A launcher and the terminal may both send one, so that a second SIGTERM changes nothing; a second Ctrl-C, later than
    that by `clock`, interrupts at once. What the process was started to ignore, it goes on to ignore.
    """
    caught, first = Signals(), math.inf

    def note(number: int, _frame: Any) -> None:
        nonlocal first
        if caught.received is not None and number == signal.SIGINT and clock() - first > HASTE:
            raise KeyboardInterrupt
        caught.received, first = number, min(first, clock())

    with answering(ENDING, note):
        yield caught


def leave_to_parent() -> None:
    """Ignore them in a process that works for another, which handles them and ends it."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def work_for_parent() -> None:
    """In a process of a pool: leave signals to the parent, and end when that was killed: it would wait for ever."""
    leave_to_parent()
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    from multiprocessing import parent_process  # such a process has it

    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
