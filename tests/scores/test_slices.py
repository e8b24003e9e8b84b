"""Slices: a planted one stands out with its size, and among many looks at noise few do."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from pairclf.scores.intervals import estimate
from pairclf.scores.metrics import Floats
from pairclf.scores.slices import BIAS, MIN_ROWS, Slice, looks_at, slices_of, surplus_of


def found(losses: Floats, traits: dict[str, list[str | None]], surplus: dict[str, Floats]) -> list[Slice]:
    looks, weights = looks_at(losses, traits, surplus), np.ones(len(losses))
    gaps = estimate({name: look.gap for name, look in looks.items()}, np.arange(len(losses)), weights) if looks else {}
    return slices_of(looks, gaps, losses, weights)


def test_a_planted_slice_stands_out_with_its_gap_before_all_others() -> None:
    generator = np.random.default_rng(0)
    losses = generator.gamma(2, 0.5, size=2000)
    script = generator.choice(["Latin", "Thai"], p=[0.9, 0.1], size=2000)
    losses[script == "Thai"] += 0.4
    traits: dict[str, list[str | None]] = {"script": script.tolist(), "turns": (["1", "2", None, "3"] * 500)}
    slices = found(losses, traits, {"the longer": generator.normal(0, 0.3, size=2000)})
    assert [(part.trait, part.stands_out) for part in slices[:2]] == [("script", True)] * 2
    assert len(slices) == 6
    thai = next(part for part in slices if part.name == "Thai")
    inside = script == "Thai"
    assert thai.gap.value == pytest.approx(losses[inside].mean() - losses[~inside].mean())
    assert (thai.rows, thai.loss) == (inside.sum(), pytest.approx(losses[inside].mean()))
    assert sum(part.stands_out for part in slices) <= 3


def test_noise_rarely_stands_out() -> None:
    """40 looks, 25 times: without the correction, two of 40 would stand out each time."""
    trials = []
    for seed in range(25):
        generator = np.random.default_rng(seed)
        losses = generator.gamma(2, 0.5, size=400)
        traits = {f"trait {number}": generator.choice(["a", "b"], size=400).tolist() for number in range(20)}
        slices = found(losses, traits, {})
        assert len(slices) == 40
        trials.append((any(part.stands_out for part in slices), sum(part.gap.p_value < 0.05 for part in slices)))
    any_out, uncorrected = np.mean(trials, axis=0)
    assert any_out < 0.2
    assert uncorrected > 1


def test_p_values_are_adjusted_as_scipy_does() -> None:
    generator = np.random.default_rng(0)
    losses = generator.gamma(2, 0.5, size=300)
    traits: dict[str, list[str | None]] = {
        f"trait {number}": generator.choice(["a", "b", "c"], size=300).tolist() for number in range(7)
    }
    slices = found(losses, traits, {"the longer": np.full(300, np.nan)})
    expected = false_discovery_control([part.gap.p_value for part in slices])
    np.testing.assert_allclose([part.adjusted_p for part in slices], expected)


def test_small_slices_and_those_of_nearly_all_rows_are_left_out() -> None:
    names: list[str | None] = ["a"] * (MIN_ROWS - 1) + ["b"] * 200
    assert found(np.ones(len(names)), {"t": names}, {"few": np.array([0.1] + [np.nan] * (len(names) - 1))}) == []


def test_a_bias_is_half_of_the_surplus_lead() -> None:
    p = np.array([[0.6, 0.2, 0.2], [0.1, 0.5, 0.4], [0.3, 0.3, 0.4]])
    t = np.eye(3)[[0, 0, 2]]
    surplus = surplus_of(p, t, np.array([0, 1, -1]), (0, 1))
    np.testing.assert_allclose(surplus, [(0.4 - 1) / 2, (0.4 + 1) / 2, np.nan])
    two = surplus_of(np.array([[0.7, 0.3]]), np.array([[1.0, 0.0]]), np.array([0]), (0, 1))
    assert two == pytest.approx(0.7 - 1)
    tied_too_often = surplus_of(np.array([[0.1, 0.1, 0.8]]), np.full((1, 3), 1 / 3), np.array([1]), (0, 1))
    assert tied_too_often == pytest.approx(0)


def test_a_planted_bias_stands_out() -> None:
    generator = np.random.default_rng(1)
    slices = found(np.ones(500), {}, {"the longer answer": 0.05 + generator.normal(0, 0.3, size=500)})
    assert [(part.trait, part.stands_out) for part in slices] == [(BIAS, True)]
    assert slices[0].gap.value == pytest.approx(0.05, abs=0.04)
