"""Budgets: never over, nothing wasted, nothing cut that fits, nothing taken back, and A and B treated alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairclf.inputs.truncate import Ids, Kept, Marker, allot, cut, pick_rounds

FIELD = st.lists(st.integers(0, 3), max_size=30).map(lambda ids: np.array(ids, dtype=np.int32))
TURNS = st.lists(st.integers(0, 12), min_size=1, max_size=6)
HOW = st.sampled_from(["head", "tail", "head_tail"])
RATIO = st.floats(0, 1)
SHARES = st.tuples(st.floats(0.05, 1), st.floats(0.05, 1))
MINIMUMS = st.tuples(st.integers(1, 12), st.integers(1, 12))


def digits(dropped: int) -> Ids:
    """A marker as long as its number."""
    return np.full(1 + len(str(dropped)), -1, dtype=np.int32)


def none(dropped: int) -> Ids:
    return np.zeros(0, dtype=np.int32)


def spread(shares: Sequence[float], minimums: Sequence[int]) -> tuple[list[float], list[int]]:
    return [shares[0], shares[1], shares[1]], [minimums[0], minimums[1], minimums[1]]


@given(FIELD, FIELD, FIELD, SHARES, MINIMUMS, st.integers(0, 100))
def test_allotments_use_the_whole_budget_and_no_more(
    p: Ids, a: Ids, b: Ids, shares: Sequence[float], minimums: Sequence[int], budget: int
) -> None:
    fields, (weights, floors) = [p, a, b], spread(shares, minimums)
    given_out = allot(fields, weights, floors, budget)
    assert all(0 <= tokens <= len(field) for tokens, field in zip(given_out, fields, strict=True))
    spare = min(budget, sum(map(len, fields))) - sum(given_out)
    twins = sum(any(np.array_equal(one, other) for other in fields[:place]) for place, one in enumerate(fields))
    assert 0 <= spare <= twins  # what would make equal fields unequal is given to none
    if budget >= sum(floors):
        needs = (min(len(field), floor) for field, floor in zip(fields, floors, strict=True))
        assert all(tokens >= need for tokens, need in zip(given_out, needs, strict=True))


@given(FIELD, FIELD, FIELD, SHARES, MINIMUMS, st.integers(0, 100))
def test_allotments_of_a_and_b_mirror_when_their_texts_are_exchanged(
    p: Ids, a: Ids, b: Ids, shares: Sequence[float], minimums: Sequence[int], budget: int
) -> None:
    weights, floors = spread(shares, minimums)
    prompt, first, second = allot([p, a, b], weights, floors, budget)
    mirrored = allot([p, b, a], weights, floors, budget)
    if not np.array_equal(a, b):
        assert mirrored == [prompt, second, first]
    else:  # equal sides are given the same: the swapped row is the same row
        assert mirrored == [prompt, first, second]
        assert first == second


@given(FIELD, FIELD, FIELD, SHARES, MINIMUMS, st.integers(0, 99))
def test_a_larger_budget_takes_no_token_from_any_field(
    p: Ids, a: Ids, b: Ids, shares: Sequence[float], minimums: Sequence[int], budget: int
) -> None:
    weights, floors = spread(shares, minimums)
    budget += sum(floors)
    less, more = (allot([p, a, b], weights, floors, tokens) for tokens in (budget, budget + 1))
    assert all(new >= old for old, new in zip(less, more, strict=True))


def test_largest_remainders_would_take_tokens_back() -> None:
    """The Alabama paradox, which the test above would find: rounding by largest remainders is no such rule."""

    def by_remainders(budget: int) -> list[int]:
        weights = [6, 6, 2]
        exact = [budget * weight / 14 for weight in weights]
        given_out = [int(level) for level in exact]
        for index in sorted(range(3), key=lambda at: given_out[at] - exact[at])[: budget - sum(given_out)]:
            given_out[index] += 1
        return given_out

    fields = [np.zeros(99, dtype=np.int32)] * 3
    assert by_remainders(10)[2] > by_remainders(11)[2]
    assert allot(fields, [6, 6, 2], [0] * 3, 10)[2] <= allot(fields, [6, 6, 2], [0] * 3, 11)[2]


def test_what_one_field_leaves_the_others_get() -> None:
    def of(*lengths: int) -> list[Ids]:
        return [np.arange(length, dtype=np.int32) for length in lengths]

    assert allot(of(10, 200, 200), [0.2, 0.4, 0.4], [1] * 3, 110) == [10, 50, 50]
    assert allot(of(100, 5, 200), [0.2, 0.4, 0.4], [1] * 3, 100) == [31, 5, 64]
    assert allot(of(100, 200, 200), [0.2, 0.4, 0.4], [60, 1, 1], 100) == [60, 20, 20]
    assert allot(of(0, 0, 0), [1, 1, 1], [1] * 3, 7) == [0, 0, 0]


@given(TURNS, st.integers(0, 3), st.integers(0, 80), HOW, RATIO, st.sampled_from([digits, none]))
def test_a_cut_fills_its_room_and_says_what_it_took(
    turns: list[int], turn_break: int, room: int, how: str, ratio: float, marker: Marker
) -> None:
    length = sum(turns) + turn_break * (len(turns) - 1)
    kept = cut(turns, turn_break, room, how, ratio, marker)  # type: ignore[arg-type]
    assert kept.head + kept.tail + kept.dropped == length
    assert min(kept) >= 0
    if length <= room:
        assert kept == Kept(length, 0)
        return
    taken = kept.head + kept.tail + len(marker(kept.dropped)) * kept.marked
    assert taken <= room
    assert room - taken < max(1, len(marker(length)))
    assert kept.marked or room < 2 * len(marker(length))
    assert not kept.marked or room >= 2 * len(marker(kept.dropped))


@given(TURNS, st.integers(0, 3), st.integers(0, 80), HOW, RATIO, st.sampled_from([digits, none]))
def test_a_larger_room_takes_nothing_from_either_end(
    turns: list[int], turn_break: int, room: int, how: str, ratio: float, marker: Marker
) -> None:
    less, more = (cut(turns, turn_break, tokens, how, ratio, marker) for tokens in (room, room + 1))  # type: ignore[arg-type]
    if more.dropped:  # what is whole has no two ends any more
        assert more.head >= less.head
        assert more.tail >= less.tail
    assert more.dropped <= less.dropped


@pytest.mark.parametrize(
    ("how", "ratio", "head", "tail"),
    [("head", 0.5, 4, 0), ("tail", 0.5, 0, 4), ("head_tail", 1.0, 4, 0), ("head_tail", 0.0, 0, 4)],
)
def test_a_tail_of_nothing_is_nothing(how: str, ratio: float, head: int, tail: int) -> None:
    """`ids[-0:]` is everything: the cut of 1,000 tokens that gave 1,004."""
    assert cut([6], 0, 4, how, ratio, none) == Kept(head, tail, 2, marked=True)  # type: ignore[arg-type]


def test_whole_turns_stay_from_outside_to_inside() -> None:
    turns = [4, 10, 20, 10, 4]  # with breaks of 1: 52 tokens

    def ends(room: int) -> tuple[int, int]:
        kept = cut(turns, 1, room, "head_tail", 0.5, none)
        return kept.head, kept.tail

    assert ends(6) == (3, 3)  # not even the first and the last: the head of one, the tail of the other
    assert ends(10) == (5, 5)
    assert ends(15) == (10, 5)  # the head of the second turn
    assert ends(21) == (16, 5)
    assert ends(27) == (16, 11)  # the tail of the fourth
    assert ends(32) == (16, 16)
    assert ends(42) == (21, 21)  # only the third is cut: inside, by the ratio
    assert ends(51) == (26, 25)
    assert ends(52) == (52, 0)


@given(TURNS, st.integers(0, 5), st.integers(0, 60))
def test_rounds_fit_and_the_ends_are_always_seen(costs: list[int], wording: int, spare: int) -> None:
    least = [min(cost, 3) for cost in costs]
    budget = 2 * wording + least[0] + least[-1] + 4 + spare

    def gap(gone: set[int]) -> int:
        return len(digits(sum(costs[at] for at in gone))) if gone else 0

    picked = pick_rounds(costs, wording, least, budget, gap)
    seen = sorted(picked.whole + picked.partial)
    gone = set(range(len(costs))) - set(seen)
    assert {0, len(costs) - 1} <= set(seen)
    assert gone == set(range(min(gone), max(gone) + 1)) if gone else True  # one gap
    partial = min(picked.room, sum(costs[at] for at in picked.partial)) if picked.partial else 0
    assert partial >= sum(least[at] for at in picked.partial)
    total = wording * len(seen) + sum(costs[at] for at in picked.whole) + partial + gap(gone)
    assert total <= budget
    if sum(costs) + wording * len(costs) <= budget:
        assert seen == list(range(len(costs)))
        assert not picked.partial
