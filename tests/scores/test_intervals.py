"""The bootstrap over groups agrees with resampling by brute force, and not with one over rows."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairclf.errors import DataError
from pairclf.scores.intervals import Estimate, Statistic, difference, estimate, mean_of, ratio
from pairclf.scores.metrics import Floats


def grouped(groups: int, seed: int = 0) -> tuple[Floats, list[str], Floats]:
    """Losses whose groups have 1 to 4 rows that are alike, with their groups, shuffled, and weights."""
    generator = np.random.default_rng(seed)
    place = np.repeat(np.arange(groups), generator.integers(1, 5, size=groups))
    losses = generator.gamma(2, 0.5, size=groups)[place] + 0.05 * generator.normal(size=len(place))
    order = generator.permutation(len(place))
    return losses[order], [f"g{number}" for number in place[order]], generator.uniform(0.2, 2, size=len(place))


def by_brute_force(losses: Floats, groups: list[str], weights: Floats, draws: int = 2000) -> Floats:
    """The means of drawn groups, each draw a list of rows."""
    generator, names = np.random.default_rng(99), sorted(set(groups))
    rows = {name: [row for row, other in enumerate(groups) if other == name] for name in names}
    means = []
    for _ in range(draws):
        drawn = [row for name in generator.choice(names, size=len(names)) for row in rows[str(name)]]
        means.append(np.average(losses[drawn], weights=weights[drawn]))
    return np.array(means)


def test_the_interval_is_that_of_drawn_groups_and_not_of_drawn_rows() -> None:
    losses, groups, weights = grouped(60)
    expected = by_brute_force(losses, groups, weights)
    by_group = estimate({"loss": mean_of(losses)}, groups, weights)["loss"]
    by_row = estimate({"loss": mean_of(losses)}, np.arange(len(losses)), weights)["loss"]
    low, high = np.quantile(expected, [0.025, 0.975])
    assert by_group.value == pytest.approx(np.average(losses, weights=weights), rel=1e-12)
    assert by_group.draws.std() == pytest.approx(expected.std(), rel=0.08)
    assert (by_group.low, by_group.high) == (
        pytest.approx(low, abs=0.08 * (high - low)),
        pytest.approx(high, abs=0.08 * (high - low)),
    )
    assert by_row.draws.std() < 0.85 * expected.std()  # the wrong variant: rows of one prompt are not independent


def test_three_groups_give_all_their_resamples_in_their_frequencies() -> None:
    losses, groups, weights = np.array([1.0, 2.0, 4.0, 8.0]), ["a", "a", "b", "c"], np.array([1.0, 3.0, 1.0, 2.0])
    rows = {"a": [0, 1], "b": [2], "c": [3]}
    expected: dict[float, float] = {}
    for names in itertools.product("abc", repeat=3):
        drawn = [row for name in names for row in rows[name]]
        mean = round(float(np.average(losses[drawn], weights=weights[drawn])), 9)
        expected[mean] = expected.get(mean, 0) + 1 / 27
    draws = np.round(estimate({"loss": mean_of(losses)}, groups, weights, draws=20_000)["loss"].draws, 9)
    assert {float(value): pytest.approx(share, abs=0.012) for value, share in expected.items()} == {
        float(value): float((draws == value).mean()) for value in np.unique(draws)
    }


@given(seed=st.integers(0, 200), shift=st.floats(-0.3, 0.3))
@settings(max_examples=20, deadline=None)
def test_figures_of_one_call_are_paired(seed: int, shift: float) -> None:
    losses, groups, weights = grouped(12, seed)
    together = estimate({"one": mean_of(losses), "other": mean_of(losses + shift)}, groups, weights, draws=200)
    apart = difference(losses, losses + shift, groups, weights, draws=200)
    np.testing.assert_allclose(together["one"].draws - together["other"].draws, apart.draws, atol=1e-12)
    np.testing.assert_allclose(apart.draws, -shift, atol=1e-12)
    assert apart.share_below_zero == (0.5 if shift == 0 else float(shift > 0)) or abs(shift) < 1e-12


def test_a_difference_is_surer_than_its_parts() -> None:
    generator = np.random.default_rng(3)
    losses, groups, _ = grouped(300)
    others = losses + 0.02 + 0.05 * generator.normal(size=len(losses))
    gap = difference(losses, others, groups)
    alone = estimate({"losses": mean_of(losses)}, groups)["losses"]
    assert gap.high - gap.low < 0.2 * (alone.high - alone.low)
    assert gap.excludes_zero
    assert gap.share_below_zero > 0.99
    assert gap.p_value < 0.001
    assert difference(losses, losses[::-1], groups).p_value > 0.05


def test_any_function_of_sums_has_an_interval() -> None:
    values = np.random.default_rng(0).normal(2, 1, size=400)
    variance = Statistic(
        np.stack([np.ones(400), values, values**2], axis=1),
        lambda sums: ratio(sums[..., 2], sums[..., 0]) - ratio(sums[..., 1], sums[..., 0]) ** 2,
    )
    found = estimate({"variance": variance}, np.arange(400))["variance"]
    assert found.value == pytest.approx(values.var())
    assert found.draws.std() == pytest.approx(np.sqrt(2 / 400), rel=0.15)


def test_statistics_that_share_their_columns_keep_their_own_figures() -> None:
    columns = np.random.default_rng(0).normal(2, 1, size=(50, 2))
    first, second = (Statistic(columns, lambda sums, at=at: sums[..., at] / 50) for at in (0, 1))
    found = estimate({"first": first, "other": mean_of(columns[:, 0]), "second": second}, range(50))
    assert (found["first"].value, found["second"].value) == pytest.approx(tuple(columns.mean(axis=0)))
    np.testing.assert_allclose(found["first"].draws, found["other"].draws)
    assert not np.allclose(found["second"].draws, found["other"].draws)


def test_values_that_are_unknown_are_left_out() -> None:
    losses = np.array([1.0, math.nan, 3.0, 5.0])
    found = estimate({"loss": mean_of(losses), "none": mean_of([math.nan] * 4)}, range(4))
    assert found["loss"].value == 3
    assert np.isfinite([found["loss"].low, found["loss"].high]).all()
    assert math.isnan(found["none"].value)
    assert math.isnan(found["none"].low)


def test_one_group_has_no_interval() -> None:
    found = estimate({"loss": mean_of([1.0, 2.0])}, ["a", "a"])["loss"]
    assert found.value == 1.5
    assert all(math.isnan(figure) for figure in (found.low, found.high, found.p_value, found.share_below_zero))
    assert not found.excludes_zero


def test_the_seed_and_the_memory_of_a_block_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, groups, weights = grouped(40)
    first = estimate({"loss": mean_of(losses)}, groups, weights)["loss"]
    np.testing.assert_array_equal(first.draws, estimate({"loss": mean_of(losses)}, groups, weights)["loss"].draws)
    other = estimate({"loss": mean_of(losses)}, groups, weights, seed=1)["loss"]
    assert other.low != first.low
    monkeypatch.setattr("pairclf.scores.intervals.CELLS", 1000)
    in_blocks = estimate({"loss": mean_of(losses)}, groups, weights)["loss"]
    assert in_blocks.draws.shape == first.draws.shape
    assert in_blocks.low == pytest.approx(first.low, abs=0.05 * (first.high - first.low))


def test_equal_figures_have_a_point_for_an_interval() -> None:
    zero = difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], range(3))
    assert (zero.value, zero.low, zero.high, zero.p_value, zero.share_below_zero) == (0, 0, 0, 1, 0.5)
    assert Estimate(1.0, np.ones(5)).p_value == 0


def test_what_has_no_figure_is_refused() -> None:
    with pytest.raises(DataError, match="no row to estimate"):
        estimate({"loss": mean_of([])}, [])
    with pytest.raises(DataError, match="loss has 2 rows, the groups have 3"):
        estimate({"loss": mean_of([1.0, 2.0])}, range(3))
    with pytest.raises(DataError, match="weights"):
        estimate({"loss": mean_of([1.0, 2.0])}, range(2), [1.0, -1.0])
