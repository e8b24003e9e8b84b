"""Intervals: how far a figure would move with other prompts, by a bootstrap over groups of rows.

Rows with one prompt are alike, so prompts are drawn and not rows: each draw takes as many groups as there are, with
replacement, and a drawn group brings all its rows. A figure is a function of weighted sums over the rows, so a draw is
one row of a matrix product, and 2,000 draws of 57,000 rows take seconds. Figures that are estimated together share
their draws: their differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pairclf.errors import DataError
from pairclf.scores.metrics import Floats, checked_weights

DRAWS = 2000
LEVEL = 0.95
"""The share of draws between `Estimate.low` and `Estimate.high`."""

CELLS = 4_000_000
"""Numbers of a block of draws `(draws, groups)`, of 8 bytes each, which bounds the memory."""


class Statistic(NamedTuple):
    """A figure as a function of sums over rows.

    Attributes:
        columns: `(N, K)`, the terms of each row; they are multiplied with the row's weight and added up.
        of: maps sums `(..., K)` to figures `(...)`; NaN where these sums have none, as with no row of a class.
    """

    columns: Floats
    of: Callable[[Floats], Floats]

    def value(self, weights: Floats) -> float:
        """The figure of all rows, with weights `(N,)`."""
        return float(self.of(weights @ self.columns))


def mean_of(values: ArrayLike) -> Statistic:
    """The weighted mean of `(N,)` values, such as the losses of rows. Where a value is NaN, its row is left out."""
    column = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(column)
    return Statistic(np.stack([np.where(known, column, 0.0), known], axis=1), lambda sums: ratio(*_columns(sums)))


def ratio(numerator: ArrayLike, denominator: ArrayLike) -> Floats:
    """`numerator / denominator`; NaN where the denominator is 0."""
    above, below = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    quotient: Floats = np.divide(above, below, out=np.full(np.broadcast(above, below).shape, np.nan), where=below != 0)
    return quotient


def _columns(sums: Floats) -> Iterator[Floats]:
    return (sums[..., place] for place in range(sums.shape[-1]))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its draws.

    Attributes:
        value: the figure of all rows.
        draws: `(D,)`, the figures of the draws; NaN where a draw has none. Empty: there is one group alone, of which
            no interval follows.
    """

    value: float
    draws: Floats

    @property
    def low(self) -> float:
        """The lower bound of the interval; NaN if there is none."""
        return self._quantile((1 - LEVEL) / 2)

    @property
    def high(self) -> float:
        """The upper bound of the interval; NaN if there is none."""
        return self._quantile((1 + LEVEL) / 2)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0

    @property
    def share_below_zero(self) -> float:
        """The share of draws below 0, those at 0 half: P(better), if this is a difference of losses. NaN: no draws."""
        known = self._known()
        return float(((known < 0) + 0.5 * (known == 0)).mean()) if len(known) else math.nan

    @property
    def p_value(self) -> float:
        """The two-sided p-value of "this figure is 0", from the draws' standard deviation; NaN without draws."""
        known = self._known()
        if not len(known):
            return math.nan
        deviation = float(known.std())
        if deviation == 0:
            return 1.0 if self.value == 0 else 0.0
        return math.erfc(abs(self.value) / deviation / math.sqrt(2))

    def _known(self) -> Floats:
        return self.draws[np.isfinite(self.draws)]

    def _quantile(self, share: float) -> float:
        """A quantile of the draws, moved by their bias: a draw of rows adds noise to a calibration error, for one."""
        known = self._known()
        return float(np.quantile(known, share) - (known.mean() - self.value)) if len(known) else math.nan


def estimate(
    statistics: Mapping[str, Statistic],
    groups: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Figures with draws that they share, by name: the differences of two figures' draws are paired.

    Args:
        statistics: of the same `N` rows.
        groups: `(N,)` keys, equal for rows that are drawn together: those of one prompt.
        weights: `(N,)` of the rows; None: equal.
        draws: number of draws; the bounds have a Monte Carlo error of about 5% of the interval at 2,000.
        seed: the same rows, groups and seed give the same draws.

    Raises:
        DataError: there are no rows, shapes differ, or a weight is not finite or below 0.
    """
    keys = np.asarray(groups)
    n = len(keys)
    if not n:
        raise DataError("there is no row to estimate a figure from")
    for name, statistic in statistics.items():
        if len(statistic.columns) != n:
            raise DataError(f"{name} has {len(statistic.columns):,} rows, the groups have {n:,}; they must be alike")
    row_weights = np.ones(n) if weights is None else checked_weights(weights, n)
    blocks = {id(statistic.columns): statistic.columns for statistic in statistics.values()}  # several share theirs
    ends = np.cumsum([block.shape[1] for block in blocks.values()])
    by_group = _sums_of_groups(np.concatenate(list(blocks.values()), axis=1), keys, row_weights)
    drawn = np.concatenate([counts @ by_group for counts in _draws(len(by_group), draws, seed)])
    split = {
        key: parts
        for key, *parts in zip(
            blocks, np.split(by_group.sum(axis=0), ends[:-1]), np.split(drawn, ends[:-1], axis=1), strict=True
        )
    }
    estimates = {}
    for name, statistic in statistics.items():
        total, sums = split[id(statistic.columns)]
        figures = statistic.of(sums) if len(by_group) > 1 else np.empty(0)
        estimates[name] = Estimate(float(statistic.of(total)), figures)
    return estimates


def estimate_families(
    families: Mapping[str, Mapping[str, Statistic]], groups: ArrayLike, weights: ArrayLike | None = None
) -> dict[str, dict[str, Estimate]]:
    """`estimate` for several tables of statistics at once, which makes the draws once.

    Raises:
        DataError: as `estimate`.
    """
    flat = {f"{family}\0{name}": found for family, table in families.items() for name, found in table.items()}
    estimates = iter(estimate(flat, groups, weights).values())
    return {family: {name: next(estimates) for name in table} for family, table in families.items()}


def difference(
    losses: ArrayLike,
    others: ArrayLike,
    groups: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """The mean of `losses - others`, `(N,)` each, of the same rows: below 0 if the first are better. Paired.

    Raises:
        DataError: as `estimate`.
    """
    gap = np.asarray(losses, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    return estimate({"difference": mean_of(gap)}, groups, weights, draws=draws, seed=seed)["difference"]


def _sums_of_groups(columns: Floats, groups: NDArray[np.generic], weights: Floats) -> Floats:
    """Weighted sums `(G, K)` over the rows of each group."""
    _, place = np.unique(groups, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))
    sums: Floats = np.add.reduceat((columns * weights[:, None])[order], starts, axis=0)
    return sums


def _draws(groups: int, draws: int, seed: int) -> Iterator[Floats]:
    """Blocks `(D, G)` that say how often each draw takes each group."""
    generator = np.random.default_rng(seed)
    block = max(1, CELLS // groups)
    for start in range(0, draws, block):
        rows = min(block, draws - start)
        taken = generator.integers(groups, size=(rows, groups)) + groups * np.arange(rows)[:, None]
        yield np.bincount(taken.ravel(), minlength=rows * groups).reshape(rows, groups).astype(np.float64)
