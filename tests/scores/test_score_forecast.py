"""Forecast intervals hold as many hidden scores as they say, under a shift too; two picks follow from shared draws."""

from __future__ import annotations

import numpy as np
import pytest

from pairclf.errors import DataError
from pairclf.scores.intervals import mean_of
from pairclf.scores.metrics import Floats
from pairclf.scores.score_forecast import balanced, draw_scores, interval_of, pick_two, shift_of

SETS = 150


def coverage(scale: float, importance: float = 1.0) -> float:
    """The share of hidden sets whose mean the interval holds.

    Losses are normal with a part that a prompt's rows share; those of hard prompts are higher, and hard prompts are
    `scale` times as likely among hidden ones, which the forecast is told as `importance`.
    """
    hits = []
    for seed in range(SETS):
        generator = np.random.default_rng(seed)

        def rows(prompts: int, share: float, generator: np.random.Generator = generator) -> tuple[Floats, Floats]:
            hard = generator.random(prompts) < share
            shared = generator.normal(size=prompts) * 0.3 + hard * 0.5
            return (1 + shared[:, None] + 0.4 * generator.normal(size=(prompts, 2))).ravel(), np.repeat(hard, 2)

        held, hard = rows(300, 0.3)
        hidden, _ = rows(150, 0.3 * scale / (0.7 + 0.3 * scale))
        weights = np.where(hard, importance, 1.0)
        found = draw_scores(
            [mean_of(held)],
            np.repeat(np.arange(300), 2),
            importance=weights,
            public_rows=50,
            private_rows=300,
            draws=300,
            seed=seed,
        )
        interval = interval_of(found.private[:, 0])
        hits.append(interval.low <= hidden.mean() <= interval.high)
    return float(np.mean(hits))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_interval_holds_nine_of_ten_hidden_scores(scale: float) -> None:
    assert 0.84 <= coverage(scale, scale) <= 0.96


def test_a_shift_that_is_ignored_is_missed() -> None:
    assert coverage(3.0) < 0.5


def drawn(losses: Floats, groups: Floats, **options: int) -> Floats:
    sizes = {"public_rows": 50, "private_rows": 200} | options
    return draw_scores([mean_of(column) for column in losses.T], groups, **sizes).private  # type: ignore[arg-type]


def test_the_spread_is_that_of_both_samples_and_of_prompts() -> None:
    losses = np.random.default_rng(0).normal(size=(400, 1))
    single = drawn(losses, np.arange(400))
    assert single.std() == pytest.approx(losses.std() * np.sqrt(1 / 400 + 1 / 200), rel=0.06)
    fourfold = drawn(np.repeat(losses[:100], 4, axis=0), np.repeat(np.arange(100), 4))
    assert fourfold.std() == pytest.approx(losses[:100].std() * np.sqrt(1 / 100 + 1 / 50), rel=0.06)


def test_weights_of_rows_count_in_a_score() -> None:
    losses = np.tile([[1.0], [0.0]], (50, 1))
    draws = draw_scores(
        [mean_of(losses[:, 0])], np.repeat(np.arange(50), 2), np.tile([3.0, 1.0], 50), public_rows=10, private_rows=10
    )
    assert draws.private == pytest.approx(0.75)


def test_importance_within_a_prompt_moves_its_score() -> None:
    losses = np.tile([1.0, 0.0], 50)
    draws = draw_scores(
        [mean_of(losses)],
        np.repeat(np.arange(50), 2),
        importance=np.tile([3.0, 1.0], 50),
        public_rows=10,
        private_rows=10,
    )
    assert draws.private == pytest.approx(0.75)


def test_one_prompt_and_bad_weights_are_refused() -> None:
    losses = np.ones((4, 1))
    with pytest.raises(DataError, match="one prompt tell nothing about others"):
        drawn(losses, np.zeros(4))
    with pytest.raises(DataError, match="weight"):
        draw_scores([mean_of(losses[:, 0])], np.arange(4), importance=[1, 1, 1, np.nan], public_rows=2, private_rows=2)


