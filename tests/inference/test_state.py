"""Floats follow from the logits that are known, at any moment."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.special import softmax

from pairclf.inference.state import PredictionState, orders_of
from pairclf.inputs.sequences import SequenceIndex
from pairclf.scores.metrics import Floats
from pairclf.scores.probabilities import Calibration, unswap
from pairclf.task import LMSYS


@dataclass
class Judge:
    """The mean of the members that know a row, else the prior."""

    calibrations: Sequence[Calibration]

    def blend(self, per_member: Sequence[Floats]) -> Floats:
        with warnings.catch_warnings(action="ignore"):
            mean = np.nanmean(per_member, axis=0)
        return np.where(np.isnan(mean), [0.4, 0.35, 0.25], mean)


def inputs(rows: int) -> SequenceIndex:
    flat = np.arange(2 * rows).reshape(rows, 2)
    return SequenceIndex(np.full((rows, 2), 9), np.zeros(rows, dtype=np.int64), flat)


def logits(rows: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=(rows, 2, 3))


def all_of(rows: int) -> list[tuple[int, int]]:
    return [(row, order) for row in range(rows) for order in (0, 1)]


def test_both_orders_are_un_swapped_and_averaged() -> None:
    standing, given = PredictionState([inputs(5)], LMSYS, Judge([Calibration(1.3)]), "full"), logits(5)
    standing.add(0, all_of(5), given.reshape(-1, 3))
    wanted = (softmax(given[:, 0] / 1.3, axis=1) + unswap(softmax(given[:, 1] / 1.3, axis=1), LMSYS)) / 2
    np.testing.assert_allclose(standing.probabilities(), wanted, atol=1e-12)
    assert np.abs(standing.probabilities() - softmax(given / 1.3, axis=2).mean(axis=1)).max() > 0.01  # not un-swapped


def test_a_row_has_what_is_known_of_it() -> None:
    standing, given = PredictionState([inputs(4)], LMSYS, Judge([Calibration()]), "full"), logits(4)
    standing.add(0, [(0, 0), (1, 1), (2, 0), (2, 1)], given[[0, 1, 2, 2], [0, 1, 0, 1]])
    found = standing.probabilities()
    np.testing.assert_allclose(found[0], softmax(given[0, 0]))
    np.testing.assert_allclose(found[1], softmax(given[1, 1])[[1, 0, 2]])
    np.testing.assert_allclose(found[3], [0.4, 0.35, 0.25])
    assert standing.is_scored(0).sum(axis=1).tolist() == [1, 1, 2, 0]


def test_twins_share_what_is_known() -> None:
    one = inputs(2)
    one.duplicate_of[1] = [1, 0]  # the mirrored pair
    standing = PredictionState([one], LMSYS, Judge([Calibration()]), "full")
    standing.add(0, [(0, 0), (0, 1)], logits(1).reshape(-1, 3))
    found = standing.probabilities()
    np.testing.assert_allclose(found[1], found[0][[1, 0, 2]])


def test_an_order_that_is_not_wanted_does_not_count() -> None:
    one = inputs(1)
    one.duplicate_of[0] = [0, 0]  # equal sides: scored once for both orders
    given = logits(1)[:, 0]
    off, full = (PredictionState([one], LMSYS, Judge([Calibration()]), swap) for swap in ("off", "full"))
    for standing in (off, full):
        standing.add(0, [(0, 0)], given)
    np.testing.assert_allclose(off.probabilities(), softmax(given, axis=1))
    assert full.probabilities()[0, 0] == pytest.approx(full.probabilities()[0, 1])


def test_members_that_know_a_row_are_blended_and_those_before_a_cascade_decide() -> None:
    standing = PredictionState([inputs(2), inputs(2)], LMSYS, Judge([Calibration(), Calibration()]), "full")
    standing.add(0, all_of(2), logits(2).reshape(-1, 3))
    before = standing.uncertainty(1)
    standing.add(1, [(0, 0)], logits(1, seed=1)[:, 0])
    np.testing.assert_array_equal(standing.uncertainty(1), before)
    assert standing.uncertainty()[0] != before[0]
    assert standing.uncertainty()[1] == before[1]


def test_what_swap_wants_of_members() -> None:
    two = inputs(1)
    one = SequenceIndex(two.lengths[:, :1], two.shared, two.duplicate_of[:, :1])  # a task that can't swap
    assert [orders_of("split", member, two) for member in (0, 1, 2)] == [(0,), (1,), (0,)]
    assert orders_of("off", 3, two) == orders_of("split", 1, one) == orders_of("full", 0, one) == (0,)
    assert orders_of("full", 0, two) == orders_of("budget", 0, two) == (0, 1)


def test_twins_of_what_can_not_be_scored_are_listed_too() -> None:
    one = inputs(3)
    one.duplicate_of[2] = [1, 0]
    standing = PredictionState([one], LMSYS, Judge([Calibration()]), "full")
    standing.mark_failed(0, [(0, 0)], "it is poisoned")
    assert set(standing.failed[0]) == {(0, 0), (2, 1)}
