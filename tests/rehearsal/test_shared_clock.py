"""A shared clock moves by the passes that last on it, and by nothing that this machine takes."""

from __future__ import annotations

import pickle
import time
from collections import deque
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from clocks_support import clock_in, comes_true

from pairclf.rehearsal.shared_clock import SharedClock

HOUR = 3600.0


class Crew:
    """Passes in threads, each of which lasts on the clock; what comes back first is first."""

    def __init__(self, clock: SharedClock) -> None:
        self.clock = clock
        self.back: deque[str] = deque()

    def begin(self, name: str, seconds: float) -> None:
        def last() -> None:
            self.clock.last(seconds)
            self.back.append(name)

        Thread(target=last, daemon=True).start()

    def wait(self, seconds: float) -> list[Any]:
        return [self.back.popleft()] if self.back else []


def test_passes_of_hours_come_back_in_their_order_and_nobody_waited(tmp_path: Path) -> None:
    crew, told = Crew(clock_in(tmp_path)), []
    waits = pickle.loads(pickle.dumps(crew.clock)).turned_by(Crew.wait)
    crew.begin("long", 8 * HOUR)
    crew.begin("short", HOUR)
    moments: list[float] = [0.0]

    def all_back() -> bool:
        told.extend(waits(crew, 600.0))
        moments.append(crew.clock())
        return len(told) == 2

    assert comes_true(all_back)
    assert told == ["short", "long"]
    assert crew.clock() == pytest.approx(8 * HOUR)
    steps = [after - before for before, after in pairwise(moments)]
    assert max(steps) == pytest.approx(600.0), "who waits for ten minutes sees the clock after ten minutes"


def test_it_is_not_turned_while_no_pass_lasts(tmp_path: Path) -> None:
    """A machine that is slow to load a model takes nothing of the time."""
    crew = Crew(clock_in(tmp_path))
    waits = crew.clock.turned_by(Crew.wait, step=20.0)
    assert [waits(crew, 60.0) for _ in range(3)] == [[], [], []]
    assert crew.clock() == 0
    crew.begin("pass", 30.0)
    assert comes_true(lambda: waits(crew, 1.0))
    assert crew.clock() == 30.0


def test_it_rules_the_clocks_of_a_process_and_hurries_its_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = clock_in(tmp_path)
    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: 7.0)
    monkeypatch.setattr(time, "sleep", time.sleep)
    clock.rule()
    clock.hurry(least=1.0)
    time.sleep(0.001)
    assert clock.ahead == 0
    time.sleep(HOUR)
    assert clock.ahead == HOUR
    clock.hurry(least=0.001)
    beside = Thread(target=time.sleep, args=[0.002])
    beside.start()
    beside.join()
    assert clock.ahead == HOUR, "a thread that looks at something now and then turns no clock"
    assert pickle.loads(pickle.dumps(time.monotonic)) is time.monotonic, "predict sends it to its workers"
    assert [getattr(time, name)() for name in ("time", "monotonic", "perf_counter")] == [7.0 + HOUR] * 3
