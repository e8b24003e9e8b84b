"""Workers draw from one queue, are ended at once, and whatever befalls one of them is an event."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from clocks_support import PATIENCE, collect, comes_true

from pairclf.errors import BundleError
from pairclf.inference.crew import Model, ProcessCrew
from pairclf.inference.memory import Largest
from pairclf.inference.work import Event, Failed, Floats, Piece, Ready, Scored, Work
from pairclf.inference.worker import Assignment, Loaded
from pairclf.inputs.render import Encoded
from pairclf.model.batch import Item

SLOW, OOM, WRONG, DEADLY = 7, 8, 9, 10
"""First ids of rows that the stand-in of a model does not take as others."""


class Stub:
    """Stands in for a `Scorer`: row and order as logits, so that a mix-up shows."""

    def launch(self, items: Sequence[Item]) -> int:
        first = int(items[0].ids[0])
        if first == SLOW:
            time.sleep(0.2)
        if first == OOM:
            raise MemoryError("so many tokens")
        if first == DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        return first

    def collect(self, items: Sequence[Item], launched: int) -> tuple[Floats, int]:
        if launched == WRONG:
            raise ZeroDivisionError("a bug")
        return np.array([[item.row, item.order, item.ids.sum()] for item in items], dtype=np.float64), 0


def load(assignment: Assignment) -> Loaded:
    """Stands in for `load_bundle`."""
    if assignment.bundle.name == "damaged":
        raise BundleError("it is damaged", where=assignment.bundle, rows=["7"], remedy="copy it again")
    if assignment.bundle.name == "noted":
        (assignment.bundle.parent / "loaded").touch()
    return Loaded(Stub(), "padded", f"{assignment.devices} {assignment.threads}")


def encoded(*firsts: int) -> list[tuple[Encoded, ...]]:
    return [
        tuple(Encoded(np.array([first, row, order], dtype=np.int32), (), {}) for order in (0, 1))
        for row, first in enumerate(firsts)
    ]


def model(name: str, *firsts: int, folder: Path = Path("bundles")) -> Model:
    return Model(folder / name, None, (), encoded(*firsts), Largest(3, 64, 2))


def work(number: int, *rows: int, member: int = 0) -> Work:
    return Work(number, member, tuple(Piece(row, (0, 1)) for row in rows))


Make = Callable[..., ProcessCrew]


@pytest.fixture
def crew_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    crews: list[ProcessCrew] = []

    def make(*models: Model, workers: int = 1) -> ProcessCrew:
        crews.append(ProcessCrew(models, [("cpu",)] * workers, load=load))
        return crews[-1]

    monkeypatch.setattr("pairclf.inference.crew._GRACE", PATIENCE)
    yield make
    for crew in crews:
        crew.close()


def pids(crew: ProcessCrew) -> list[int]:
    return [one.process.pid or 0 for one in crew._workers.values()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_two_workers_share_one_queue(crew_of: Make) -> None:
    crew = crew_of(model("first", *[SLOW] * 12), workers=2)
    numbers = crew.load(0)
    ready = [event for event in collect(crew, 2) if isinstance(event, Ready)]  # no one draws before the other can
    for row in range(12):
        crew.submit(work(row, row))
    scored = [event for event in collect(crew, 12) if isinstance(event, Scored)]
    assert sorted(event.worker for event in ready) == sorted(numbers)
    assert {event.layout for event in ready} == {"padded"}
    assert {event.worker for event in scored} == set(numbers)
    assert sorted(event.work.number for event in scored) == list(range(12))
    for event in scored:
        assert event.logits.tolist() == [[row, order, SLOW + row + order] for row, order in event.work.sequences]
        assert event.seconds >= 0.2
    assert crew.wait(0.0) == []


def test_what_goes_wrong_with_a_batch_is_an_event_and_the_worker_lives(crew_of: Make) -> None:
    crew = crew_of(model("first", OOM, WRONG, 1))
    (number,) = crew.load(0)
    for row in range(3):
        crew.submit(work(row, row))
    _, memory, wrong, fine = collect(crew, 4)
    assert isinstance(memory, Failed)
    assert (memory.kind, memory.work) == ("memory", work(0, 0))
    assert isinstance(wrong, Failed)
    assert (wrong.kind, wrong.work, wrong.error) == ("error", work(1, 1), None)
    assert wrong.what.startswith("ZeroDivisionError: a bug (test_crew.py:")
    assert isinstance(fine, Scored)
    assert fine.worker == number


def test_a_dead_worker_is_reported_with_what_it_had_begun_and_no_more(crew_of: Make) -> None:
    crew = crew_of(model("first", DEADLY, 1))
    (number,) = crew.load(0)
    crew.submit(work(0, 0))
    crew.submit(work(1, 1))
    died = collect(crew, 2)[1]
    assert isinstance(died, Failed)
    assert (died.worker, died.kind, died.work) == (number, "died", work(0, 0))
    assert "SIGKILL" in died.what
    other = crew.restart(number)
    assert other != number
    assert crew.restart(number) == other
    ready, scored = collect(crew, 2)
    assert isinstance(ready, Ready)
    assert isinstance(scored, Scored)
    assert (scored.worker, scored.work) == (other, work(1, 1))


def test_an_idle_worker_that_dies_is_reported_without_work(crew_of: Make) -> None:
    crew = crew_of(model("first", 1))
    crew.load(0)
    collect(crew, 1)
    os.kill(pids(crew)[0], signal.SIGKILL)
    (died,) = collect(crew, 1)
    assert isinstance(died, Failed)
    assert (died.kind, died.work) == ("died", None)


def test_a_model_that_can_not_be_loaded_says_why_once(crew_of: Make) -> None:
    crew = crew_of(model("damaged", 1))
    crew.load(0)
    crew.submit(work(0, 0))
    (failed,) = collect(crew, 1)
    assert isinstance(failed, Failed)
    assert (failed.kind, failed.work) == ("error", None)
    assert isinstance(failed.error, BundleError)
    assert (failed.error.what, failed.error.rows, failed.error.remedy) == ("it is damaged", ("7",), "copy it again")
    assert str(failed.error) == failed.what
    assert crew.wait(0.3) == []


def test_load_ends_the_former_and_their_work_is_forgotten(crew_of: Make) -> None:
    crew = crew_of(model("first", *[SLOW] * 4), model("second", 1), workers=2)
    crew.load(0)
    for row in range(4):
        crew.submit(work(row, row))
    collect(crew, 2)  # both are ready, and at work
    former = pids(crew)
    numbers = crew.load(1)
    crew.submit(work(9, 0, member=1))
    events = collect(crew, 3)
    assert not any(map(alive, former))
    assert {event.worker for event in events} == set(numbers)
    assert [event.work.number for event in events if isinstance(event, Scored)] == [9]


def test_a_model_waits_for_the_memory_of_the_former(crew_of: Make, tmp_path: Path) -> None:
    crew = crew_of(model("noted", 1, folder=tmp_path))
    ends, holds = os.pipe()
    former = SimpleNamespace(sentinel=ends, join=lambda: None, close=lambda: os.close(ends), kill=lambda: None)
    crew._leaving.append(cast(BaseProcess, former))
    crew.load(0)
    assert crew.wait(0.5) == []
    assert not (tmp_path / "loaded").exists()
    os.close(holds)  # the former has ended
    assert isinstance(collect(crew, 1)[0], Ready)
    assert (tmp_path / "loaded").exists()


def test_signals_for_everyone_are_for_the_parent_to_answer(crew_of: Make) -> None:
    crew = crew_of(model("first", 1))
    crew.load(0)
    collect(crew, 1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pids(crew)[0], number)
    crew.submit(work(0, 0))
    assert isinstance(collect(crew, 1)[0], Scored)


def test_close_ends_all_at_once(crew_of: Make) -> None:
    crew = crew_of(model("first", *[SLOW] * 100), workers=2)
    crew.load(0)
    crew.submit(work(0, *range(100)))
    collect(crew, 2)
    ended = pids(crew)
    assert all(map(alive, ended))
    crew.close()
    assert not any(map(alive, ended))
    assert crew.wait(0.0) == []
    crew.close()


@pytest.mark.parametrize(("environment", "threads"), [(None, "2"), ("1", "0")])
def test_cores_are_shared_out_unless_the_environment_says_otherwise(
    crew_of: Make, monkeypatch: pytest.MonkeyPatch, environment: str | None, threads: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    crew = crew_of(model("first", 1), workers=2)
    crew.load(0)
    assert {event.what for event in collect(crew, 2) if isinstance(event, Ready)} == {f"('cpu',) {threads}"}


ORPHANING = """
import os, signal, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[1:]
import test_crew
from test_crew import ProcessCrew, SLOW, load, model, pids, work

