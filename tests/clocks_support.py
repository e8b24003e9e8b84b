"""Waiting, and clocks that do not count what this machine takes. Tests look at no others: see test_clocks.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pairclf.approaches.protocol import Loader
from pairclf.inference.messages import Event
from pairclf.inference.pool import ProcessPool
from pairclf.inference.worker import load_bundle
from pairclf.rehearsal.shared_clock import SharedClock

PATIENCE = 600.0
"""Seconds after which a test gives up on what never comes: nothing takes so long, however busy the machine is."""

AMPLE = 1e9
"""Seconds for a job that must not run out of time, however slow the machine is."""


def comes_true(what: Callable[[], object]) -> bool:
    """Wait until it is true; False where it never is."""
    end = time.monotonic() + PATIENCE
    while not what():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def collect(crew: ProcessPool, count: int) -> list[Event]:
    """So many events of a crew; fails where they do not come."""
    events: list[Event] = []

    def enough() -> bool:
        events.extend(crew.wait(1.0) if len(events) < count else [])
        return len(events) >= count

    assert comes_true(enough), events
    assert len(events) == count, events
    return events


def standing() -> float:
    """A clock that stands still."""
    return 0.0


def clock_in(folder: Path) -> SharedClock:
    """A clock that passes turn, and nothing else does."""
    return SharedClock(folder / "clock", standing)


def turned_crew(clock: SharedClock, load: Loader = load_bundle) -> Callable[..., ProcessPool]:
    """`ProcessPool`, whose waits turn the clock while a pass lasts on it."""
    kind = type("TurnedCrew", (ProcessPool,), {"wait": clock.turned_by(ProcessPool.wait)})
    return partial(kind, load=load)
