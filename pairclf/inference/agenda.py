"""What is scored next: passes that are worth the time that is left, and the work that they are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pairclf.inference.backlog import Backlog, Inputs
from pairclf.inference.deadline import spoken
from pairclf.inference.pace import Pace, Shape
from pairclf.inference.schedule import Pass, Stage, reserved, schedule
from pairclf.inference.standing import ORDERS, Standing, orders_of
from pairclf.inference.work import Clock, Piece

DRIFT = 3.0
"""Both orders go together (what they share is computed once) only where the first orders of the rows that have none
would still be in time if everything became so many times slower."""

REPLAN = 8
"""Passes after which it is planned anew."""

PART = 0.05
"""Of the time that is left: a pass is to take no more of it, so that little is lost where the end cuts it off."""

HALVINGS = 6
"""Times that a pass is halved for it, at most; a first one, whose time nobody knows, three times."""


@dataclass(frozen=True, slots=True)
class Part:
    """A member of the ensemble as it is planned.

    Attributes:
        name: for people.
        inputs: its sequences.
        shape: operations of a sequence.
        speed: operations a second of one worker, a first guess.
        load: seconds to load it, a first guess.
        gain, gain_swap: nats a row that the member, and its second order, are expected to bring.
        share: part of the rows that it is asked for, the most uncertain ones.
    """

    name: str
    inputs: Inputs
    shape: Shape
    speed: float
    load: float
    gain: float
    gain_swap: float
    share: float = 1.0


class Agenda:
    """The work of one run, and the order it is done in.

    Args:
        parts: the members.
        standing: what is known, which says how uncertain a row is.
        clock: of the run.
        swap: `predict.swap`.
        budget: tokens of a forward pass to begin with.
        stop: clock time at which scoring ends; infinite: when nothing is left.
    """

    def __init__(
        self, parts: Sequence[Part], standing: Standing, clock: Clock, *, swap: str, budget: int, stop: float
    ) -> None:
        self.parts = parts
        self.swap = swap
        self.budget = budget
        """Tokens of a forward pass; lowered for a member whose memory does not suffice."""
        self.stop = stop
        self.hands = 1
        """Workers that share the work."""
        self.current = -1
        """The member at work; -1: none yet."""
        self.dropped: set[int] = set()
        """Members that can't be used."""
        self._orders = [orders_of(swap, member, part.inputs) for member, part in enumerate(parts)]
        self.backlogs = [Backlog(part.inputs, orders) for part, orders in zip(parts, self._orders, strict=True)]
        self.paces = [Pace(part.shape, part.speed) for part in parts]
        self.loads = [part.load for part in parts]
        self.stages: list[Stage] = []
        self._asked = budget
        self._standing = standing
        self._clock = clock
        self._begun: set[int] = set()
        self._again: list[tuple[Piece, ...]] = []
        self._queue: list[list[int]] = []
        self._queued: tuple[object, ...] = ()
        self._news = REPLAN

    @property
    def patient(self) -> bool:
        """Whether there is no deadline: all is done, in the same passes each time."""
        return self.stop == float("inf")

    @property
    def backlog(self) -> Backlog:
        return self.backlogs[self.current]

    @property
    def pace(self) -> Pace:
        return self.paces[self.current]

    def begin(self, member: int) -> None:
        """Turn to a member; of a cascade's, only the rows that are most uncertain by what those before it say.

        Not by its own scores: a run that goes on after a kill asks for the same rows.
        """
        self.current, self._queue, self._again, self._news = member, [], [], REPLAN
        self.budget = self._asked
        share, rows = self.parts[member].share, len(self.backlogs[member])
        if share < 1 and member not in self._begun:
            ranked = np.argsort(-self._standing.uncertainty(member), kind="stable")
            self.backlogs[member].keep(ranked[: round(share * rows)])
        self._begun.add(member)

    # --- the plan --------------------------------------------------------------------------------------------------

    def plan(self) -> None:
        """Look at what is left and at the time that is left for it."""
        self._news = 0
        passes = self._passes()
        left = self.stop - self._clock()
        self.stages = [Stage(one, 1.0) for one in passes] if self.patient else schedule(passes, left)

    def _passes(self) -> list[Pass]:
        """All that is left to do, and what it costs as it is seen now."""
        found = []
        for member, part in enumerate(self.parts):
            pace, backlog = self._pace(member), self.backlogs[member]
            load = 0.0 if member == self.current else self.loads[member]
            share = part.share if member not in self._begun else 1.0
            for rank, gain in ((1, part.gain), (2, part.gain_swap)):
                left = backlog.left(self.budget, rank)
                if left.tokens and member not in self.dropped:
                    seconds = share * pace.seconds(left) * pace.margin / self.hands
                    found.append(Pass(member, rank, seconds, load, gain * share))
        return found

    def _pace(self, member: int) -> Pace:
        """A member's own, or one of the speed of the member at work, where it has not begun yet."""
        if self.current >= 0 and self.pace.known and not self.paces[member].known:
            self.paces[member] = Pace(self.parts[member].shape, self.pace.speed)
        return self.paces[member]

    def loaded(self, seconds: float) -> None:
        """The member at work took so long to load; others are expected to take as long for their size."""
        size = self.parts[self.current].shape.linear
        for member, part in enumerate(self.parts):
            if member not in self._begun or member == self.current:
                self.loads[member] = seconds * part.shape.linear / size

    def name(self, member: int, rank: int) -> str:
        """`fold0 BA`."""
        return f"{self.parts[member].name} {ORDERS[self._orders[member][rank - 1]]}"

    def told(self) -> str:
        """The plan for people: what is done, what in part, and what there is no time for."""
        whole = [f"{self.name(*one.of[:2])} {spoken(one.seconds)}" for one in self.stages if one.share == 1]
        part = [f"{one.share:.0%} of {self.name(*one.of[:2])}" for one in self.stages if 0 < one.share < 1]
        none = [f"not {self.name(*one.of[:2])}" for one in self.stages if one.share == 0]
        return ", ".join([*whole, *part, *none])

    def worth_a_return(self) -> set[int]:
        """Members that something is planned for; of those left before, where it takes longer than to load them."""
        planned: dict[int, float] = {}
        for stage in self.stages:
            if stage.share > 0:
                planned[stage.of.member] = planned.get(stage.of.member, 0.0) + stage.share * stage.of.seconds
        left = self._begun - {self.current}
        return {member for member, seconds in planned.items() if member not in left or seconds > self.loads[member]}

    @property
    def gist(self) -> dict[tuple[int, int], int]:
        """What is done of each pass, all, a part or nothing: where that stays, there is nothing new to say."""
        return {one.of[:2]: math.ceil(one.share) + math.floor(one.share) for one in self.stages}

    # --- the work --------------------------------------------------------------------------------------------------

    def next(self, free_at: float) -> tuple[Piece, ...]:
        """What the present member is to do next; nothing, where nothing is left or will be in time.

        Args:
            free_at: clock time at which a worker is expected to begin with it.
        """
        self._news += 1
        if self._news > REPLAN:
            self.plan()
        if self._again:
            return self._give(self._again.pop())
        if self.patient:
            return self._give(self._longest(None))
        rank = 1 if self.backlog.rows(1).any() else 2
        until = self.stop - reserved(self.stages, self.current, rank)
        share = self._planned(rank)
        if rank == 1 and self._both_in_time(until):
            return self._give(self._longest(None))
        if self.current == 0 and rank == 1:  # whatever else is planned: a row without a score comes first
            until = self.stop
        if share == 0:
            return ()
        if self.current == 0 and rank == 1 and share == 1:
            return self._give(self._in_time(self._longest(rank), until - free_at))
        return self._give(self._in_time(self._worthiest(rank), until - free_at))

    def _give(self, pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
        self.backlog.give(pieces)
        return pieces

    def _planned(self, rank: int) -> float:
        """What part of a pass of the present member there is time for."""
        return next((one.share for one in self.stages if one.of[:2] == (self.current, rank)), 0.0)

    def _both_in_time(self, until: float) -> bool:
        """Whether both orders of all rows that are left will be, if they go together; see `DRIFT`."""
        if self.swap != "full" or self._planned(2) < 1:
            return False
        left = until - self._clock()
        both = self.pace.seconds(self.backlog.left(self.budget)) * self.pace.margin / self.hands
        first = self.pace.seconds(self.backlog.left(self.budget, 1)) / self.hands
        return both <= left and DRIFT * first <= left

    def _size(self) -> int:
        """Tokens of a pass: the budget, halved as `PART` asks for."""
        if self.patient:
            return self.budget
        halvings = 3.0
        if self.pace.known:
            whole = self.backlog.left(self.budget)
            seconds = self.pace.seconds(whole) / max(whole.passes, 1.0)
            halvings = np.ceil(np.log2(max(1.0, seconds / max(PART * (self.stop - self._clock()), 1e-9))))
        return max(1, self.budget >> int(min(halvings, HALVINGS)))

    def _longest(self, rank: int | None) -> tuple[Piece, ...]:
        """The next of the passes that were made up of all that is wanted, longest rows first."""
        key = ("longest", rank, size := self._size())
        if self._queued != key or not self._queue:
            self._queue, self._queued = self.backlog.batches(size, rank)[::-1], key
        return self._from_queue(rank)

    def _worthiest(self, rank: int) -> tuple[Piece, ...]:
        """A pass over the most uncertain rows, for what they cost; with `swap=budget` whatever they cost."""
        key = ("worthiest", rank, size := self._size())
        if self._queued != key or not self._queue:
            costs = self.backlog.costs(rank)
            worth = self._standing.uncertainty() * self.backlog.rows(rank)
            if self.swap != "budget" or rank == 1:
                worth = worth / np.maximum(costs, 1)
            ranked = np.argsort(-worth, kind="stable")[: np.count_nonzero(worth)]
            padded = self.backlog.layout == "padded"
            self._queue = _cut(ranked.tolist(), costs.tolist(), size, REPLAN, padded=padded)[::-1]
            self._queued = key
        return self._from_queue(rank)

    def _from_queue(self, rank: int | None) -> tuple[Piece, ...]:
        """The next pass of which anything is left."""
        while self._queue:
            if pieces := self.backlog.pieces(self._queue.pop(), rank):
                return tuple(pieces)
        return ()

    def _in_time(self, pieces: tuple[Piece, ...], seconds: float) -> tuple[Piece, ...]:
        """So many of them as one worker will do in these seconds."""
        while pieces and self.pace.known and self.seconds(pieces) * self.pace.margin > seconds:
            pieces = pieces[: len(pieces) // 2]
        return pieces

    def seconds(self, pieces: Sequence[Piece]) -> float:
        """That a worker is expected to take."""
        return self.pace.seconds(self.backlog.load_of(pieces))

    def again(self, pieces: tuple[Piece, ...], *, whole: bool) -> None:
        """These failed together: try them again as they are, or in halves."""
        self._again += [pieces] if whole else _halves(pieces)

    def lower(self, tokens: float) -> bool:
        """Memory did not suffice for so many tokens: half of them from here on. Whether that is news."""
        lower = max(1, int(tokens) // 2)
        if lower >= self.budget:
            return False
        self.budget = lower
        return True

    def settle(self) -> None:
        """What was to be tried again is left undone."""
        for pieces in self._again:
            self.backlog.take_back(pieces)
        self._again = []


def _cut(rows: Sequence[int], costs: Sequence[int], budget: int, most: int, *, padded: bool) -> list[list[int]]:
    """Rows in their order, in at most so many passes of `budget` tokens, padding included where there is any."""
    found: list[list[int]] = []
    size = longest = 0
    for row in rows:
        longest = max(longest, costs[row])
        grown = (len(found[-1]) + 1) * longest if padded and found else size + costs[row]
        if not found or grown > budget:
            if len(found) == most:
                break
            found.append([])
            grown = longest = costs[row]
        found[-1].append(row)
        size = grown
    return found


def _halves(pieces: tuple[Piece, ...]) -> list[tuple[Piece, ...]]:
    """Half of the pieces and the other half; of one piece in two orders, each order."""
    if len(pieces) == 1:
        row, orders = pieces[0]
        return [(Piece(row, (order,)),) for order in orders]
    middle = len(pieces) // 2
    return [pieces[:middle], pieces[middle:]]
