"""The conductor under a simulated clock: in time whatever happens, with every row as well known as the time allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest

from pairclf.errors import ModelError
from pairclf.inference.forecast import SPARE
from pairclf.inference.loop import PredictionLoop, PredictionResult, ProgressReporter
from pairclf.inference.messages import BatchScored, Event, Job, WorkerFailure
from pairclf.inference.pending import PendingSequences, Workload
from pairclf.inference.planner import PlannedModel, Planner
from pairclf.inference.simulate import SimulatedClock, SimulatedPool
from pairclf.inference.state import Blender, PredictionState
from pairclf.inputs.sequences import SequenceIndex
from pairclf.scores.blend import Blend, HeldOutRows
from pairclf.scores.metrics import Floats
from pairclf.scores.plans import Plan, PlannableRows, Seconds, best_within, fit_plan, probabilities_of, scored, search
from pairclf.scores.probabilities import Calibration, mean_of_orders, probabilities
from pairclf.task import LMSYS

LINEAR, QUADRATIC = 2.0e10, 6.0e5  # about a 9B model's


@dataclass(frozen=True)
class Shape:
    linear: float = LINEAR
    quadratic: float = QUADRATIC


@dataclass
class Judge:
    """The mean of the members that know a row, else the prior."""

    calibrations: Sequence[Calibration]

    def blend(self, per_member: Sequence[Floats]) -> Floats:
        known = np.stack(per_member)
        there = np.asarray(np.isfinite(known).all(axis=2))
        mean = np.where(there[..., None], known, 0).sum(axis=0) / np.maximum(there.sum(axis=0), 1)[:, None]
        return np.where(there.any(axis=0)[:, None], mean, [0.4, 0.35, 0.25])


@dataclass
class Memory:
    """A journal in memory, which outlives a killed run."""

    kept: dict[tuple[int, int, int], Floats] = field(default_factory=dict)
    lost_models: dict[tuple[int, int, int], str] = field(default_factory=dict)

    def add(self, member: int, sequences: Sequence[tuple[int, int]], logits: Floats) -> None:
        for (row, order), values in zip(sequences, logits, strict=True):
            assert (member, row, order) not in self.kept, "scored twice"
            self.kept[member, row, order] = values.copy()

    def fail(self, member: int, row: int, order: int, what: str) -> None:
        self.lost_models[member, row, order] = what

    def scored(self) -> Any:
        return [(*key, values) for key, values in self.kept.items()]

    def failed(self) -> Any:
        return [(*key, what) for key, what in self.lost_models.items()]


@dataclass
class Written:
    """Keeps when it was written to, and looks at every table."""

    clock: SimulatedClock
    every: float = 30.0
    times: list[float] = field(default_factory=list)
    last: Floats | None = None

    def due(self, now: float) -> bool:
        return not self.times or now - self.times[-1] >= self.every

    def write(self, probabilities: Floats) -> None:
        assert np.isfinite(probabilities).all()
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-9)
        self.times.append(self.clock())
        self.last = probabilities


def inputs(rows: int, seed: int = 0, *, twins: float = 0.02) -> SequenceIndex:
    """Lengths of LMSYS's kind; some rows the same as earlier ones, some with equal sides."""
    random = np.random.default_rng(seed)
    prompt = 40 + random.lognormal(np.log(22), 1.56, rows)
    sides = random.lognormal(np.log(225), 0.8, (rows, 2)).sum(axis=1)
    lengths = np.minimum(2048, prompt + sides).astype(np.int64)
    twin = np.arange(2 * rows).reshape(rows, 2)
    for row in np.flatnonzero(random.random(rows) < twins):
        twin[row] = twin[row, 0] if row % 2 else twin[int(random.integers(0, row + 1))]
        lengths[row] = lengths[twin[row, 0] // 2]
    return SequenceIndex(np.stack([lengths, lengths], axis=1), np.minimum(prompt, lengths - 1).astype(np.int64), twin)


def part(name: str = "a", rows: int = 400, **changes: Any) -> PlannedModel:
    plain = {"speed": 24e12, "load_seconds": 60.0, "gain": 0.01, "gain_swap": 0.006}
    return PlannedModel(name, changes.pop("inputs", None) or inputs(rows), Shape(), **{**plain, **changes})


class Crew(SimulatedPool):
    """Workers whose speed may drift, that stall, run out of memory, die, and meet rows that nobody can score."""

    def __init__(self, *args: Any, **faults: Any) -> None:
        self.slow: Callable[[float], float] = faults.pop("slow", lambda now: 1.0)
        self.stall: float = faults.pop("stall", 0.0)
        self.cold: float = faults.pop("cold", 1.0)
        self.memory: float = faults.pop("memory", float("inf"))
        self.dying: float = faults.pop("dying", 0.0)
        self.poisoned: set[int] = faults.pop("poisoned", set())
        self.silent: set[int] = faults.pop("silent", set())
        self.end: float = faults.pop("end", float("inf"))
        self.seen: set[int] = set()
        self.done: list[tuple[int, int, int]] = []
        self.useful = 0.0
        """Seconds of workers that brought something: loads, and passes that came back."""
        super().__init__(*args, **{"workers": 2, "overhead": 0.2, "layout": "shared", "classes": 3, **faults})

    def do(self, worker: int, work: Job) -> tuple[float, Event]:
        seconds, event = super().do(worker, work)
        seconds *= self.slow(self.clock()) * float(self.random.lognormal(0, 0.05))
        seconds += self.cold * 10 if worker not in self.seen else 0.0
        if self.random.random() < self.stall:
            seconds += 300
        self.seen.add(worker)
        rows = {piece.row for piece in work.row_orders}
        if self.pending[work.member].workload_of(work.row_orders).tokens > self.memory:
            return seconds / 2, WorkerFailure(worker, work, "memory", "out of memory")
        if self.random.random() < self.dying or rows & self.poisoned:
            return seconds / 2, WorkerFailure(worker, work, "died", "SIGKILL")
        assert isinstance(event, BatchScored)
        logits = event.logits
        for place, (row, order) in enumerate(work.sequences):
            # A row's logits do not depend on when it is scored.
            logits[place] = np.random.default_rng((work.member, row, order)).normal(size=3)
            logits[place] += np.nan if row in self.silent else 0.0
            self.done.append((work.member, row, order))
        if self.clock() + seconds <= self.end:
            self.useful += seconds
        return seconds, BatchScored(worker, work, logits, 0, seconds)

    def seconds_to_load(self) -> float:
        self.useful += super().seconds_to_load()
        return super().seconds_to_load()

    def lives_on(self, event: Event) -> bool:
        return not (isinstance(event, WorkerFailure) and event.kind == "died")


@dataclass
class Run:
    outcome: PredictionResult
    crew: Crew
    sink: Written
    said: list[str]
    clock: SimulatedClock


def conduct(
    parts: Sequence[PlannedModel],
    *,
    stop: float = float("inf"),
    swap: str = "full",
    budget: int = 16_384,
    journal: Memory | None = None,
    asked: Callable[[SimulatedClock], int] = lambda clock: 0,
    guess: float = 1.0,
    judge: Blender | None = None,
    crew_of: type[Crew] = Crew,
    **faults: Any,
) -> Run:
    """A run; `guess` is what the conductor believes of the speed, in parts of what it is."""
    clock = SimulatedClock()
    crew = crew_of(parts, clock, end=stop, **faults)
    said: list[str] = []
    sink = Written(clock)
    believed = [PlannedModel(**{**{n: getattr(p, n) for n in p.__slots__}, "speed": guess * p.speed}) for p in parts]
    conductor = PredictionLoop(
        believed,
        LMSYS,
        judge or Judge([Calibration()] * len(parts)),
        pool=crew,
        clock=clock,
        journal=journal or Memory(),
        submission=sink,
        reporter=ProgressReporter(said.append),
        swap=swap,
        budget=budget,
        stop=stop,
    )
    conductor.resume()
    outcome = conductor.run(stop_signal=lambda: asked(clock), tick=60.0)
    sink.write(outcome.state.probabilities())
    return Run(outcome, crew, sink, said, clock)


def test_without_a_deadline_all_is_scored_once() -> None:
    run = conduct([part("a"), part("b")])
    one = inputs(400)
    assert sorted(run.crew.done) == sorted((m, r, o) for m in (0, 1) for r, o in np.argwhere(one.is_first).tolist())
    assert all(run.outcome.state.is_scored(member).all() for member in (0, 1))
    assert run.outcome.rows_left == {}


@pytest.mark.parametrize(("swap", "orders"), [("off", [{0}, {0}]), ("split", [{0}, {1}]), ("budget", [{0, 1}, {0, 1}])])
def test_swap_says_which_member_sees_which_order(swap: str, orders: list[set[int]]) -> None:
    plain = inputs(100, twins=0.0)
    run = conduct([part("a", inputs=plain), part("b", inputs=plain)], swap=swap)
    assert [{order for m, _, order in run.crew.done if m == member} for member in (0, 1)] == orders


def test_killed_at_any_moment_it_goes_on_to_the_same() -> None:
    parts = [part("a", 150), part("b", 150, share=0.3)]
    whole = conduct(parts)
    for moment in np.linspace(0, whole.clock.now, 12).tolist():
        journal = Memory()
        conduct(parts, journal=journal, asked=lambda clock, at=moment: 9 if clock.now >= at else 0)  # type: ignore[misc]
        again = conduct(parts, journal=journal)
        assert whole.sink.last is not None
        np.testing.assert_array_equal(again.sink.last, whole.sink.last)


def test_the_journal_has_the_scores_of_duplicates_for_a_run_that_does_not_know_them() -> None:
    """A run that is stopped before it has tokenised the rows writes what the journal has."""
    journal = Memory()
    whole = conduct([part(rows=150)], journal=journal)
    unknown = SequenceIndex.empty().padded(150, 2)
    stopped = conduct([part(inputs=unknown)], journal=journal)
    assert not whole.outcome.state._inputs[0].is_first.all()
    np.testing.assert_array_equal(stopped.outcome.state.logits(0), whole.outcome.state.logits(0))
    assert stopped.crew.done == []
    assert stopped.outcome.rows_left == {"a (not prepared)": 150}


def test_the_same_passes_are_made_after_a_kill() -> None:
    """Bits of a score depend on the company in its pass: it must be the same company."""
    passes: list[list[Any]] = [[], []]
    journal = Memory()
    for number, (kept, end) in enumerate([(Memory(), None), (journal, 130.0), (journal, None)]):

        class Watching(Crew):
            def do(self, worker: int, work: Job) -> tuple[float, Event]:
                passes[min(number, 1)].append(work.row_orders)  # noqa: B023
                return super().do(worker, work)

        clock = SimulatedClock()
        crew = Watching([part(rows=200)], clock)
        conductor = PredictionLoop(
            [part(rows=200)],
            LMSYS,
            Judge([Calibration()]),
            pool=crew,
            clock=clock,
            journal=kept,
            submission=Written(clock),
            swap="full",
            budget=4096,
        )
        conductor.resume()
        conductor.run(stop_signal=lambda: int(end is not None and clock.now > end), tick=60.0)  # noqa: B023
    assert set(passes[1]) == set(passes[0])


def test_first_orders_come_before_second_ones_when_time_is_short() -> None:
    full = conduct([part(rows=1500)]).outcome.seconds
    run = conduct([part(rows=1500)], stop=0.62 * full)
    known = run.outcome.state.is_scored(0)
    assert known.any(axis=1).all()
    assert 0.02 < known.all(axis=1).mean() < 0.6
    assert run.outcome.rows_left == {"a BA": run.outcome.rows_left["a BA"]}
    assert any("plan for the" in line and "a BA" in line for line in run.said)


def test_the_most_uncertain_rows_get_their_second_order() -> None:
    full = conduct([part(rows=1500)], swap="budget").outcome.seconds
    run = conduct([part(rows=1500)], swap="budget", stop=0.8 * full)
    known = run.outcome.state.is_scored(0).all(axis=1)
    first = np.random.default_rng
    logits = np.stack([first((0, row, 0)).normal(size=3) for row in range(1500)])
    chance = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    doubt = -(chance * np.log(chance)).sum(axis=1)
    own = (inputs(1500).duplicate_of == np.arange(3000).reshape(-1, 2)).all(axis=1)
    assert doubt[known & own].mean() > doubt[~known & own].mean() + 0.1


def test_a_member_that_gains_more_a_second_goes_before_a_second_order() -> None:
    full = conduct([part("a", 800), part("b", 800)]).outcome.seconds
    strong = conduct([part("a", 800), part("b", 800, gain=0.2)], stop=0.55 * full)
    weak = conduct([part("a", 800, gain_swap=0.2), part("b", 800)], stop=0.55 * full)
    assert strong.outcome.state.is_scored(1).any(axis=1).mean() > 0.7
    assert strong.outcome.state.is_scored(0).all(axis=1).mean() < 0.3
    assert weak.outcome.state.is_scored(1).any(axis=1).mean() < 0.3


def test_a_cascade_asks_its_member_for_the_uncertain_rows_alone() -> None:
    run = conduct([part("a", 300), part("b", 300, share=0.25)])
    asked = run.outcome.state.is_scored(1).any(axis=1)
    assert 0.25 <= asked.mean() < 0.3  # twins of them are known, too
    doubt = run.outcome.state.uncertainty(1)
    assert doubt[asked].min() >= np.quantile(doubt, 0.7) or doubt[asked].mean() > doubt[~asked].mean()


def test_memory_that_runs_out_halves_the_passes_and_loses_nothing() -> None:
    run = conduct([part(rows=300)], memory=3000)
    assert run.outcome.state.is_scored(0).all()
    assert any("out of memory" in line for line in run.said)
    assert run.outcome.rows_left == {}
    assert run.outcome.state.failed[0] == {}


def test_a_row_that_memory_never_suffices_for_has_the_other_order_or_the_prior_and_is_listed() -> None:
    one = inputs(50, twins=0.0)
    longest = int(one.lengths.max())
    run = conduct([part(inputs=one)], memory=longest - 1)
    rows = set(np.flatnonzero(one.lengths[:, 0] == longest).tolist())
    assert {row for row, _ in run.outcome.state.failed[0]} == rows
    assert run.sink.last is not None
    np.testing.assert_allclose(run.sink.last[list(rows)], [[0.4, 0.35, 0.25]] * len(rows))


def test_a_row_that_kills_its_worker_is_found_and_listed() -> None:
    one = inputs(60, twins=0.0)
    run = conduct([part(inputs=one)], poisoned={7})
    assert set(run.outcome.state.failed[0]) == {(7, 0), (7, 1)}
    known = run.outcome.state.is_scored(0)
    assert known[np.arange(60) != 7].all()
    assert not known[7].any()


def test_a_row_without_finite_logits_is_listed() -> None:
    run = conduct([part(inputs=inputs(40, twins=0.0))], silent={3, 4})
    assert {row for row, _ in run.outcome.state.failed[0]} == {3, 4}


def test_a_model_without_finite_logits_leaves_the_prior() -> None:
    run = conduct([part(rows=30)], silent=set(range(30)))
    assert run.sink.last is not None
    np.testing.assert_allclose(run.sink.last, [[0.4, 0.35, 0.25]] * 30)


def test_what_a_worker_keeps_for_too_long_is_done_by_another() -> None:
    class Hanging(Crew):
        """The worker that is given the second pass never comes back from it."""

        hung: int | None = None

        def do(self, worker: int, work: Job) -> tuple[float, Event]:
            seconds, event = super().do(worker, work)
            hangs = self.hung is None and work.number == 1
            self.hung = worker if hangs else self.hung
            return (1e9 if hangs else seconds), event

    clock, one = SimulatedClock(), part(inputs=inputs(60, twins=0.0))
    crew, journal = Hanging([one], clock), Memory()  # the journal refuses what is scored twice
    conductor = PredictionLoop(
        [one],
        LMSYS,
        Judge([Calibration()]),
        pool=crew,
        clock=clock,
        journal=journal,
        submission=Written(clock),
        swap="full",
        budget=8192,
    )
    outcome = conductor.run(tick=1.0)
    assert outcome.state.is_scored(0).all()
    assert crew.hung is not None
    assert clock.now < 3600


class HangingAlone(Crew):
    """A single worker that hangs in a row, and is ended when the job's limit is over."""

    row = 7

    def do(self, worker: int, work: Job) -> tuple[float, Event]:
        if self.row in {piece.row for piece in work.row_orders}:
            self.row = -1 if self.row == 7 else self.row
            return work.limit, WorkerFailure(worker, work, "died", "hung")
        return super().do(worker, work)


@pytest.mark.parametrize("always", [False, True])
def test_a_single_worker_that_hangs_costs_its_limit_and_no_row_but_one_that_always_hangs(always: bool) -> None:
    clock, one = SimulatedClock(), part(inputs=inputs(60, twins=0.0))
    crew = HangingAlone([one], clock, workers=1)
    crew.row = 8 if always else 7
    conductor = PredictionLoop(
        [one],
        LMSYS,
        Judge([Calibration()]),
        pool=crew,
        clock=clock,
        journal=Memory(),
        submission=Written(clock),
        swap="full",
        budget=8192,
    )
    outcome = conductor.run(tick=1.0)
    scored = outcome.state.is_scored(0).all(axis=1)
    assert np.flatnonzero(~scored).tolist() == ([8] if always else [])
    assert clock.now < 7200


def test_a_model_that_never_loads_is_an_error() -> None:
    class Dead(Crew):
        def _start(self) -> int:
            self._numbers += 1
            self._push(1.0, WorkerFailure(self._numbers, None, "died", "SIGKILL"))
            return self._numbers

    clock = SimulatedClock()
    conductor = PredictionLoop(
        [part()],
        LMSYS,
        Judge([Calibration()]),
        pool=Dead([part()], clock),
        clock=clock,
        journal=Memory(),
        submission=Written(clock),
        swap="full",
        budget=8192,
    )
    with pytest.raises(ModelError, match="SIGKILL"):
        conductor.run(tick=1.0)


def test_the_submission_is_never_older_than_a_minute() -> None:
    run = conduct([part(rows=600)], stop=2000.0)
    assert np.diff([0.0, *run.sink.times]).max() <= 60 + 30


def test_nothing_is_begun_after_the_time_is_over() -> None:
    run = conduct([part()], stop=0.0)
    assert run.crew.done == []
    assert run.sink.last is not None


def drifting(random: np.random.Generator, total: float) -> Callable[[float], float]:
    """Speed that wanders between 1 and a third of itself."""
    phase, waves = random.uniform(0, 6.28), random.uniform(0.5, 4)
    step = random.uniform(0.2, 0.8) * total
    jump = float(random.choice([1.0, 1.0, 1.7, 3.0]))
    calm = float(random.choice([0.0, 1.0]))
    return lambda now: (2 + calm * np.sin(phase + waves * 6.28 * now / total)) / 2 * (jump if now > step else 1.0)


def notebook(seed: int) -> tuple[Run, float, float]:
    """A notebook of any kind: its run, the time that it had, and the time that all of its work takes."""
    random = np.random.default_rng(seed)
    rows = int(random.integers(80, 300))
    members = int(random.choice([1, 1, 2, 3]))
    one = inputs(rows, seed)
    parts = [
        part(
            f"m{number}",
            inputs=one,
            load_seconds=float(random.uniform(20, 120)),
            speed=float(random.uniform(1e12, 4e12)),
        )
        for number in range(members)
    ]
    workers = int(random.choice([1, 2, 2, 4]))
    work = sum(float(LINEAR * one.lengths.sum()) / one_part.speed / workers for one_part in parts)
    stop = float(random.uniform(0.3, 1.6)) * work  # a late start is a short time
    faults: dict[str, Any] = {
        "slow": drifting(random, stop),
        "stall": float(random.choice([0.0, 0.0, 0.003])),
        "cold": float(random.choice([0.1, 1.0, 6.0])),
        "memory": float(random.choice([np.inf, np.inf, 6000, 2500])),
        "dying": float(random.choice([0.0, 0.0, 0.002])),
        "workers": workers,
        "layout": str(random.choice(["shared", "packed"])),
        "seed": seed,
    }
    swap = str(random.choice(["full", "full", "budget", "off"]))
    guess = float(random.choice([0.1, 1.0, 3.0]))
    return conduct(parts, stop=stop, swap=swap, guess=guess, budget=8192, **faults), stop, work


def judged(seeds: range) -> tuple[list[float], list[float]]:
    """Over notebooks: the part of the time used, of those with work left; and the part of rows scored, of all."""
    used, scored = [], []
    for seed in seeds:
        run, stop, _ = notebook(seed)
        assert run.clock.now <= stop + 1e-6, f"notebook {seed} was late"
        assert run.sink.last is not None
        assert len(run.sink.last) == len(run.outcome.state.is_scored(0))
        scored.append(float(run.outcome.state.is_scored(0).any(axis=1).mean()))
        if run.outcome.rows_left:
            used.append(run.crew.useful / run.crew.count / stop)
    return used, scored


def test_simulated_notebooks_end_in_time_and_use_it(pytestconfig: pytest.Config) -> None:
    """Also by the thousand: `pytest tests/inference/test_loop.py --notebooks 1000`."""
    count = pytestconfig.getoption("--notebooks")
    used, _ = judged(range(count))
    assert len(used) > 0.3 * count
    assert np.mean(used) >= 0.85


WORKERS, BUDGET = 2, 8192


@dataclass
class PlannedBlend:
    """A blend as an ensemble's file has it."""

    fitted: Blend
    calibrations: Sequence[Calibration]

    def blend(self, per_member: Sequence[Floats]) -> Floats:
        mean = self.fitted.of(np.stack(per_member), LMSYS)
        return np.where(np.isfinite(mean), mean, [0.4, 0.35, 0.25])


def seconds_of(model: PlannedModel) -> Seconds:
    """What `forecast` says of a model."""
    pending = PendingSequences(model.inputs, (0, 1))
    pending.layout = "packed"
    loads = (pending.workload_left(BUDGET, rank) for rank in (1, 2))
    passes = (LINEAR * load.tokens + QUADRATIC * load.squares for load in loads)
    return Seconds(model.load_seconds, *(one / model.speed / WORKERS for one in passes))


def planned_notebook(seed: int) -> tuple[Plan, PlannableRows, list[PlannedModel], Floats, float]:
    """A plan for a deadline, the rows that it was chosen on, the models, their logits `(M, N, 2, 3)`, and the
    deadline."""
    random, rows = np.random.default_rng(seed), 150
    index = inputs(rows, seed, twins=0.0)
    models = [
        part(f"m{place}", inputs=index, speed=float(random.uniform(1e12, 4e12)), load_seconds=20.0)
        for place in range(2)
    ]
    truth = random.normal(size=(rows, 3))
    errors = random.normal(size=(2, rows, 2, 3)) * random.uniform(0.5, 1.2, (2, 1, 1, 1))
    logits = truth[:, None] + errors
    logits[:, :, 1] = logits[:, :, 1][..., [1, 0, 2]]  # the order BA has its own columns
    targets = np.eye(3)[[random.choice(3, p=one) for one in probabilities(truth, LMSYS)]]
    both = np.stack([mean_of_orders(one, LMSYS) for one in logits])
    first = np.stack([probabilities(one[:, 0], LMSYS) for one in logits])
    data = PlannableRows(
        HeldOutRows(both, targets, np.ones(rows), LMSYS), first, [True] * 2, [seconds_of(model) for model in models]
    )
    total = sum(sum(cost) for cost in data.seconds)
    found = best_within(search(data), float(random.uniform(0.3, 0.9)) * total)
    assert found is not None
    return found.plan, data, models, logits, SPARE * found.seconds


def conduct_plan(
    notebook: tuple[Plan, PlannableRows, list[PlannedModel], Floats, float],
    seed: int,
    slow: Callable[[float], float],
    stall: float = 0.0,
) -> tuple[Run, Floats, Floats]:
    """The plan through the loop: its run, and what it foretold: probabilities `(N, 3)` and models' scores."""
    plan, data, models, logits, stop = notebook

    class Knowing(Crew):
        def do(self, worker: int, work: Job) -> tuple[float, Event]:
            seconds, event = super().do(worker, work)
            assert isinstance(event, BatchScored)
            for place, (row, order) in enumerate(work.sequences):
                event.logits[place] = logits[plan[work.member].member, row, order]
            return seconds, event

    blend = fit_plan(plan, data)
    parts = [
        PlannedModel(
            **{name: getattr(models[use.member], name) for name in PlannedModel.__slots__}
            | {"share": use.share, "swap_share": use.swap_share}
        )
        for use in plan
    ]
    judge = PlannedBlend(blend, [Calibration()] * len(plan))
    faults: dict[str, Any] = {"workers": WORKERS, "layout": "packed", "overhead": 0.0, "seed": seed}
    run = conduct(parts, stop=stop, judge=judge, crew_of=Knowing, budget=BUDGET, slow=slow, stall=stall, **faults)
    return run, probabilities_of(plan, data, blend), scored(plan, data, blend)


def within_spare(random: np.random.Generator, total: float) -> Callable[[float], float]:
    """Passes that take 0.9 to 1.3 times the foretold seconds: a plan leaves 35% to spare."""
    phase, waves = random.uniform(0, 6.28), random.uniform(0.5, 4)
    return lambda now: 1.1 + 0.2 * float(np.sin(phase + waves * 6.28 * now / total))


def test_simulated_notebooks_of_a_plan_end_in_time_with_the_foretold_loss(pytestconfig: pytest.Config) -> None:
    """A machine that drifts within the plan's spare time scores all of it. One that becomes up to three times as slow,
    and stalls for five minutes at a time, ends in time all the same, and each row that has all of its planned scores
    has the foretold probabilities."""
    count, whole = 200 if pytestconfig.getoption("--thorough") else pytestconfig.getoption("--notebooks"), 0
    for seed in range(count):
        notebook = planned_notebook(seed)
        _, data, *_, stop = notebook
        random = np.random.default_rng(seed)
        run, foretold, _ = conduct_plan(notebook, seed, within_spare(random, stop))
        assert run.clock.now <= stop, seed
        assert not run.outcome.rows_left, seed
        assert run.sink.last is not None
        assert data.rows.loss(run.sink.last) == pytest.approx(data.rows.loss(foretold), abs=0.002), seed
        run, foretold, planned = conduct_plan(notebook, seed, drifting(random, stop), 0.003)
        assert run.clock.now <= stop + 1e-6, seed
        known = np.stack([run.outcome.state.model_probabilities(member) for member in range(len(planned))])
        is_planned = np.isclose(known, planned, equal_nan=True).all(axis=(0, 2))
        np.testing.assert_allclose(run.sink.last[is_planned], foretold[is_planned], atol=1e-9)
        whole += bool(is_planned.all())
    assert whole >= count / 2


@pytest.mark.parametrize(("approach", "load", "speed"), [("finetune", 5.0, 1e3), ("classical", 60.0, 24e12)])
def test_a_member_tells_of_those_of_its_own_approach_alone(approach: str, load: float, speed: float) -> None:
    """TF-IDF counts other operations than a transformer, and loads nothing onto a GPU."""
    parts = [part("first", 50, approach=approach, speed=1e3), part("second", 50)]
    agenda = Planner(parts, cast(PredictionState, None), lambda: 0.0, swap="full", budget=2048, stop=float("inf"))
    agenda.start_model(0)
    agenda.observe_load(5.0)
    pass_of = Workload(1000.0, 0.0)
    agenda.throughput.observe(pass_of, agenda.throughput.seconds(pass_of))
    agenda.plan()
    assert agenda.load_seconds == [5.0, load]
    assert agenda.throughput_by_model[1].speed == pytest.approx(speed)


def test_units_are_scored_whole_or_not_at_all_before_a_deadline() -> None:
    """Rows of one order, in units of up to eight: a prompt whose answers are half scored can't be ranked."""
    random = np.random.default_rng(0)
    lengths = random.integers(40, 1000, (400, 1))
    plain = SequenceIndex(lengths, np.zeros(400, dtype=np.int64), np.arange(400)[:, None])
    grouped = plain.in_units(np.repeat(np.arange(50), 8), 16_384)

    def units_in_part(index: SequenceIndex) -> tuple[int, int]:
        run = conduct([part(inputs=index)], stop=stop)
        scored = run.outcome.state.is_scored(0)[:, 0].reshape(50, 8).sum(axis=1)
        return int((scored % 8 > 0).sum()), int((scored == 8).sum())

    whole = conduct([part(inputs=grouped)]).outcome.seconds
    stop = 60 + (whole - 60) / 2
    in_part, complete = units_in_part(grouped)
    assert in_part <= 5, "the last passes before the deadline"
    assert complete > 10
    assert units_in_part(plain)[0] > 20, "the shortest rows of all prompts are scored first"


def test_the_second_order_goes_to_the_share_that_is_most_uncertain_after_all_first_ones() -> None:
    index = inputs(200, twins=0.0)
    parts = [part("a", inputs=index, swap_share=0.25), part("b", inputs=index, share=0.4, swap_share=0.0)]
    for stop in (float("inf"), 36_000.0):
        run = conduct(parts, stop=stop)
        state = run.outcome.state
        assert state.is_scored(0)[:, 0].all()
        ranked = np.argsort(-state.uncertainty_in_first_order(0), kind="stable")
        assert {*np.flatnonzero(state.is_scored(0)[:, 1])} == {*ranked[:50].tolist()}
        assert state.is_scored(1).sum(axis=0).tolist() == [80, 0]
        assert not run.outcome.rows_left
        assert max(place for place, (member, _, order) in enumerate(run.crew.done) if (member, order) == (0, 0)) < min(
            place for place, (member, _, order) in enumerate(run.crew.done) if (member, order) == (0, 1)
        )


def test_a_killed_run_gives_the_second_order_to_the_same_rows() -> None:
    parts = [part(inputs=inputs(120), swap_share=0.3)]
    whole, journal = conduct(parts), Memory()
    for until in (150.0, 250.0, 300.0):
        conduct(parts, journal=journal, asked=lambda clock, until=until: int(clock() > until))  # type: ignore[misc]
    rest = conduct(parts, journal=journal)
    np.testing.assert_array_equal(rest.outcome.state.is_scored(0), whole.outcome.state.is_scored(0))
