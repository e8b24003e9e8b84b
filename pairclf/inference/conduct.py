"""The conductor of a prediction.

    agenda -> work -> crew -> logits -> journal, standing -> submission
      ^                         |
      +------- pace learnt -----+

It knows neither processes nor the time of day: crew and clock are given from outside, and a simulated notebook is
conducted by this same code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pairclf.errors import ModelError
from pairclf.inference.agenda import Agenda, Part
from pairclf.inference.deadline import spoken
from pairclf.inference.standing import Judge, Standing
from pairclf.inference.work import Clock, Crew, Event, Failed, Floats, Piece, Ready, Scored, Work
from pairclf.task import Task

DEATHS = 10
"""Times in a row that workers may die at work before a member is given up: a row that kills its worker is found within
them. While loading, a worker that dies twice will do so again."""


STALLED, PATIENCE = 20.0, 5.0
"""Seconds, and times what is expected, after which a pass is given to a second worker that has nothing else to do."""


class Journal(Protocol):
    """Where scores survive a kill (`journal.Journal`)."""

    def add(self, member: int, sequences: Sequence[tuple[int, int]], logits: Floats) -> None: ...
    def fail(self, member: int, row: int, order: int, what: str) -> None: ...
    def scored(self) -> Iterable[tuple[int, int, int, Floats]]: ...
    def failed(self) -> Iterable[tuple[int, int, int, str]]: ...


class Sink(Protocol):
    """Where the best known goes (`sink.Sink`)."""

    def due(self, now: float) -> bool: ...
    def write(self, probabilities: Floats) -> None: ...


class Nowhere:
    """A journal and a submission that nobody wants."""

    def add(self, member: int, sequences: Sequence[tuple[int, int]], logits: Floats) -> None: ...
    def fail(self, member: int, row: int, order: int, what: str) -> None: ...
    def scored(self) -> list[tuple[int, int, int, Floats]]:
        return []

    def failed(self) -> list[tuple[int, int, int, str]]:
        return []

    def due(self, now: float) -> bool:
        return False

    def write(self, probabilities: Floats) -> None: ...


@dataclass(frozen=True, slots=True)
class Report:
    """Who is told: `say` a line for people; `advance` a member's name, its sequences scored, and all of them."""

    say: Callable[[str], None]
    advance: Callable[[str, int, int], None]


@dataclass(slots=True)
class Outcome:
    """What came of a run.

    Attributes:
        standing: all that is known.
        seconds: that it took.
        passes: forward passes that came back.
        tokens: that they computed.
        rescued: sequences that were scored again in float32.
        left: rows that there was no time for, by pass (`fold0 BA`).
        lost: members that could not be used, and why.
        stopped: number of the signal that ended it; 0: none did.
    """

    standing: Standing
    seconds: float = 0.0
    passes: int = 0
    tokens: float = 0.0
    rescued: int = 0
    left: dict[str, int] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    stopped: int = 0


