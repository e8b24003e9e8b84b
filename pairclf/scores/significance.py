"""Is a difference real: sampling noise and seed noise together, what is called different, and what would decide.

A difference of two models' figures on the same rows has two sources of noise. Other rows would give another difference
(`intervals`, paired, over prompt groups). Another seed would give another model: runs that differ by their seed alone
tell how much. A difference is called real if it exceeds both together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from pairclf.scores.intervals import Estimate
from pairclf.scores.metrics import Floats

FALSE_CALLS = 0.02
"""How often one of the compared models is called different from the best although all are equal, by the assumptions.

Below 5%, as the bootstrap and the noise of seeds are estimates themselves; `benchmarks/compare.py` measures it.
"""

PRIOR = 2
"""Differences of seeds, as small as sampling alone makes them, that are counted beside those that were measured.

Without them one pair of seeds would decide nothing: 2% of all differences exceed 32 times a second one of their kind.
With them at most 5% of equals are called different while seeds' own noise is up to 1.5 times the sampling noise; with
one pair of seeds and 2 times the sampling noise it is 7% (docs/compare.md).
"""

SEEDS = (2, 3, 4, 6, 10, 20)
"""Numbers of seeds that are tried, to say what would decide."""

_KNOWN = 1_000_000
"""Degrees of freedom of a noise that needs no estimate."""


@dataclass(frozen=True, slots=True)
class SeedNoise:
    """What another seed changes, or whatever else makes runs differ that should be alike.

    Attributes:
        deviation: standard deviation of a figure between seeds of one config, on the rows compared.
        sampling: what sampling alone makes of it: the rows tell two seeds apart that are equally good.
        degrees: degrees of freedom of `deviation`: runs less groups of seeds.
    """

    deviation: float
    sampling: float
    degrees: int

    @property
    def ratio(self) -> float:
        """The variance of a difference of two seeds by that of its sampling, shrunk to 1 by `PRIOR`."""
        if self.sampling == 0:
            return 1.0
        return (self.degrees * (self.deviation / self.sampling) ** 2 + PRIOR) / (self.degrees + PRIOR)

    @property
    def excess(self) -> float:
        """The variance of one model's figure by its seed, beyond sampling."""
        return max(0.0, self.ratio - 1) * self.sampling**2


def seed_noise(groups: Sequence[Sequence[Estimate]]) -> SeedNoise | None:
    """The noise pooled over groups of figures that differ by their seed alone; None without two seeds, or draws.

    Args:
        groups: figures with draws that all share.
    """
    several = [list(group) for group in groups if len(group) > 1]
    degrees = sum(len(group) - 1 for group in several)

    def around_means(values: Floats) -> Floats:
        """Residuals of `(F, ...)` figures, group by group."""
        parts = np.split(values, np.cumsum([len(group) for group in several])[:-1])
        return np.concatenate([part - part.mean(axis=0) for part in parts])

    return _noise([figure for group in several for figure in group], around_means, degrees)


def effect_noise(table: Sequence[Sequence[Estimate]]) -> SeedNoise | None:
    """The noise of runs that neither their value on an axis nor what they have in common with others explains.

    Seeds that move all values alike are no noise of the axis, and so are left out: residuals of a two-way layout.

    Args:
        table: a line for each value, a column for each combination of the other settings and seeds.

    Returns:
        None: there is one value or one column, or no draws.
    """
    values, columns = len(table), len(table[0])

    def residuals(figures: Floats) -> Floats:
        grid = figures.reshape(values, columns, -1)
        rest: Floats = grid - grid.mean(axis=0) - grid.mean(axis=1, keepdims=True) + grid.mean(axis=(0, 1))
        return rest

    return _noise([figure for line in table for figure in line], residuals, (values - 1) * (columns - 1))


