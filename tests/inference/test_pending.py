"""What is left to score: every sequence once, equal ones together, the same passes whenever they are asked for."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from models_support import topology_of

from pairclf.inference.messages import RowOrders
from pairclf.inference.pending import PendingSequences
from pairclf.inputs.plan import MAX_SHARING
from pairclf.inputs.render import TEMPLATE, Encoded, Span
from pairclf.inputs.sequences import Item, SequenceIndex, index_sequences
from pairclf.model.layouts import shared

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


def behind(prefixes: list[int], rows: list[tuple[int, int, int]]) -> list[tuple[Encoded, ...]]:
    """Rows of `(number of a prefix, tokens of a text, tokens of another)` in two orders that begin differently."""
    begin = [np.full(tokens, 1000 + number, dtype=np.int32) for number, tokens in enumerate(prefixes)]
    encoded = []
    for row, (first, *sizes) in enumerate(rows):
        orders = []
        for order, size in enumerate(sizes):
            before = begin[(first + order) % len(prefixes)]
            own = np.full(size, 2 * row + order, dtype=np.int32)
            spans = (Span(TEMPLATE, 0, len(before)), Span("text", len(before), len(before) + size))
            orders.append(Encoded(np.concatenate([before, own]), spans, {}))
        encoded.append(tuple(orders))
    return encoded


PREFIXED = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 30), st.integers(1, 30)), min_size=8, max_size=16)


@given(st.lists(st.integers(16, 40), min_size=1, max_size=2), PREFIXED, st.integers(60, 400))
def test_a_prefix_of_many_sequences_is_planned_and_computed_once_a_pass(
    prefixes: list[int], sizes: list[tuple[int, int, int]], budget: int
) -> None:
    encoded = behind(prefixes, sizes)
    index = index_sequences(encoded)
    assert sorted(index.prefixes) == sorted([0, *prefixes])
    backlog = PendingSequences(index, (0, 1))
    backlog.layout = "shared"
    planned, passes = np.zeros(2), 0
    for batch in backlog.batches(budget):
        pieces = backlog.row_orders(batch)
        items = [Item(row, order, encoded[row][order].ids) for row, orders in pieces for order in orders]
        (ids,) = shared(items).inputs["input_ids"]  # type: ignore[misc]
        load = backlog.workload_of(pieces)
        assert load.tokens == len(ids)
        topology = topology_of(shared(items))
        keys = sum(sum(stop - start for start, stop in piece.sees) for piece in topology.segments)
        assert len(pieces) == 1 or (load.tokens <= budget and keys <= MAX_SHARING * budget)
        planned, passes = planned + load[:2], passes + 1
    left = backlog.workload_left(budget)
    assert planned[0] == left.tokens + (passes - left.passes) * sum(prefixes)
    assert planned[1] == left.squares + (passes - left.passes) * sum(tokens**2 for tokens in prefixes)


def test_what_few_sequences_begin_with_is_planned_for_each() -> None:
    alone = index_sequences([behind([20] * 40, [(row, 3, 3)] * 40)[row] for row in range(40)])
    assert alone.prefixes == (0,)
    short = index_sequences(behind([15], [(0, 3, 3)] * 8))
    assert short.prefixes == (0,)
    backlog = PendingSequences(alone, (0, 1))
    backlog.layout = "shared"
    assert backlog.workload_left(100).tokens == 40 * 2 * 23


def test_other_layouts_compute_a_prefix_for_each_row() -> None:
    backlog = PendingSequences(index_sequences(behind([20], [(0, 3, 3)] * 8)), (0, 1))
    assert backlog.workload_left(1000) == (8 * 2 * 23, 8 * 2 * 23**2, 1)
    assert backlog.room(1000) == 1000
    backlog.layout = "shared"
    assert backlog.workload_left(1000) == (20 + 8 * 2 * 3, 20**2 + 8 * 2 * (23**2 - 20**2), 1)
    assert backlog.room(1000) == 980


def test_one_order_is_all_that_some_tasks_have() -> None:
    inputs = SequenceIndex(np.array([[3], [4]]), np.zeros(2, dtype=np.int64), np.array([[0], [1]]))
    backlog = PendingSequences(inputs, (0, 1))
    assert backlog.workload_left(10) == (7.0, 25.0, 1.0)
    assert not backlog.rows_left(2).any()


@given(st.lists(st.lists(ids, min_size=1, max_size=5), min_size=1, max_size=6), st.integers(1, 30))
def test_rows_of_a_group_are_in_as_few_batches_as_the_budget_allows(groups: list[list[list[int]]], budget: int) -> None:
    group_of = np.array([number for number, texts in enumerate(groups) for _ in texts])
    encoded = [(Encoded(np.array(text, dtype=np.int32), (), {}),) for texts in groups for text in texts]
    inputs = index_sequences(encoded)
    for shares in (False, True):
        grouped = inputs.in_units(group_of, budget, encoded if shares else None)
        backlog = PendingSequences(grouped, (0,))
        backlog.layout = "shared"
        batches = backlog.batches(budget)
        assert sorted(row for batch in batches for row in batch) == np.flatnonzero(backlog.rank[:, 0]).tolist()
        batch_of = {row: place for place, batch in enumerate(batches) for row in batch}
        tokens = (grouped.lengths[:, 0] - grouped.shared).tolist()
        for unit in np.unique(grouped.unit_of):
            rows = np.flatnonzero(grouped.unit_of == unit)
            assert len({batch_of[row] for row in rows.tolist() if row in batch_of}) <= 1
            assert len({*group_of[rows]}) == 1
            assert grouped.shared[rows[0]] == 0
            assert len(rows) == 1 or sum(tokens[row] for row in rows) <= budget
        for row in np.flatnonzero(grouped.shared).tolist():
            common = grouped.shared[row]
            before, here = (encoded[place][0].ids for place in (row - 1, row))
            assert np.array_equal(before[:common], here[:common])
            assert common < len(here), "the last token is read"
    whole = inputs.in_units(group_of, 1000)
    assert np.array_equal(whole.unit_of, group_of)