class Conductor:
    """One run.

    Args:
        parts: the members, in the order they are asked.
        task: for the swap.
        judge: how members are blended.
        crew: the workers.
        clock: of the run.
        journal: what was scored before, and will be.
        sink: where the submission is written.
        report: who is told.
        swap: `predict.swap`.
        budget: tokens of a forward pass to begin with.
        stop: clock time at which scoring ends; infinite: when nothing is left.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        task: Task,
        judge: Judge,
        *,
        crew: Crew,
        clock: Clock,
        journal: Journal,
        sink: Sink,
        report: Report,
        swap: str,
        budget: int,
        stop: float = float("inf"),
    ) -> None:
        self.standing = Standing([part.inputs for part in parts], task, judge, swap)
        self.agenda = Agenda(parts, self.standing, clock, swap=swap, budget=budget, stop=stop)
        self.outcome = Outcome(self.standing)
        self._crew = crew
        self._clock = clock
        self._journal = journal
        self._sink = sink
        self._report = report
        self._warm: dict[int, bool] = {}  # workers, and whether their first pass is behind them
        self._ready: set[int] = set()
        self._flying: dict[int, Work] = {}
        self._free_at = clock()  # when the workers are expected to be through with what they have
        self._deaths = 0
        self._tries: Counter[tuple[Piece, ...]] = Counter()
        self._works = 0
        self._resumed = 0
        self._since: dict[int, float] = {}  # when each work was given; those that were given twice have none
        self._said: set[str] = set()
        self._gist: dict[tuple[int, int], int] = {}

    def resume(self) -> int:
        """Take what the journal has; the number of sequences that are not to be scored again."""
        count = 0
        for member, row, order, logits in self._journal.scored():
            self.standing.add(member, [(row, order)], logits[None])
            self.agenda.backlogs[member].give([Piece(row, (order,))])
            count += 1
        for member, row, order, what in self._journal.failed():
            self.standing.fail(member, [(row, order)], what)
            self.agenda.backlogs[member].give([Piece(row, (order,))])
        self._resumed = count
        if count:
            self._sink.write(self.standing.probabilities())
        return count

    # --- the loop --------------------------------------------------------------------------------------------------

    def run(self, *, asked: Callable[[], int], tick: float) -> Outcome:
        """Score until nothing is left, or no time, or somebody asks to stop. The crew is closed in any case.

        Args:
            asked: the number of the signal that came, or 0.
            tick: seconds after which `asked` is looked at again.

        Raises:
            PairclfError: no member could be loaded; as the last one said it.
        """
        start = self._clock()
        try:
            for member in self._members():
                self._turn_to(member)
                while member not in self.agenda.dropped and not self._over() and not asked():
                    self._feed()
                    if self._ready and not self._flying:
                        break
                    for event in self._crew.wait(min(tick, max(0.0, self.agenda.stop - self._clock()))):
                        self._handle(event)
                    if self.outcome.passes and self._sink.due(self._clock()):
                        self._sink.write(self.standing.probabilities())
                self._put_down()
                if asked():
                    break
        finally:
            self._crew.close()
        self.outcome.stopped = asked()
        self.outcome.seconds = self._clock() - start
        self.outcome.left = dict(self._left())
        return self.outcome

    def _over(self) -> bool:
        return self._clock() >= self.agenda.stop

    def _members(self) -> Iterator[int]:
        """Members that something is planned for, while there is time; none again that found nothing it could do, until
        others have changed what is left."""
        through: set[int] = set()
        while not self._over():
            self.agenda.plan()
            wanted = self.agenda.worth_a_return() - through
            if not wanted:
                return
            member = self.agenda.current if self.agenda.current in wanted else min(wanted)
            passes = self.outcome.passes
            yield member
            through = through | {member} if self.outcome.passes == passes else {member}

    def _turn_to(self, member: int) -> None:
        self.agenda.begin(member)
        self._warm = dict.fromkeys(self._crew.load(member), False)
        self._ready, self._deaths, self._tries, self._said = set(), 0, Counter(), set()
        self._report.say(f"{self._name}: loading")
        self._free_at = self._clock()
        self.agenda.hands = len(self._warm)

    def _feed(self) -> None:
        """Give the workers what they can take: what they do, and one pass each in store."""
        while self._ready and len(self._flying) < 2 * len(self._ready):
            pieces = self.agenda.next(max(self._free_at, self._clock()))
            self._tell_plan()
            if not pieces:
                self._give_again()
                return
            work = Work(self._works, self.agenda.current, pieces)
            self._works += 1
            self._flying[work.number], self._since[work.number] = work, self._clock()
            self._free_at = max(self._free_at, self._clock()) + self.agenda.seconds(pieces) / self.agenda.hands
            self._crew.submit(work)

    def _give_again(self) -> None:
        """With nothing else to do, what a worker keeps for too long is asked of another; the first answer counts."""
        for number, work in self._flying.items():
            late = max(STALLED, PATIENCE * len(self._flying) * self.agenda.seconds(work.pieces))
            if len(self._ready) > 1 and self._clock() - self._since.get(number, self._clock()) > late:
                del self._since[number]
                self._crew.submit(work)

    def _tell_plan(self) -> None:
        """The plan, where it is another one than was told."""
        agenda = self.agenda
        if not agenda.pace.known or (self._gist and (agenda.patient or not agenda.gist.items() - self._gist.items())):
            return
        self._gist = agenda.gist
        if agenda.patient:
            self._report.say(f"all of it is expected to take {spoken(sum(one.seconds for one in agenda.stages))} more")
        else:
            self._report.say(f"plan for the {spoken(agenda.stop - self._clock())} of scoring left: {agenda.told()}")

    def _put_down(self) -> None:
        """Nobody will do what is still flying."""
        for work in self._flying.values():
            self.agenda.backlogs[work.member].take_back(work.pieces)
        self._flying = {}
        self.agenda.settle()

    def _left(self) -> Iterator[tuple[str, int]]:
        for member, backlog in enumerate(self.agenda.backlogs):
            for rank in (1, 2):
                if rows := int(backlog.rows(rank).sum()):
                    yield self.agenda.name(member, rank), rows

    # --- what comes back -------------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        if isinstance(event, Ready):
            self._on_ready(event)
            return
        if event.work is not None and event.work.number not in self._flying:  # somebody else was asked, and faster
            if isinstance(event, Scored) or event.kind != "died":
                return
            event = event._replace(work=None)
        if event.work is not None:
            self._land(event.work)
        if isinstance(event, Scored):
            self._on_scored(event)
        elif event.kind == "died":
            self._on_death(event)
        elif event.work is None:
            self._on_no_load(event)
        else:
            self._on_failed(event, event.work)

    def _land(self, work: Work) -> None:
        del self._flying[work.number]
        self._since.pop(work.number, None)
        ahead = sum(self.agenda.seconds(one.pieces) for one in self._flying.values())
        self._free_at = self._clock() + ahead / self.agenda.hands

    def _on_ready(self, event: Ready) -> None:
        self._ready.add(event.worker)
        self.agenda.loaded(event.seconds)
        self.agenda.budget = min(self.agenda.budget, event.budget or self.agenda.budget)
        for backlog in self.agenda.backlogs:
            backlog.layout = event.layout
        if event.what not in self._said:  # several workers say the same
            self._said.add(event.what)
            self._report.say(f"{self._name}: {event.what}")

    @property
    def _name(self) -> str:
        return self.agenda.parts[self.agenda.current].name

    def _on_scored(self, event: Scored) -> None:
        member, sequences = self.agenda.current, event.work.sequences
        load = self.agenda.backlog.load_of(event.work.pieces)
        self.agenda.pace.learn(load, event.seconds, warming_up=not self._warm.get(event.worker, True))
        self._warm[event.worker] = True
        self._deaths = 0
        self.outcome.passes += 1
        self.outcome.tokens += load.tokens
        self.outcome.rescued += event.rescued
        finite = np.asarray(np.isfinite(event.logits).all(axis=1))
        known = [one for one, sound in zip(sequences, finite, strict=True) if sound]
        self.standing.add(member, known, event.logits[finite])
        self._journal.add(member, known, event.logits[finite])
        lost = [one for one, sound in zip(sequences, finite, strict=True) if not sound]
        self._give_up(lost, "its logits are not finite, in float32 either")
        self._report.advance(self._name, *self._progress())

    def _progress(self) -> tuple[int, int]:
        wanted, todo = self.agenda.backlog.rank > 0, self.agenda.backlog.todo
        flying = sum(len(work.sequences) for work in self._flying.values())
        return int((wanted & ~todo).sum()) - flying, int(wanted.sum())

    def _give_up(self, sequences: Sequence[tuple[int, int]], why: str) -> None:
        self.standing.fail(self.agenda.current, sequences, why)
        for row, order in sequences:
            self._journal.fail(self.agenda.current, row, order, why)

    def _on_failed(self, event: Failed, work: Work) -> None:
        """Try again in halves, down to one sequence, and that twice: the memory of another process may be back."""
        if event.kind == "memory" and self.agenda.lower(self.agenda.backlog.load_of(work.pieces).tokens):
            self._report.say(f"out of memory: {self.agenda.budget:,} tokens in a forward pass from here on")
        self._tries[work.pieces] += 1
        lone = len(work.sequences) == 1
        if lone and self._tries[work.pieces] > 1:
            self._give_up(work.sequences, event.what)
            return
        self.agenda.again(work.pieces, whole=lone or (event.kind == "died" and self._tries[work.pieces] == 1))

    def _on_death(self, event: Failed) -> None:
        """The work was innocent, if something else killed the worker: it is tried once more as it is."""
        self._warm.pop(event.worker, None)
        self._ready.discard(event.worker)
        self._report.say(f"{self._name}: a worker died ({event.what})")
        if event.work is not None:
            self._on_failed(event, event.work)
        self._deaths += 1 if event.work is not None else DEATHS // 2
        if self._deaths < DEATHS:
            self._warm[self._crew.restart(event.worker)] = False
        else:
            self._without(event)

    def _on_no_load(self, event: Failed) -> None:
        self._warm.pop(event.worker, None)
        self._without(event)

    def _without(self, event: Failed) -> None:
        """Go on without the worker; where it was the last, without the member, if there is anything to go on with."""
        self.agenda.hands = max(1, len(self._warm))
        if self._warm:
            return
        self.agenda.dropped.add(self.agenda.current)
        self.outcome.lost[self._name] = event.what
        self._report.say(f"{self._name} is given up: {event.what}")
        if len(self.agenda.dropped) == len(self.agenda.parts) and not self.outcome.passes and not self._resumed:
            raise event.error or ModelError(f"{self._name} can't be loaded: {event.what}")
