"""Truncate a row that is longer than its budget: allot tokens to its fields, and choose the tokens that stay.

Every rule looks at one row alone and treats what a swap exchanges alike, so that a row's tokens never depend on its
neighbours, and order BA holds exactly the slices of order AB. More budget never takes a token away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pairclf.config import Truncation

Ids = NDArray[np.int32]
Marker = Callable[[int], Ids]
"""The tokens that stand where so many others were cut away; always empty where no marker is wanted."""


class Kept(NamedTuple):
    """The part of a field with `n` tokens that stays: `ids[:head]` and `ids[n - tail:]`; `dropped` tokens lay between.

    `marked` says whether the marker for them still has room.
    """

    head: int
    tail: int
    dropped: int = 0
    marked: bool = False


def allot(fields: Sequence[Ids], shares: Sequence[float], minimums: Sequence[int], budget: int) -> list[int]:
    """Tokens that each field may take, by water-filling.

    A field that needs less than its share leaves the rest to those that lack, in proportion to their shares; none
    falls below its minimum while the budget holds all minimums. Single tokens are given as D'Hondt's method gives
    seats, which is the one that never takes a seat back when there are more of them; ties go by content, not by
    place, so that the allotments of A and B mirror when their texts are exchanged.

    Args:
        fields: token ids of each field, uncut.
        shares: a positive weight a field; only their proportions count.
        minimums: tokens a field, at least 0.
        budget: tokens to be given out, at least 0.

    Returns:
        One number a field, at most its length; they sum to `min(budget, total length)`, or a token or two less
        where equal fields would not get the same.

    >>> allot([np.arange(10), np.arange(50), np.arange(90)], [1, 1, 1], [1, 1, 1], 90)
    [10, 40, 40]
    """
    lengths = [len(ids) for ids in fields]
    if sum(lengths) <= budget:
        return lengths
    weights = [round(share * 1_000_000) for share in shares]
    floors = [min(length, least) for length, least in zip(lengths, minimums, strict=True)]
    if sum(floors) > budget:
        floors = [0] * len(fields)
    allotted = _water_level(lengths, weights, floors, budget)

    def claim(index: int) -> tuple[Fraction, int, bytes]:
        return Fraction(allotted[index] + 1, weights[index]), -lengths[index], fields[index].tobytes()

    for _ in range(budget - sum(allotted)):
        allotted[min((index for index in range(len(fields)) if allotted[index] < lengths[index]), key=claim)] += 1
    for first, second in combinations(range(len(fields)), 2):
        alike = (weights[first], floors[first]) == (weights[second], floors[second])
        if alike and np.array_equal(fields[first], fields[second]):
            # A token's price for equal sides to look equal.
            allotted[first] = allotted[second] = min(allotted[first], allotted[second])
    return allotted


def _water_level(lengths: Sequence[int], weights: Sequence[int], floors: Sequence[int], budget: int) -> list[int]:
    """`clamp(floor(level * weight), floor, length)` for the level at which the unrounded values sum to `budget`.

    The level is found as CSS resolves flexible lengths (https://www.w3.org/TR/css-flexbox-1/#resolve-flexible-lengths):
    whoever breaks a bound is fixed at it, first on the side where the bounds take or give more in all.
    """
    allotted = list(floors)
    free = [index for index, length in enumerate(lengths) if floors[index] < length]
    while free:
        left = budget - sum(allotted[index] for index in range(len(allotted)) if index not in free)
        total = sum(weights[index] for index in free)
        above = {index: left * weights[index] - lengths[index] * total for index in free}
        below = {index: floors[index] * total - left * weights[index] for index in free}
        full = [index for index in free if above[index] >= 0]
        short = [index for index in free if below[index] >= 0]
        if not full and not short:
            for index in free:
                allotted[index] = left * weights[index] // total
            break
        side = full if sum(above[index] for index in full) > sum(below[index] for index in short) else short or full
        for index in side:
            allotted[index] = (lengths if side is full else floors)[index]
        free = [index for index in free if index not in side]
    return allotted


def cut(turns: Sequence[int], turn_break: int, room: int, how: Truncation, head_ratio: float, marker: Marker) -> Kept:
    """Bring one field down to `room` tokens, marker included.

    `head` keeps its first tokens and `tail` its last. `head_tail` keeps both ends: whole turns from outside to inside
    (the first, the last, the second, ...), and of the one turn that does not fit what lies at the kept end, or, if
    no other turn is gone, its head and tail by `head_ratio`. Where the ends alone do not fit, the field is cut
    between the head of its first turn and the tail of its last. So one piece is missing, and one marker says so.

    Args:
        turns: tokens of each turn.
        turn_break: tokens between two turns; they count as the field's own.
        room: tokens that the field may take, at least 0.

    >>> cut([6], 0, 5, "head_tail", 0.5, lambda dropped: np.zeros(1, np.int32))
    Kept(head=2, tail=2, dropped=2, marked=True)
    >>> cut([4, 90, 90, 4], 1, 24, "head_tail", 0.5, lambda dropped: np.zeros(1, np.int32))
    Kept(head=18, tail=5, dropped=168, marked=True)
    """
    length = sum(turns) + turn_break * max(0, len(turns) - 1)
    if length <= room:
        return Kept(length, 0)
    keep, marked = _own_tokens(length, room, marker)
    head = keep if how == "head" else 0
    if how == "head_tail":
        head = _outside_in(turns, turn_break, keep, head_ratio)
    return Kept(head, keep - head, length - keep, marked)


def _own_tokens(length: int, room: int, marker: Marker) -> tuple[int, bool]:
    """The most tokens that may stay of `length`, and whether a marker for the others has room beside them.

    Where it would take more than half of the room, tokens stand in its place: as many as a marker has, and no more,
    so that none has to go again in a larger room, which holds the marker as well.
    """
    beside = next((keep for keep in range(room, 0, -1) if keep + len(marker(length - keep)) <= room), 0)
    instead = min(room, len(marker(length)))
    marked = beside >= instead and beside + len(marker(length - beside)) <= room
    return max(beside, instead), marked


def _outside_in(turns: Sequence[int], turn_break: int, keep: int, ratio: float) -> int:
    """How many of `keep` tokens stand at the head. A break belongs to the outer of the two turns that it parts."""
    if len(turns) == 1:
        return round(keep * ratio)
    head, tail = turns[0] + turn_break, turns[-1] + turn_break * (len(turns) > 2)
    if head + tail >= keep:
        return min(max(round(keep * ratio), keep - tail), head)
    left, right = 1, len(turns) - 2
    while left < right:
        if turns[left] + turn_break > keep - head - tail:
            return keep - tail
        head, left = head + turns[left] + turn_break, left + 1
        if left < right:
            if turns[right] + turn_break > keep - head - tail:
                return head
            tail, right = tail + turns[right] + turn_break, right - 1
    return head + round((keep - head - tail) * ratio)


class Rounds(NamedTuple):
    """Which rounds of an interleaved row are seen, in reading order.

    Attributes:
        whole: rounds that are shown uncut.
        partial: rounds whose turns share `room` tokens.
        room: tokens for the turns of the partial rounds.
    """

    whole: tuple[int, ...]
    partial: tuple[int, ...]
    room: int


def pick_rounds(
    costs: Sequence[int], wording: int, least: Sequence[int], budget: int, gap: Callable[[set[int]], int]
) -> Rounds:
    """Whole rounds from outside to inside (the first, the last, the second, ...), then one that is cut inside.

    The first and the last are always seen, and cut both if they do not fit together.

    Args:
        costs: tokens of the turns of each round.
        wording: tokens of the template in one round.
        least: tokens of its turns below which a round is left out rather than cut.
        budget: tokens for all rounds, at least two wordings, what the ends need at least, and a gap.
        gap: tokens of the marker for the rounds that are left out.
    """
    rounds = len(costs)
    if sum(costs) + wording * rounds <= budget:  # where the rest is smaller than the marker for it, too
        return Rounds(tuple(range(rounds)), (), 0)
    inwards = sorted(range(rounds), key=lambda index: (min(index, rounds - 1 - index), index))
    whole: list[int] = []
    for place, index in enumerate(inwards):
        left_out = set(inwards[place + 1 :])
        room = budget - gap(left_out) - sum(costs[chosen] for chosen in whole) - wording * (len(whole) + 1)
        if costs[index] <= room:
            whole.append(index)
            continue
        if len(whole) < 2:
            break
        return Rounds(tuple(sorted(whole)), (index,) if room >= least[index] else (), room)
    ends = tuple(sorted(inwards[:2]))
    return Rounds((), ends, budget - gap(set(inwards[2:])) - wording * len(ends))
