"""Workers draw from one queue, are ended at once, and whatever befalls one of them is an event."""

from __future__ import annotations

import atexit
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event as Never
from threading import Thread
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from clocks_support import PATIENCE, clock_in, collect, comes_true
from support.forked import forked

from pairclf.approaches.protocol import Assignment, Loaded
from pairclf.errors import BundleError
from pairclf.inference.messages import BatchScored, Clock, Event, Job, RowOrders, WorkerFailure, WorkerReady
from pairclf.inference.pool import LOAD_LIMIT, ProcessPool, WorkerModel
from pairclf.inputs.render import Encoded
from pairclf.inputs.sequences import Item, LargestPass
from pairclf.scores.metrics import Floats

SLOW, OOM, WRONG, DEADLY, ENDLESS = 7, 8, 9, 10, 11
"""First ids of rows that the stand-in of a model does not take as others."""


class Stub:
    """Stands in for a `Scorer`: row and order as logits, so that a mix-up shows."""

    def launch(self, items: Sequence[Item]) -> int:
        first = int(items[0].ids[0])
        if first == SLOW:
            time.sleep(0.2)
        if first == OOM:
            raise MemoryError("so many tokens")
        if first == ENDLESS:
            Never().wait()
        if first == DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        return first

    def collect(self, items: Sequence[Item], launched: int) -> tuple[Floats, int]:
        if launched == WRONG:
            raise ZeroDivisionError("a bug")
        return np.array([[item.row, item.order, item.ids.sum()] for item in items], dtype=np.float64), 0

    def recover(self) -> None:
        """Nothing is held."""


def load(assignment: Assignment) -> Loaded:
    """Stands in for `load_bundle`."""
    if assignment.bundle.name == "damaged":
        raise BundleError("it is damaged", where=assignment.bundle, rows=["7"], remedy="copy it again")
    if assignment.bundle.name == "endless":
        Never().wait()
    if assignment.bundle.name == "noted":
        (assignment.bundle.parent / "loaded").touch()
    return Loaded(Stub(), "padded", f"{assignment.devices} {assignment.threads}")


def encoded(*firsts: int) -> list[tuple[Encoded, ...]]:
    return [
        tuple(Encoded(np.array([first, row, order], dtype=np.int32), (), {}) for order in (0, 1))
        for row, first in enumerate(firsts)
    ]


def model(name: str, *firsts: int, folder: Path = Path("bundles")) -> WorkerModel:
    return WorkerModel(
        "pairclf.approaches.torch_models", folder / name, None, (), encoded(*firsts), LargestPass(3, 64, 2)
    )


def work(number: int, *rows: int, member: int = 0) -> Job:
    return Job(number, member, tuple(RowOrders(row, (0, 1)) for row in rows))


Make = Callable[..., ProcessPool]


@pytest.fixture
def crew_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    crews: list[ProcessPool] = []

    def make(*models: WorkerModel, workers: int = 1, clock: Clock = time.monotonic) -> ProcessPool:
        crews.append(ProcessPool(models, [("cpu",)] * workers, load=load, clock=clock))
        return crews[-1]

    monkeypatch.setattr("pairclf.inference.pool._GRACE", PATIENCE)
    yield make
    for crew in crews:
        crew.close()


