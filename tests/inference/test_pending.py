"""What is left to score: every sequence once, equal ones together, the same passes whenever they are asked for."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pairclf.inference.messages import RowOrders
from pairclf.inference.pending import PendingSequences
from pairclf.inputs.render import Encoded
from pairclf.inputs.sequences import SequenceIndex, index_sequences

ids = st.lists(st.integers(1, 3), min_size=1, max_size=6)
rows = st.lists(st.tuples(ids, ids), min_size=1, max_size=12)


def shown(*pairs: tuple[list[int], list[int]]) -> list[tuple[Encoded, ...]]:
    return [tuple(Encoded(np.array(one, dtype=np.int32), (), {}) for one in pair) for pair in pairs]


@given(rows, st.sampled_from([(0,), (1,), (0, 1)]), st.integers(1, 30))
def test_each_different_sequence_is_in_one_pass(
    pairs: list[tuple[list[int], list[int]]], orders: tuple[int, ...], budget: int
) -> None:
    backlog = PendingSequences(index_sequences(shown(*pairs)), orders)
    wanted = {tuple(pair[order]) for pair in pairs for order in orders}
    scored: list[tuple[int, ...]] = []
    for batch in backlog.batches(budget):
        for piece in (pieces := backlog.row_orders(batch)):
            scored += [tuple(pairs[piece.row][order]) for order in piece.orders]
        backlog.mark_taken(pieces)
    assert sorted(scored) == sorted(wanted)
    assert not backlog.is_pending.any()
    assert backlog.workload_left(budget).tokens == 0


@given(rows, st.integers(1, 30), st.sampled_from(["packed", "shared", "padded"]))
def test_passes_stay_within_the_budget_and_are_counted(
    pairs: list[tuple[list[int], list[int]]], budget: int, layout: str
) -> None:
    backlog = PendingSequences(index_sequences(shown(*pairs)), (0, 1))
    backlog.layout = layout
    tokens = 0.0
    for batch in backlog.batches(budget):
        pieces = backlog.row_orders(batch)
        load = backlog.workload_of(pieces)
        assert load.tokens <= (budget if len(pieces) > 1 else max(budget, 12))
        tokens += load.tokens
    if layout != "padded":
        assert tokens == backlog.workload_left(budget).tokens


@given(rows)
def test_twins_have_the_same_ids_and_the_first_stands_for_them(pairs: list[tuple[list[int], list[int]]]) -> None:
    inputs = index_sequences(shown(*pairs))
    flat = [tuple(one) for pair in pairs for one in pair]
    assert [flat.index(one) for one in flat] == inputs.duplicate_of.reshape(-1).tolist()


def test_what_both_orders_begin_with_is_less_than_either() -> None:
    inputs = index_sequences(shown(([5, 6, 7], [5, 6, 8]), ([5, 6], [5, 6]), ([1], [2]), ([4, 4, 4], [4, 4])))
    assert inputs.shared.tolist() == [2, 1, 0, 1]


def test_equal_sides_are_scored_once_for_both_orders() -> None:
    backlog = PendingSequences(index_sequences(shown(([5, 6], [5, 6]))), (0, 1))
    assert backlog.row_orders([0]) == [RowOrders(0, (0,))]


def test_the_passes_do_not_depend_on_what_was_given_away() -> None:
    one = index_sequences(shown(*[([row] * (row + 1), [row + 100] * (row + 1)) for row in range(9)]))
    backlog = PendingSequences(one, (0, 1))
    before = backlog.batches(12)
    backlog.mark_taken(backlog.row_orders(before[0]))
    assert backlog.batches(12) == before
    assert backlog.row_orders(before[0]) == []


def test_a_cascade_keeps_the_rows_asked_for_and_the_twins_that_stand_for_them() -> None:
    backlog = PendingSequences(index_sequences(shown(([1, 2], [2, 1]), ([3], [4]), ([2, 1], [1, 2]))), (0, 1))
    backlog.restrict_to(np.array([2]))
    assert [piece.row for piece in backlog.row_orders(range(3))] == [0]


def test_one_order_is_all_that_some_tasks_have() -> None:
    inputs = SequenceIndex(np.array([[3], [4]]), np.zeros(2, dtype=np.int64), np.array([[0], [1]]))
    backlog = PendingSequences(inputs, (0, 1))
    assert backlog.workload_left(10) == (7.0, 25.0, 1.0)
    assert not backlog.rows_left(2).any()