def _noise(figures: Sequence[Estimate], residuals: Callable[[Floats], Floats], degrees: int) -> SeedNoise | None:
    """The root mean square of residuals of the figures, and of what sampling makes of them."""
    if degrees < 1 or not len(figures[0].draws):
        return None
    values = np.array([[figure.value] for figure in figures])
    draws = np.stack([figure.draws - figure.draws.mean() for figure in figures])
    squares = [float((residuals(part) ** 2).sum()) / part.shape[1] for part in (values, draws)]
    deviation, sampling = (math.sqrt(square / degrees) for square in squares)
    return SeedNoise(deviation, sampling, degrees)


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a difference is real.

    Attributes:
        value: of the difference.
        sampling: its standard error over other rows; NaN: unknown, and nothing is real.
        threshold: the smallest difference that would be called real; NaN: unknown.
        is_real: whether it is called real.
        rows_needed: rows with which a difference of this size would be; None: no number would, as the noise of seeds
            alone is too large.
        seeds_needed: seeds of each model with which it would be on these rows; None: the noise of seeds is unknown, or
            none of `SEEDS` would, as the sampling noise alone is too large.
    """

    value: float
    sampling: float
    threshold: float
    is_real: bool
    rows_needed: int | None = None
    seeds_needed: int | None = None


def decide(difference: Estimate, n: int, *, noise: SeedNoise | None, compared: int = 2, seeds: float = 1.0) -> Decision:
    """Whether a paired difference of two models is real.

    The variances of sampling and seeds add up. The quantile is Tukey's for the largest difference among all models
    compared, as the best is chosen by the same figures; its degrees of freedom are those of the seeds' noise.

    Args:
        difference: with draws over the groups of rows.
        n: number of rows.
        noise: between seeds; None: unknown, and left out.
        compared: number of models that are looked at together.
        seeds: how many models of different seeds each of the two figures is a mean of.
    """
    known = difference.draws[np.isfinite(difference.draws)]
    sampling = float(known.std()) if len(known) else math.nan
    threshold = _threshold(sampling, noise, compared, seeds)
    is_real = abs(difference.value) > threshold
    if is_real or not sampling > 0 or difference.value == 0:
        return Decision(difference.value, sampling, threshold, is_real)
    by_seed = 0.0 if noise is None else 2 * noise.excess / seeds
    # With many rows the sampling vanishes, and what is left are the seeds.
    room = (difference.value / _quantile(compared, _degrees(noise))) ** 2 - by_seed
    needed = (
        count for count in SEEDS if _threshold(sampling, _after(noise, count), compared, count) < abs(difference.value)
    )
    return Decision(
        difference.value,
        sampling,
        threshold,
        is_real,
        rows_needed=math.ceil(n * sampling**2 / room) if room > 0 else None,
        seeds_needed=next(needed, None) if noise is not None else None,
    )


def _after(noise: SeedNoise | None, seeds: int) -> SeedNoise | None:
    """The same noise, known from so many seeds of two more models."""
    if noise is None:
        return None
    deviation = math.sqrt(noise.ratio) * noise.sampling
    return SeedNoise(deviation, noise.sampling, noise.degrees + 2 * (seeds - 1))


def _threshold(sampling: float, noise: SeedNoise | None, compared: int, seeds: float) -> float:
    by_rows = _quantile(compared, _KNOWN) * sampling
    if noise is None:
        return by_rows
    total = sampling**2 * min(1.0, noise.ratio) + 2 * noise.excess / seeds
    return max(by_rows, _quantile(compared, _degrees(noise)) * math.sqrt(total))


def _degrees(noise: SeedNoise | None) -> int:
    """Degrees of freedom of a threshold; a training that does not hang on its seed has no noise to estimate."""
    return _KNOWN if noise is None or noise.sampling == 0 else noise.degrees + PRIOR


@cache
def _quantile(compared: int, degrees: int) -> float:
    """How many standard errors the largest of all differences among equals exceeds with `FALSE_CALLS`."""
    from scipy.stats import studentized_range  # slow to import

    return float(studentized_range.ppf(1 - FALSE_CALLS, compared, degrees)) / math.sqrt(2)


def pareto_front(costs: Floats) -> list[bool]:
    """Whether no other row of `(M, K)` is as low in every column and lower in one.

    >>> pareto_front(np.array([[1.0, 5.0], [2.0, 2.0], [2.0, 6.0]]))
    [True, True, False]
    """
    return [not any((other <= row).all() and (other < row).any() for other in costs) for row in costs]
