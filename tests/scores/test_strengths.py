"""Strengths: exact for one pair, in the order of points for all pairs, and none where answers can't be compared."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairclf.scores.metrics import Floats
from pairclf.scores.strengths import fit_strengths


def chances(pairs: np.ndarray, strengths: Floats, log_nu: float | None) -> Floats:
    """Davidson's probabilities, or Bradley and Terry's, as the papers write them."""
    a, b = np.exp(strengths[pairs.T])
    outcomes = [a, b] if log_nu is None else [a, b, np.exp(log_nu) * np.sqrt(a * b)]
    return np.stack(outcomes, axis=1) / np.sum(outcomes, axis=0)[:, None]


@given(st.lists(st.floats(-4, 4), min_size=2, max_size=6), st.none() | st.floats(-2, 3))
def test_strengths_are_found_again_from_their_probabilities(values: list[float], log_nu: float | None) -> None:
    true = np.array(values) - np.mean(values)
    pairs = np.array(list(combinations(range(len(true)), 2)))
    assert np.abs(fit_strengths(pairs, chances(pairs, true, log_nu), len(true)) - true).max() <= 1e-4


@given(st.integers(2, 7), st.integers(2, 3), st.integers(0, 2**32 - 1))
def test_all_pairs_rank_as_points_do(answers: int, outcomes: int, seed: int) -> None:
    """A victory is a point and a tie half of one: so the likelihood of a round robin has it."""
    pairs = np.array(list(combinations(range(answers), 2)))
    outcome = np.random.default_rng(seed).dirichlet(np.ones(outcomes), len(pairs))
    half = outcome[:, 2:].sum(axis=1) / 2
    points = np.zeros(answers)
    np.add.at(points, pairs[:, 0], outcome[:, 0] + half)
    np.add.at(points, pairs[:, 1], outcome[:, 1] + half)
    strengths = fit_strengths(pairs, outcome, answers)
    assert np.argsort(strengths).tolist() == np.argsort(points).tolist()
    assert abs(strengths.sum()) <= 1e-9
    some = pairs[:-1] if answers > 2 else pairs
    kept = fit_strengths(some[:, ::-1], outcome[: len(some), [1, 0, *range(2, outcomes)]], answers)
    assert np.allclose(kept, fit_strengths(some, outcome[: len(some)], answers), atol=1e-6), "sides are exchanged"


def test_certain_victories_give_finite_strengths() -> None:
    strengths = fit_strengths(np.array([[0, 1], [1, 2], [0, 2]]), np.array([[1.0, 0.0, 0.0]] * 3), 3)
    assert np.isfinite(strengths).all()
    assert strengths[0] > strengths[1] + 5 > strengths[2] + 10


@pytest.mark.parametrize("pairs", [[], [[0, 1]], [[0, 1], [2, 3]]])
def test_answers_that_no_pairs_connect_have_no_strengths(pairs: list[list[int]]) -> None:
    outcomes = np.full((len(pairs), 3), 1 / 3)
    assert np.isnan(fit_strengths(np.array(pairs, dtype=np.int64).reshape(-1, 2), outcomes, 4)).all()


def test_one_answer_alone_has_strength_zero() -> None:
    assert fit_strengths(np.zeros((0, 2), dtype=np.int64), np.zeros((0, 3)), 1).tolist() == [0.0]
