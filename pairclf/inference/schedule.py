"""Choose passes for the remaining time: the first order of all rows, then the passes with most gain a second."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple

MIN_SHARE = 0.01
"""A pass that would cover a smaller share of its rows is skipped."""


class CandidatePass(NamedTuple):
    """One model over its pending rows, in their first order (rank 1) or second order (rank 2).

    Attributes:
        member, rank: model and order.
        seconds: for all pending rows, by all workers together.
        load_seconds: to load the model first; 0 if it is loaded.
        gain: expected gain of the full pass, in nats a row.
    """

    member: int
    rank: int
    seconds: float
    load_seconds: float
    gain: float


class PlannedPass(NamedTuple):
    """A pass, and the share of it that fits into the remaining time, from 0 to 1."""

    candidate: CandidatePass
    share: float

    @property
    def seconds(self) -> float:
        return self.candidate.load_seconds + self.share * self.candidate.seconds


def schedule(passes: Sequence[CandidatePass], seconds: float) -> list[PlannedPass]:
    """Choose passes greedily by gain a second until the time is used up; passes after that have share 0.

    The first model's first order always comes first: rows without it get the prior. A second order requires its
    model's first order, which includes the model's load time.

    Returns:
        All passes, in the order in which they were chosen.
    """
    planned: list[PlannedPass] = []
    remaining = list(passes)
    while remaining:
        ready = [candidate for candidate in remaining if _is_ready(candidate, remaining)]
        best = max(ready, key=_gain_per_second)
        remaining.remove(best)
        of_same_model = [earlier for earlier in planned if earlier.candidate.member == best.member]
        if any(earlier.share > 0 for earlier in of_same_model):
            best = best._replace(load_seconds=0.0)
        seconds_left = seconds - best.load_seconds
        share = 1.0 if seconds_left >= best.seconds else max(0.0, seconds_left / best.seconds)
        if best[:2] == (0, 1):  # always tried: its cost is only an estimate, and without it every row has the prior
            share = max(share, MIN_SHARE)
        elif share < MIN_SHARE or any(earlier.share < 1 for earlier in of_same_model):
            share = 0.0
        planned.append(PlannedPass(best, share))
        seconds -= planned[-1].seconds if share else 0.0
    return planned


def _is_ready(candidate: CandidatePass, others: Sequence[CandidatePass]) -> bool:
    """Whether a pass may be chosen next: the first model's first order comes first, and rank 1 before rank 2."""
    first = min((other.member for other in others if other.rank == 1), default=None)
    if first == 0 and candidate[:2] != (0, 1):
        return False
    return not (candidate.rank == 2 and any(other[:2] == (candidate.member, 1) for other in others))


def _gain_per_second(candidate: CandidatePass) -> float:
    return candidate.gain / max(candidate.load_seconds + candidate.seconds, 1e-9)


def reserved_seconds(planned: Iterable[PlannedPass], member: int, rank: int) -> float:
    """Seconds reserved for other models' passes that were chosen before this pass."""
    before = takewhile(lambda earlier: earlier.candidate[:2] != (member, rank), planned)
    return sum(earlier.seconds for earlier in before if earlier.candidate.member != member and earlier.share > 0)
