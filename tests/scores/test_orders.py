"""Both orders: known contradictions are measured as such, and a model that sees no order has none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairclf.scores.metrics import Floats, log_loss
from pairclf.scores.orders import ORDER_TITLES, gain_curve, order_statistics, shift_quantiles, two_orders
from pairclf.scores.probabilities import Calibration, mean_of_orders
from pairclf.task import LMSYS, WSDM, Task


def figures(logits: Floats, targets: Floats, task: Task = LMSYS) -> dict[str, float]:
    orders = two_orders(logits, task, Calibration())
    statistics = order_statistics(orders, targets, task)
    assert list(statistics) == list(ORDER_TITLES)
    return {name: statistic.value(np.ones(len(logits))) for name, statistic in statistics.items()}


def test_contradictions_by_hand() -> None:
    """In its own columns, order BA of a row that stays the same has the sides exchanged."""
    same, both = [[0.6, 0.3, 0.1], [0.3, 0.6, 0.1]], [[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]]
    to_tie = [[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]  # A in order AB; a tie in order BA, where B has .2 and A .3
    found = figures(np.log([same, both, to_tie]), np.eye(3)[[0, 0, 0]])
    assert found["flip_rate"] == pytest.approx(2 / 3)
    assert found["side_flip_rate"] == pytest.approx(1 / 3)
    bias = [0.0, 0.6 - 0.45, (0.5 + 0.2) / 2 - (0.8 + 0.5) / 4]
    assert found["first_position_bias"] == pytest.approx(np.mean(bias))
    divergence = [0.0, 0.3 * np.log(2), (0.2 * np.log(5 / 3) - 0.1 * np.log(2 / 3) + 0.3 * np.log(2.5)) / 2]
    assert found["order_divergence"] == pytest.approx(np.mean(divergence))


@pytest.mark.parametrize("task", [LMSYS, WSDM], ids=lambda task: task.name)
@given(seed=st.integers(0, 200))
@settings(max_examples=10, deadline=None)
def test_a_model_without_an_order_has_no_contradiction_and_gains_are_differences_of_losses(
    task: Task, seed: int
) -> None:
    generator, classes = np.random.default_rng(seed), len(task.classes)
    logits, targets = generator.normal(size=(20, 2, classes)), np.eye(classes)[generator.integers(classes, size=20)]
    fair = logits.copy()
    fair[:, 1] = fair[:, 0][:, list(task.swapped_columns)]
    assert figures(fair, targets, task) == pytest.approx(dict.fromkeys(ORDER_TITLES, 0.0), abs=1e-12)
    found = figures(logits, targets, task)
    loss = log_loss(mean_of_orders(logits, task), targets)
    first = log_loss(mean_of_orders(logits[:, :1], task), targets)
    second = log_loss(mean_of_orders(np.where(np.arange(2)[:, None] == 1, logits, np.nan), task), targets)
    assert found["swap_gain"] == pytest.approx(first - loss)
    assert found["jensen_gain"] == pytest.approx((first + second) / 2 - loss)
    assert found["jensen_gain"] >= 0


def test_the_bias_is_for_the_side_that_stands_first_and_exchanged_rows_have_the_same() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 2, 3)) + np.array([1.0, 0.0, 0.0])
    targets = np.full((50, 3), 1 / 3)
    found = figures(logits, targets)
    assert found["first_position_bias"] > 0.05
    assert figures(logits - np.array([2.0, 0.0, 0.0]), targets)["first_position_bias"] < -0.05
    mirrored = figures(logits[:, ::-1], targets)
    for name in ("flip_rate", "side_flip_rate", "first_position_bias", "order_divergence", "jensen_gain"):
        assert mirrored[name] == pytest.approx(found[name])


def test_the_gain_of_a_share_ends_at_the_gain_of_all() -> None:
    generator = np.random.default_rng(0)
    logits, targets = generator.normal(size=(400, 2, 3)), np.eye(3)[generator.integers(3, size=400)]
    orders, weights = two_orders(logits, LMSYS, Calibration()), generator.uniform(0.5, 2, size=400)
    curve = gain_curve(orders, targets, weights)
    gain = log_loss(orders.first, targets, weights) - log_loss(orders.mean, targets, weights)
    assert curve[-1] == {"share": 1.0, "gain": pytest.approx(gain)}
    shifts = list(shift_quantiles(orders).values())
    assert shifts == sorted(shifts)
    assert 0 < shifts[0] < 1
