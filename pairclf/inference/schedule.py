"""Which passes are worth the time that is left: the first order of all rows, then what gains most a second."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple

WORTH = 0.01
"""A pass that would reach fewer of its rows is not begun."""


class Pass(NamedTuple):
    """What could be done: a member over its rows in their first order (rank 1) or their second.

    Attributes:
        member, rank: which.
        seconds: of all that is left of it, by all workers together.
        load: seconds to load the member first; 0 where it is loaded.
        gain: nats a row that all of it is expected to bring.
    """

    member: int
    rank: int
    seconds: float
    load: float
    gain: float


class Stage(NamedTuple):
    """A pass, and what part of it there is time for, from 0 to 1."""

    of: Pass
    share: float

    @property
    def seconds(self) -> float:
        return self.of.load + self.share * self.of.seconds


def schedule(passes: Sequence[Pass], seconds: float) -> list[Stage]:
    """Choose passes for the time that is left, most gain a second first; all of them, with the share 0 where it ends.

    The first member's first order goes before all else: a row without it has the prior. A second order needs its
    member's first, which also pays for loading the member.

    Returns:
        Stages in the order they were chosen in.
    """
    stages: list[Stage] = []
    open_passes = list(passes)
    while open_passes:
        ready = [one for one in open_passes if _is_ready(one, open_passes)]
        best = max(ready, key=_worth)
        open_passes.remove(best)
        loaded = any(stage.of.member == best.member and stage.share > 0 for stage in stages)
        best = best._replace(load=0.0) if loaded else best
        room = seconds - best.load
        share = 1.0 if room >= best.seconds else max(0.0, room / best.seconds)
        before = [stage for stage in stages if stage.of.member == best.member]
        if best[:2] == (0, 1):  # tried in any case: costs are expected, and without it there is the prior alone
            share = max(share, WORTH)
        elif share < WORTH or any(stage.share < 1 for stage in before):
            share = 0.0
        stages.append(Stage(best, share))
        seconds -= stages[-1].seconds if share else 0.0
    return stages


def _is_ready(one: Pass, others: Sequence[Pass]) -> bool:
    first = min((other.member for other in others if other.rank == 1), default=None)
    mandatory = first == 0 and not (one.member == 0 and one.rank == 1)
    return not mandatory and not (one.rank == 2 and any(o.member == one.member and o.rank == 1 for o in others))


def _worth(one: Pass) -> float:
    return one.gain / max(one.load + one.seconds, 1e-9)


def reserved(stages: Iterable[Stage], member: int, rank: int) -> float:
    """Seconds that other members' stages are to have before this one, as they were chosen before it."""
    before = takewhile(lambda stage: stage.of[:2] != (member, rank), stages)
    return sum(stage.seconds for stage in before if stage.of.member != member and stage.share > 0)
