"""Averages: a tie stays a tie under the swap, and rows meet on their id."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairclf.data.tables import class_matrix, scores_frame
from pairclf.errors import DataError
from pairclf.scores.blend import blend
from pairclf.scores.probabilities import mean_of_orders, unswap
from pairclf.task import LMSYS, WSDM, Task

SINGLE = Task(name="single", fields=("text",), classes=("x", "y"))


@given(task=st.sampled_from([LMSYS, WSDM, SINGLE]), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_unswapping_twice_is_nothing(task: Task, seed: int) -> None:
    values = np.random.default_rng(seed).dirichlet(np.ones(len(task.classes)), size=(2, 5))
    np.testing.assert_array_equal(unswap(unswap(values, task), task), values)


def test_the_swap_exchanges_sides_and_leaves_the_tie() -> None:
    assert unswap([[0.5, 0.3, 0.2]], LMSYS).tolist() == [[0.3, 0.5, 0.2]]
    logits = np.log([[[0.5, 0.3, 0.2], [0.1, 0.7, 0.2]]])
    assert mean_of_orders(logits, LMSYS) == pytest.approx(np.array([[0.6, 0.2, 0.2]]))


def test_the_average_does_not_know_which_order_the_file_had() -> None:
    logits = np.random.default_rng(0).normal(size=(6, 2, 3))
    np.testing.assert_allclose(mean_of_orders(logits[:, ::-1], LMSYS), unswap(mean_of_orders(logits, LMSYS), LMSYS))


def table(ids: Any, seed: int, orders: int, name: str) -> pl.DataFrame:
    by_id = {row_id: np.random.default_rng([seed, ord(row_id)]).dirichlet(np.ones(3)) for row_id in ids}
    return scores_frame(list(ids), np.array(list(by_id.values())), LMSYS, orders, [name])


@given(st.permutations("abcdef"), st.permutations("abcdef"))
@settings(max_examples=25, deadline=None)
def test_blending_joins_on_id(first: Any, second: Any) -> None:
    mixed = blend([table(first, 1, 2, "m"), table(second, 2, 1, "n")], LMSYS)
    assert mixed["id"].to_list() == list(first)
    assert mixed["orders"].to_list() == [1] * 6
    assert mixed["models"].to_list() == [["m", "n"]] * 6
    expected = blend([table("abcdef", 1, 2, "m"), table("abcdef", 2, 1, "n")], LMSYS)
    assert mixed.sort("id").equals(expected)
    both = class_matrix(table("abcdef", 1, 2, "m"), LMSYS) + class_matrix(table("abcdef", 2, 1, "n"), LMSYS)
    np.testing.assert_allclose(class_matrix(expected, LMSYS), both / 2)


def test_weights() -> None:
    one, other = table("ab", 1, 2, "m"), table("ab", 2, 2, "n")
    np.testing.assert_allclose(class_matrix(blend([one, other], LMSYS, [3, 0]), LMSYS), class_matrix(one, LMSYS))
    expected = 0.25 * class_matrix(one, LMSYS) + 0.75 * class_matrix(other, LMSYS)
    np.testing.assert_allclose(class_matrix(blend([one, other], LMSYS, [1, 3]), LMSYS), expected)
    for wrong in ([1], [1, -1], [0, 0], [1, float("nan")]):
        with pytest.raises(DataError, match="weights"):
            blend([one, other], LMSYS, wrong)


def test_what_the_models_have_seen_adds_up() -> None:
    def seen(*counts: int | None, prompts: list[int | None], rows: list[int | None] | None = None) -> pl.DataFrame:
        columns = {"prompt": prompts, "row_hash": rows or [None] * 3}
        hashes = pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.UInt64))
        counted = pl.Series(counts, dtype=pl.UInt16)
        return scores_frame(list("abc"), np.full((3, 3), 1 / 3), LMSYS, 2, ["m"], seen=counted, hashes=hashes)

    one, other = seen(0, 1, None, prompts=[5, None, 7]), seen(0, 2, 1, prompts=[5, 6, None])
    mixed = blend([one, other.reverse()], LMSYS)
    assert mixed["seen"].to_list() == [0, 3, None]
    assert mixed["prompt"].to_list() == [5, 6, 7]
    with pytest.raises(DataError, match="1 rows have the same id in two tables") as caught:
        blend([one, other, seen(0, 0, 0, prompts=[5, 5, 7])], LMSYS)
    assert caught.value.rows == ("b",)
    mirrored = [seen(0, 0, 0, prompts=[5, 6, 7], rows=rows) for rows in ([1, 2, 3], [1, 2, 4])]
    with pytest.raises(DataError, match="and different texts") as caught:
        blend(mirrored, LMSYS)
    assert caught.value.rows == ("c",)
    assert blend([mirrored[0], one], LMSYS)["row_hash"].to_list() == [1, 2, 3]


def test_one_table_is_itself() -> None:
    one = table("ba", 1, 2, "m")
    assert blend([one], LMSYS).equals(one)


def test_other_ids_are_refused() -> None:
    with pytest.raises(DataError, match="table 2 of 2 holds other ids") as caught:
        blend([table("abc", 1, 2, "m"), table("abd", 1, 2, "n")], LMSYS)
    assert caught.value.rows == ("c", "d")
    twice = pl.concat([table("ab", 1, 2, "n"), table("b", 1, 2, "n")])
    with pytest.raises(DataError, match="table 2 of 2") as caught:
        blend([table("ab", 1, 2, "m"), twice], LMSYS)
    assert set(caught.value.rows) == {"b"}
    with pytest.raises(DataError, match="nothing to blend"):
        blend([], LMSYS)