if __name__ == "__main__":
    crew = ProcessCrew([model("first", *[SLOW] * 1000)], [("cpu",)] * 2, load=load)
    crew.load(0)
    for row in range(1000):
        crew.submit(work(row, row))
    test_crew.collect(crew, 2)
    print(*pids(crew), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_worker_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(ORPHANING, encoding="utf-8")
    command = [sys.executable, str(script), *map(str, Path(__file__).parents[:2])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert parent.wait(PATIENCE) == -signal.SIGKILL
    assert len(workers) == 2
    assert comes_true(lambda: not any(map(alive, workers)))


def test_a_parent_that_forgets_to_close_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers ignore the SIGTERM that multiprocessing sends at exit, and it would wait for them for ever."""
    asked: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", asked.append)
    crew = ProcessCrew([model("first", 1)], [("cpu",)], load=load)
    crew.load(0)
    (worker,) = pids(crew)
    (at_exit,) = asked
    at_exit()
    assert not alive(worker)


def test_a_worker_that_is_stopped_keeps_nobody_waiting(crew_of: Make) -> None:
    """Its channel fills up with work that it does not take; submit, wait and close return all the same."""
    crew = crew_of(model("first", *[1] * 40), workers=1)
    crew.load(0)
    assert isinstance(collect(crew, 1)[0], Ready)
    os.kill(pids(crew)[0], signal.SIGSTOP)
    large = [tuple(Encoded(np.ones(1_000_000, dtype=np.int32), (), {}) for _ in (0, 1)) for _ in range(40)]
    crew._models[0].encoded[:] = large  # type: ignore[index]
    found: list[list[Event]] = []

    def go_on() -> None:
        for row in range(4):
            crew.submit(work(row, row))
        found.append(crew.wait(0.2))
        crew.close()
        found.append([])

    Thread(target=go_on, daemon=True).start()
    assert comes_true(lambda: len(found) == 2)
    assert found == [[], []]


def test_a_temporary_folder_with_a_long_path_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crew_of: Make
) -> None:
    """A socket's path has 107 characters at most; the workers are then started anew each time."""
    monkeypatch.setattr("pairclf.inference.crew.gettempdir", lambda: str(tmp_path / ("x" * 90)))
    crew = crew_of(model("first", 1))
    assert crew._context.get_start_method() == "spawn"
    crew.load(0)
    assert isinstance(collect(crew, 1)[0], Ready)