def test_picks_are_the_best_and_the_one_that_adds_most() -> None:
    generator = np.random.default_rng(1)
    base = 1 + 0.1 * generator.normal(size=4000)
    other = 1.02 + 0.1 * generator.normal(size=4000)
    private = np.stack([base + 0.001, base, other], axis=1)
    picks = pick_two(private, -1)
    assert (picks.first, picks.second) == (1, 2)  # the near copy, though better on average than the other, adds nothing
    assert picks.gain == pytest.approx(float((base - np.minimum(base, other)).mean()))
    assert picks.chance == pytest.approx(float((other < base).mean()))
    upwards = pick_two(-private, 1)
    assert (upwards.first, upwards.second, upwards.gain) == (1, 2, pytest.approx(picks.gain))


def test_one_run_has_no_second_pick_and_a_copy_no_gain() -> None:
    private = np.random.default_rng(2).normal(size=(50, 1))
    assert pick_two(private, -1).second is None
    twice = pick_two(np.repeat(private, 2, axis=1), -1)
    assert (twice.second, twice.gain, twice.chance) == (1, 0.0, 0.0)
    with pytest.raises(DataError, match="no draw of hidden rows has a score"):
        pick_two(np.full((5, 2), np.nan), -1)


def test_weights_are_used_only_where_the_classifier_tells_the_texts_apart() -> None:
    generator = np.random.default_rng(3)
    hidden = np.arange(600) >= 400
    unknown = np.zeros((600, 1))
    alike = shift_of(generator.uniform(0.3, 0.7, 600), hidden, np.arange(600), unknown)
    assert not alike.found
    assert alike.importance.tolist() == [1.0] * 400
    assert alike.effective_rows == pytest.approx(400)
    told = np.clip(generator.uniform(0.0, 0.8, 600) + 0.2 * hidden, 0, 1)
    apart = shift_of(told, hidden, np.arange(600), unknown)
    assert apart.found
    assert apart.importance.mean() == pytest.approx(1)
    assert apart.importance.max() / apart.importance.min() <= 100 + 1e-9
    assert apart.effective_rows < 400
    assert (np.argsort(told[:400]) == np.argsort(told[:400] + 1e-3 * apart.importance)).all()


def test_weights_take_the_whole_shift_where_the_classifier_takes_a_part() -> None:
    """Long rows are three times as likely among the hidden ones, by odds; the chances have a third of that logit."""
    long, hidden = np.arange(900) % 3 == 0, np.arange(900) >= 500
    long[500:] = np.arange(400) % 5 < 3
    chances = np.where(long, 0.59, 0.5)
    known = ((long - long.mean()) / long.std())[:, None]
    for columns, ratio in ((np.zeros((900, 1)), 1.44), (known, 3.0)):
        importance = shift_of(chances, hidden, np.arange(900), columns).importance
        found = importance[long[:500]].mean() / importance[~long[:500]].mean()
        assert found == pytest.approx(ratio, rel=0.06)


def test_balanced_weights_have_the_wanted_means_and_change_no_more_than_they_must() -> None:
    generator = np.random.default_rng(4)
    columns, weights = generator.normal(size=(2000, 3)), generator.uniform(0.5, 2, 2000)
    means = weights @ columns / weights.sum()
    np.testing.assert_allclose(balanced(weights, columns, means), weights / weights.mean(), rtol=1e-4)
    wanted = means + np.array([0.5, 0.0, 0.0])
    moved = balanced(weights, columns, wanted)
    np.testing.assert_allclose(moved @ columns / moved.sum(), wanted, atol=0.02)
    slopes = np.linalg.lstsq(np.column_stack([columns, np.ones(2000)]), np.log(moved / weights), rcond=None)[0]
    assert slopes[:3] == pytest.approx([0.5, 0, 0], abs=0.05)  # a normal column's mean moves by its slope


def test_a_classifier_in_folds_that_learns_nothing_seldom_finds_a_shift() -> None:
    """Its folds share rows; an interval that ignores it is too narrow."""
    found, naive = [], []
    for seed in range(120):
        generator = np.random.default_rng(seed)
        rows, hidden, folds = generator.normal(size=(120, 8)), generator.random(120) < 0.5, np.arange(120) % 5
        scores = np.zeros(120)
        for fold in range(5):
            rest, own = folds != fold, folds == fold
            scores[own] = rows[own] @ (rows[rest & hidden].mean(axis=0) - rows[rest & ~hidden].mean(axis=0))
        area = shift_of(1 / (1 + np.exp(-scores)), hidden, np.arange(120), np.zeros((120, 1))).area
        found.append(area.low > 0.5)
        naive.append(area.value - (area.value - area.low) / np.sqrt(2) > 0.5)
    assert np.mean(found) <= 0.04 < np.mean(naive)
