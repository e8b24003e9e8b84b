"""From logits to a blend: a tie stays a tie under the swap, and models that do not know a row have no say in it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairclf.scores.probabilities import blend, mean_of_models, mean_of_orders, unswap
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


def test_the_mean_of_models_is_over_those_that_know_the_row() -> None:
    values = np.random.default_rng(0).dirichlet(np.ones(3), size=(2, 3))
    values[1, 1, 0] = np.nan
    values[:, 2] = np.nan
    mean = mean_of_models(values, [1, 3])
    np.testing.assert_allclose(mean[0], 0.25 * values[0, 0] + 0.75 * values[1, 0])
    np.testing.assert_array_equal(mean[1], values[0, 1])
    assert np.isnan(mean[2]).all()
    np.testing.assert_allclose(mean_of_models(values)[0], values[:, 0].mean(axis=0))
    blended = blend(values, LMSYS, weights=[1, 3], prior=[0.5, 0.3, 0.2])
    np.testing.assert_allclose(blended[:2], mean[:2])
    assert blended[2].tolist() == [0.5, 0.3, 0.2]
