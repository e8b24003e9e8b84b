"""Temperature: found again where it is known, and never a change of verdict."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairclf.errors import DataError
from pairclf.scores.calibration import RANGE, fit_temperature
from pairclf.scores.metrics import Floats, log_loss
from pairclf.scores.probabilities import apply_temperature
from pairclf.task import LMSYS, Task

SEVERAL = Task(name="tags", fields=("text",), classes=("x", "y", "z"), multi_label=True)


def fitted(values: Floats, targets: Floats, task: Task = LMSYS) -> float:
    return fit_temperature(lambda temperature: apply_temperature(values, temperature, task), targets, task)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 1.7, 5.0])
def test_a_known_temperature_is_found(temperature: float) -> None:
    truth = np.random.default_rng(0).dirichlet(np.ones(3), size=200)
    unsure = apply_temperature(truth, 1 / temperature, LMSYS)  # soft targets: the truth itself
    assert fitted(unsure, truth) == pytest.approx(temperature, rel=1e-3)
    np.testing.assert_allclose(apply_temperature(unsure, temperature, LMSYS), truth, atol=1e-9)


@given(seed=st.integers(0, 500), temperature=st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_verdicts_stay_and_rows_sum_to_one(seed: int, temperature: float) -> None:
    given_values = np.random.default_rng(seed).dirichlet(np.ones(3), size=10)
    scaled = apply_temperature(given_values, temperature, LMSYS)
    np.testing.assert_array_equal(scaled.argmax(axis=1), given_values.argmax(axis=1))
    np.testing.assert_allclose(scaled.sum(axis=1), 1)
    surer = scaled.max(axis=1) - given_values.max(axis=1)
    assert (surer * (1 - temperature) >= -1e-12).all()


def test_a_fit_never_hurts_on_its_own_rows() -> None:
    generator = np.random.default_rng(1)
    values, targets = generator.dirichlet(np.ones(3), size=100), np.eye(3)[generator.integers(3, size=100)]
    temperature = fitted(values, targets)
    assert log_loss(apply_temperature(values, temperature, LMSYS), targets) <= log_loss(values, targets) + 1e-9


def test_certain_scores_stay_finite() -> None:
    values = np.eye(3)
    assert np.isfinite(apply_temperature(values, 0.05, LMSYS)).all()
    assert fitted(values, np.eye(3)[[1, 2, 0]]) == pytest.approx(RANGE[1], rel=1e-3)  # always wrong: unsure


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(DataError, match="temperature="):
        apply_temperature([[0.5, 0.5]], temperature, LMSYS)


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="not finite"):
        fitted(np.array([[np.nan, 0.5]]), np.array([[1, 0]]))