def pids(crew: ProcessPool) -> list[int]:
    return [one.process.pid or 0 for one in crew._workers.values()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_crew_of_two_workers_shares_one_queue(crew_of: Make) -> None:
    crew = crew_of(model("first", *[SLOW] * 12), workers=2)
    numbers = crew.load(0)
    ready = [event for event in collect(crew, 2) if isinstance(event, WorkerReady)]  # no one draws before the other can
    for row in range(12):
        crew.submit(work(row, row))
    scored = [event for event in collect(crew, 12) if isinstance(event, BatchScored)]
    assert sorted(event.worker for event in ready) == sorted(numbers)
    assert {event.layout for event in ready} == {"padded"}
    assert {event.worker for event in scored} == set(numbers)
    assert sorted(event.job.number for event in scored) == list(range(12))
    for event in scored:
        assert event.logits.tolist() == [[row, order, SLOW + row + order] for row, order in event.job.sequences]
        assert event.seconds >= 0.2
    assert crew.wait(0.0) == []


def test_crew_reports_a_failed_batch_and_keeps_its_worker(crew_of: Make) -> None:
    crew = crew_of(model("first", OOM, WRONG, 1))
    (number,) = crew.load(0)
    for row in range(3):
        crew.submit(work(row, row))
    _, memory, wrong, fine = collect(crew, 4)
    assert isinstance(memory, WorkerFailure)
    assert (memory.kind, memory.job) == ("memory", work(0, 0))
    assert isinstance(wrong, WorkerFailure)
    assert (wrong.kind, wrong.job, wrong.error) == ("error", work(1, 1), None)
    assert wrong.what.startswith("ZeroDivisionError: a bug (test_pool.py:")
    assert isinstance(fine, BatchScored)
    assert fine.worker == number


def test_crew_reports_a_dead_worker_with_the_work_it_had_begun(crew_of: Make) -> None:
    crew = crew_of(model("first", DEADLY, 1))
    (number,) = crew.load(0)
    crew.submit(work(0, 0))
    crew.submit(work(1, 1))
    died = collect(crew, 2)[1]
    assert isinstance(died, WorkerFailure)
    assert (died.worker, died.kind, died.job) == (number, "died", work(0, 0))
    assert "SIGKILL" in died.what
    other = crew.restart(number)
    assert other != number
    assert crew.restart(number) == other
    ready, scored = collect(crew, 2)
    assert isinstance(ready, WorkerReady)
    assert isinstance(scored, BatchScored)
    assert (scored.worker, scored.job) == (other, work(1, 1))


def test_crew_ends_a_single_worker_that_hangs_and_its_next_job_is_done(crew_of: Make, tmp_path: Path) -> None:
    clock = clock_in(tmp_path)
    crew = crew_of(model("first", 1, ENDLESS, 1), clock=clock)
    (number,) = crew.load(0)
    for row in range(3):
        crew.submit(work(row, row)._replace(limit=60.0))
    collect(crew, 2)  # ready, and the first job is done
    clock.turn(59)
    assert crew.wait(0.0) == []
    clock.turn(2)
    (hung,) = collect(crew, 1)
    assert isinstance(hung, WorkerFailure)
    assert (hung.kind, hung.job and hung.job.number) == ("died", 1)
    assert hung.what.endswith("hung: it did not answer for 61 s, and was ended")
    other = crew.restart(number)
    _, scored = collect(crew, 2)
    assert isinstance(scored, BatchScored)
    assert (scored.worker, scored.job.number) == (other, 2)
    clock.turn(1e6)  # a worker without a job may be silent
    assert crew.wait(0.0) == []


def test_crew_ends_a_worker_that_hangs_while_it_loads(crew_of: Make, tmp_path: Path) -> None:
    clock = clock_in(tmp_path)
    crew = crew_of(model("endless", 1), clock=clock)
    crew.load(0)
    crew.wait(0.0)
    clock.turn(LOAD_LIMIT + 1)
    (hung,) = collect(crew, 1)
    assert isinstance(hung, WorkerFailure)
    assert (hung.kind, hung.job) == ("died", None)
    assert "hung" in hung.what


def test_crew_reports_an_idle_dead_worker_without_work(crew_of: Make) -> None:
    crew = crew_of(model("first", 1))
    crew.load(0)
    collect(crew, 1)
    os.kill(pids(crew)[0], signal.SIGKILL)
    (died,) = collect(crew, 1)
    assert isinstance(died, WorkerFailure)
    assert (died.kind, died.job) == ("died", None)


def test_crew_reports_once_why_a_model_does_not_load(crew_of: Make) -> None:
    crew = crew_of(model("damaged", 1))
    crew.load(0)
    crew.submit(work(0, 0))
    (failed,) = collect(crew, 1)
    assert isinstance(failed, WorkerFailure)
    assert (failed.kind, failed.job) == ("error", None)
    assert isinstance(failed.error, BundleError)
    assert (failed.error.what, failed.error.rows, failed.error.remedy) == ("it is damaged", ("7",), "copy it again")
    assert str(failed.error) == failed.what
    assert crew.wait(0.3) == []


def test_crew_load_ends_former_workers_and_drops_their_work(crew_of: Make) -> None:
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
    assert [event.job.number for event in events if isinstance(event, BatchScored)] == [9]


def test_crew_load_waits_for_the_memory_of_former_workers(crew_of: Make, tmp_path: Path) -> None:
    crew = crew_of(model("noted", 1, folder=tmp_path))
    ends, holds = os.pipe()
    former = SimpleNamespace(sentinel=ends, join=lambda: None, close=lambda: os.close(ends), kill=lambda: None)
    crew._terminating.append(cast(BaseProcess, former))
    crew.load(0)
    assert crew.wait(0.5) == []
    assert not (tmp_path / "loaded").exists()
    os.close(holds)  # the former has ended
    assert isinstance(collect(crew, 1)[0], WorkerReady)
    assert (tmp_path / "loaded").exists()


def test_crew_workers_ignore_signals(crew_of: Make) -> None:
    crew = crew_of(model("first", 1))
    crew.load(0)
    collect(crew, 1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pids(crew)[0], number)
    crew.submit(work(0, 0))
    assert isinstance(collect(crew, 1)[0], BatchScored)


def test_crew_close_ends_all_workers_at_once(crew_of: Make) -> None:
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
def test_crew_shares_out_cores_unless_the_environment_says_otherwise(
    crew_of: Make, monkeypatch: pytest.MonkeyPatch, environment: str | None, threads: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    crew = crew_of(model("first", 1), workers=2)
    crew.load(0)
    assert {event.what for event in collect(crew, 2) if isinstance(event, WorkerReady)} == {f"('cpu',) {threads}"}


def orphan_workers(channel: Connection) -> None:
    """Be killed while two workers are at work."""
    crew = ProcessPool([model("first", *[SLOW] * 1000)], [("cpu",)] * 2, load=load)
    crew.load(0)
    for row in range(1000):
        crew.submit(work(row, row))
    collect(crew, 2)
    channel.send(pids(crew))
    signal.raise_signal(signal.SIGKILL)


def test_crew_workers_do_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    ours, theirs = Pipe()
    parent = forked(orphan_workers, theirs, output=tmp_path / "output")
    workers = ours.recv()
    parent.join()
    assert parent.exitcode == -signal.SIGKILL
    assert len(workers) == 2
    assert comes_true(lambda: not any(map(alive, workers)))


def test_crew_ends_at_exit_if_it_was_not_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers ignore the SIGTERM that multiprocessing sends at exit, and it would wait for them for ever."""
    asked: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", asked.append)
    crew = ProcessPool([model("first", 1)], [("cpu",)], load=load)
    crew.load(0)
    (worker,) = pids(crew)
    (at_exit,) = asked
    at_exit()
    assert not alive(worker)


def test_crew_does_not_wait_for_a_stopped_worker(crew_of: Make) -> None:
    """Its channel fills up with work that it does not take; submit, wait and close return all the same."""
    crew = crew_of(model("first", *[1] * 40), workers=1)
    crew.load(0)
    assert isinstance(collect(crew, 1)[0], WorkerReady)
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


@pytest.mark.parametrize("loads", [False, pytest.param(True, marks=pytest.mark.thorough)], ids=["made", "loaded"])
def test_crew_starts_workers_anew_where_the_temporary_folder_has_a_long_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crew_of: Make, *, loads: bool
) -> None:
    """A socket's path has 107 characters at most."""
    monkeypatch.setattr("pairclf.inference.pool.gettempdir", lambda: str(tmp_path / ("x" * 90)))
    crew = crew_of(model("first", 1))
    assert crew._context.get_start_method() == "spawn"
    if loads:
        crew.load(0)
        assert isinstance(collect(crew, 1)[0], WorkerReady)
