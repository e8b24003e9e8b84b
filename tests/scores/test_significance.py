"""Equals are rarely called different, planted differences are found, and what is said to decide would decide."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm, studentized_range

from pairclf.scores.intervals import Estimate
from pairclf.scores.metrics import Floats
from pairclf.scores.significance import (
    FALSE_CALLS,
    PRIOR,
    SEEDS,
    Decision,
    SeedNoise,
    decide,
    effect_noise,
    pareto_front,
    seed_noise,
)

GENERATOR = np.random.default_rng(5)
NORMAL: Floats = norm.ppf((np.arange(2000) + 0.5) / 2000)


def drawn(value: float, deviation: float) -> Estimate:
    """A figure whose draws have this standard deviation."""
    return Estimate(value, value + deviation * NORMAL / NORMAL.std())


def called(values: Floats, noise: SeedNoise | None, sampling: float = 1.0, **options: int) -> float:
    """The share of differences that are called real."""
    threshold = decide(drawn(0.5, sampling), 100, noise=noise, **options).threshold
    return float((np.abs(values) > threshold).mean())


def test_without_seeds_the_sampling_noise_alone_decides() -> None:
    values = GENERATOR.normal(size=100_000)
    assert called(values, None) == pytest.approx(FALSE_CALLS, rel=0.15)
    assert called(values, None, sampling=0.5) > 0.2, "half the noise would call too many"


@pytest.mark.parametrize("models", [3, 6])
def test_choosing_the_best_of_several_equals_calls_no_more_of_them(models: int) -> None:
    figures = GENERATOR.normal(size=(20_000, models)) / math.sqrt(2)
    widest = np.ptp(figures, axis=1)
    assert called(widest, None, compared=models) == pytest.approx(FALSE_CALLS, rel=0.25)
    assert called(widest, None) > 2 * FALSE_CALLS, "a pair's threshold would call too many"


@pytest.mark.parametrize(("pairs", "seeds"), [(1, 0.5), (1, 1.5), (3, 0.5), (3, 1.5)])
def test_seeds_noise_counts_as_it_is_known(pairs: int, seeds: float) -> None:
    """Models whose seeds move the figure by `seeds` times the sampling noise of a difference; 5% may be called."""
    spread = math.sqrt(1 + 2 * seeds**2)
    real = 0
    for _ in range(800):
        noise = seed_noise(
            [
                [drawn(value, math.sqrt(0.5)), Estimate(0.0, np.zeros(2000))]
                for value in GENERATOR.normal(0, spread, pairs)
            ]
        )
        assert noise is not None
        real += decide(
            drawn(float(GENERATOR.normal(0, spread)), 1.0), 100, noise=SeedNoise(noise.deviation, math.sqrt(0.5), pairs)
        ).is_real
    assert real / 800 < 0.06
    without = GENERATOR.normal(0, spread, 20_000)
    if seeds > 1:
        assert called(without, None) > 0.15, "without the seeds' noise many would be called"


def test_the_noise_of_seeds_is_pooled_with_what_sampling_makes_of_it() -> None:
    draws = np.random.default_rng(0).normal(size=(4, 2000))
    groups = [
        [Estimate(0.90, draws[0]), Estimate(0.92, draws[1])],
        [Estimate(0.81, draws[2]), Estimate(0.81, draws[3])],
        [drawn(5, 1)],
    ]
    noise = seed_noise(groups)
    assert noise is not None
    assert noise.degrees == 2
    assert noise.deviation == pytest.approx(math.sqrt((0.01**2 * 2) / 2))
    expected = math.sqrt(((draws[0] - draws[1]).var() + (draws[2] - draws[3]).var()) / 4)
    assert noise.sampling == pytest.approx(expected, rel=1e-3)
    assert seed_noise([[drawn(1, 1)], []]) is None


def test_the_noise_of_an_effect_is_what_a_two_way_layout_leaves() -> None:
    generator = np.random.default_rng(1)
    rows, columns = np.array([[0.0], [0.3]]), np.array([0.0, 0.1, -0.2])
    rest = np.array([[0.01, -0.02, 0.01], [-0.01, 0.02, -0.01]])
    draws = generator.normal(size=(2, 3, 2000))
    table = [
        [Estimate(value, own) for value, own in zip(*line, strict=True)]
        for line in zip(rows + columns + rest, draws, strict=True)
    ]
    noise = effect_noise(table)
    assert noise is not None
    assert noise.degrees == 2
    assert noise.deviation == pytest.approx(math.sqrt((rest**2).sum() / 2))
    assert noise.sampling == pytest.approx(1, rel=0.05)  # draws of runs that have nothing in common
    assert effect_noise(table[:1]) is None
    assert effect_noise([line[:1] for line in table]) is None


def test_threshold_of_one_seed_pair_is_the_written_formula() -> None:
    noise = SeedNoise(deviation=0.004, sampling=0.002, degrees=1)
    ratio = (1 * 4 + PRIOR) / (1 + PRIOR)
    quantile = studentized_range.ppf(1 - FALSE_CALLS, 2, 1 + PRIOR) / math.sqrt(2)
    expected = quantile * math.sqrt(0.003**2 + 2 * (ratio - 1) * 0.002**2)
    decision = decide(drawn(0.01, 0.003), 1000, noise=noise)
    assert decision.threshold == pytest.approx(expected, rel=1e-6)
    assert not decision.is_real


def test_so_many_rows_would_decide() -> None:
    for noise in (None, SeedNoise(0.0025, 0.002, 6)):
        first = decide(drawn(0.01, 0.006), 1000, noise=noise)
        assert not first.is_real
        assert first.rows_needed is not None
        share = 1000 / first.rows_needed
        again = decide(drawn(0.01, 0.006 * math.sqrt(share) * 0.999), first.rows_needed, noise=noise)
        assert again.is_real
        fewer = decide(drawn(0.01, 0.006 * math.sqrt(share) * 1.05), first.rows_needed, noise=noise)
        assert not fewer.is_real


def test_so_many_seeds_would_decide() -> None:
    noise = SeedNoise(0.005, 0.002, 1)
    decision = decide(drawn(0.012, 0.002), 1000, noise=noise)
    assert decision.seeds_needed in SEEDS
    deviation = math.sqrt(noise.ratio) * noise.sampling
    more = SeedNoise(deviation, 0.002, 1 + 2 * (decision.seeds_needed - 1))
    assert decide(drawn(0.012, 0.002), 1000, noise=more, seeds=decision.seeds_needed).is_real
    assert decide(drawn(0.012, 0.02), 1000, noise=noise).seeds_needed is None  # the rows do not suffice
    assert decide(drawn(0.012, 0.02), 1000, noise=None).seeds_needed is None


@pytest.mark.parametrize("difference", [Estimate(0.1, np.empty(0)), drawn(0.0, 0.1), Estimate(0.0, np.zeros(2000))])
def test_where_nothing_is_known_nothing_is_real(difference: Estimate) -> None:
    decision = decide(difference, 10, noise=None)
    assert (decision.is_real, decision.rows_needed, decision.seeds_needed) == (False, None, None)
    assert isinstance(decision, Decision)


def test_the_front_holds_what_nothing_beats() -> None:
    costs = GENERATOR.integers(0, 5, size=(40, 2)).astype(float)
    expected = [not any((a <= b).all() and (a != b).any() for a in costs) for b in costs]
    assert pareto_front(costs) == expected
    assert pareto_front(np.ones((2, 2))) == [True, True]


@pytest.mark.thorough
def test_the_claims_of_the_docs_hold_on_rows_of_the_arena() -> None:
    """Equals are called different in at most 5% of 200 trials; 0.01 nats are found in at least 80%, at 4,000 rows."""
    measured = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "compare.py"))["measured"]
    shares = measured(4000, 200, 0.01, drifts=())
    assert shares["equal"] <= 0.05
    assert shares["five_equal"] <= 0.05
    assert shares["planted"] >= 0.8
