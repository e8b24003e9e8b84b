"""The time of a pass is learnt as a function of length; a lone stall and a cold start do not spoil it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from pairclf.inference.pending import Workload
from pairclf.inference.throughput import MIN_MARGIN, ThroughputModel


@dataclass(frozen=True)
class Shape:
    linear: float = 2e10
    quadratic: float = 6e5


def load(length: int, tokens: int = 16_384) -> Workload:
    count = max(1, tokens // length)
    return Workload(count * length, count * length**2)


def true_seconds(one: Workload, speed: float = 1e12) -> float:
    return 0.3 + (2.6e10 * one.tokens + 1.5e6 * one.squares) / speed


def learn(pace: ThroughputModel, lengths: list[int], seconds: Callable[[int, Workload], float]) -> None:
    for number, length in enumerate(lengths):
        pace.observe(load(length), seconds(number, load(length)))


def test_before_anything_was_seen_it_is_operations_by_speed() -> None:
    pace = ThroughputModel(Shape(), 1e12)
    assert pace.seconds(Workload(1000, 1_000_000)) == pytest.approx((2e13 + 6e11) / 1e12)
    assert not pace.is_fitted


def test_lengths_that_were_seen_are_predicted_and_those_to_come_nearly() -> None:
    pace = ThroughputModel(Shape(), 1e9)  # a guess that is off a thousand times
    learn(pace, list(range(2048, 900, -20)), lambda number, one: true_seconds(one))
    for length in (2000, 1000):
        assert pace.seconds(load(length)) == pytest.approx(true_seconds(load(length)), rel=0.03)
    for length in (500, 200):
        assert pace.seconds(load(length)) == pytest.approx(true_seconds(load(length)), rel=0.15)


def test_a_length_blind_pace_would_be_wrong() -> None:
    """The form matters: by tokens alone, short rows would be expected to take much longer than they do."""
    pace = ThroughputModel(Shape(), 1e12)
    learn(pace, [8192] * 30, lambda number, one: true_seconds(one))
    by_tokens = true_seconds(load(8192)) / load(8192).tokens * load(200).tokens
    truth = true_seconds(load(200))
    assert abs(pace.seconds(load(200)) - truth) < 0.7 * abs(by_tokens - truth)


def test_a_drift_is_followed() -> None:
    pace = ThroughputModel(Shape(), 1e12)
    learn(pace, [1000] * 40, lambda number, one: true_seconds(one))
    learn(pace, [1000] * 40, lambda number, one: 3 * true_seconds(one))
    assert pace.seconds(load(1000)) == pytest.approx(3 * true_seconds(load(1000)), rel=0.35)


def test_a_lone_stall_widens_the_margin_and_not_the_pace() -> None:
    pace = ThroughputModel(Shape(), 1e12)
    learn(pace, [1000] * 30, lambda number, one: true_seconds(one))
    before = pace.margin
    assert before == MIN_MARGIN
    pace.observe(load(1000), 100 * true_seconds(load(1000)))
    assert pace.seconds(load(1000)) < 1.5 * true_seconds(load(1000))
    assert pace.margin > before + 0.2


def test_a_cold_start_is_forgotten() -> None:
    pace = ThroughputModel(Shape(), 1e12)
    pace.observe(load(2000), 20 * true_seconds(load(2000)), warming_up=True)
    assert pace.is_fitted
    learn(pace, [2000] * 8, lambda number, one: true_seconds(one))
    assert pace.seconds(load(2000)) == pytest.approx(true_seconds(load(2000)), rel=0.6)


def test_no_term_is_negative() -> None:
    random = np.random.default_rng(0)
    pace = ThroughputModel(Shape(), 1e12)
    for _ in range(60):
        one = load(int(random.integers(10, 4000)), int(random.integers(100, 20_000)))
        pace.observe(one, float(random.uniform(0.01, 5)))
        assert all(pace.seconds(Workload(*unit)) >= 0 for unit in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
