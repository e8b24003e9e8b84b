"""Budgets: never over, nothing wasted, nothing cut that fits, and A and B treated alike."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairclf.inputs.truncate import Ids, Kept, allot, cut

FIELD = st.lists(st.integers(0, 3), max_size=30)
HOW = st.sampled_from(["head", "tail", "head_tail"])
SHARES = st.tuples(st.floats(0.05, 1), st.floats(0.05, 1))


@given(FIELD, FIELD, FIELD, SHARES, st.integers(0, 100))
def test_allotments_use_the_whole_budget_and_no_more(
    p: Ids, a: Ids, b: Ids, shares: Sequence[float], budget: int
) -> None:
    fields = [p, a, b]
    given_out = allot(fields, [shares[0], shares[1], shares[1]], budget)
    assert all(0 <= tokens <= len(field) for tokens, field in zip(given_out, fields, strict=True))
    assert sum(given_out) == min(budget, sum(map(len, fields)))


@given(FIELD, FIELD, FIELD, SHARES, st.integers(0, 100))
def test_allotments_of_a_and_b_mirror_when_their_texts_are_exchanged(
    p: Ids, a: Ids, b: Ids, shares: Sequence[float], budget: int
) -> None:
    weights = [shares[0], shares[1], shares[1]]
    prompt, first, second = allot([p, a, b], weights, budget)
    mirrored = allot([p, b, a], weights, budget)
    if a != b:
        assert mirrored == [prompt, second, first]
    else:  # the swapped row is the same row: it must be given the same
        assert mirrored == [prompt, first, second]


@given(FIELD, FIELD, FIELD, st.integers(0, 99))
def test_a_larger_budget_takes_nothing_away_in_all(p: Ids, a: Ids, b: Ids, budget: int) -> None:
    less, more = (allot([p, a, b], [1, 1, 1], tokens) for tokens in (budget, budget + 1))
    assert sum(more) in (sum(less), sum(less) + 1)
    assert all(new >= old - 1 for old, new in zip(less, more, strict=True))


def test_what_one_field_leaves_the_others_get() -> None:
    assert allot([range(10), range(200), range(200)], [0.2, 0.4, 0.4], 110) == [10, 50, 50]
    assert allot([range(100), range(5), range(200)], [0.2, 0.4, 0.4], 100) == [32, 5, 63]
    assert allot([[], [], []], [1, 1, 1], 7) == [0, 0, 0]


@given(st.lists(st.integers(10, 99), max_size=40, unique=True), st.integers(0, 45), HOW, st.floats(0, 1))
def test_a_cut_keeps_slices_of_the_original(ids: list[int], room: int, how: str, ratio: float) -> None:
    kept = cut(ids, room, how, ratio, [0, 0])  # type: ignore[arg-type]
    assert len(kept.ids) == min(len(ids), room)
    own = [token for token in kept.ids if token != 0]
    assert kept.dropped == len(ids) - len(own)
    head = own if how == "head" else [] if how == "tail" else own[: round(len(own) * ratio)]
    assert own[: len(head)] == ids[: len(head)]
    tail = own[len(head) :]
    assert tail == ids[len(ids) - len(tail) :]
    assert (0 in kept.ids) == (kept.dropped > 0 and room > 2)


@pytest.mark.parametrize(
    ("how", "ratio", "kept"),
    [
        ("head", 0.5, [1, 2, 3, 4]),
        ("tail", 0.5, [3, 4, 5, 6]),
        ("head_tail", 1.0, [1, 2, 3, 4]),
        ("head_tail", 0.0, [3, 4, 5, 6]),
    ],
)
def test_a_tail_of_nothing_is_nothing(how: str, ratio: float, kept: list[int]) -> None:
    """`ids[-0:]` is everything: the cut of 1,000 tokens that gave 1,004."""
    assert cut([1, 2, 3, 4, 5, 6], 4, how, ratio, []) == Kept(kept, 2)  # type: ignore[arg-type]
