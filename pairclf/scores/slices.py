"""Slices of rows: where a model is worse than on the others, and biases for a side, corrected for many looks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pairclf.scores.intervals import Estimate, Statistic, mean_of, ratio
from pairclf.scores.metrics import Floats

MIN_ROWS = 30
"""The fewest rows of a slice, and outside of it: fewer give no interval that holds."""

FALSE_DISCOVERIES = 0.05
"""The share of false ones among the slices and biases that stand out (Benjamini and Hochberg 1995)."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A slice of the rows, or a bias for a side.

    Attributes:
        trait: what was looked at, such as `turns`.
        name: the slice, such as `2 turns`; or whom the bias favours.
        rows: number of rows.
        loss: log loss of these rows.
        gap: of a slice, its log loss less that of the other rows; of a bias, half of the favoured side's mean lead in
            probability, less half of its mean lead in labels.
        adjusted_p: the p-value of "the gap is 0", adjusted for all slices and biases.
    """

    trait: str
    name: str
    rows: int
    loss: float
    gap: Estimate
    adjusted_p: float

    @property
    def stands_out(self) -> bool:
        """Whether the gap is no chance, of all that were looked at."""
        return self.adjusted_p <= FALSE_DISCOVERIES


BIAS = "bias for"
"""The trait of a bias."""


class Look(NamedTuple):
    """A slice or bias before it is estimated: its rows `(N,)`, and the statistic of its gap."""

    mask: NDArray[np.bool_]
    gap: Statistic


def looks_at(
    losses: Floats, traits: Mapping[str, Sequence[str | None]], surplus: Mapping[str, Floats]
) -> dict[str, Look]:
    """The slices and biases with `MIN_ROWS` rows or more, by `trait\\0name`.

    Args:
        losses: `(N,)`.
        traits: `(N,)` names of slices by trait; None: the row is in no slice.
        surplus: by bias, `(N,)`, as `surplus_of`.
    """
    looks: dict[str, Look] = {}
    for trait, names in traits.items():
        values = np.asarray([name or "" for name in names])
        for name in np.unique(values[values != ""]).tolist():
            mask = values == name
            if min(mask.sum(), (~mask).sum()) >= MIN_ROWS:
                looks[f"{trait}\0{name}"] = Look(mask, _gap(losses, mask))
    for name, rows in surplus.items():
        if (mask := ~np.isnan(rows)).sum() >= MIN_ROWS:
            looks[f"{BIAS}\0{name}"] = Look(mask, mean_of(rows))
    return looks


def slices_of(looks: Mapping[str, Look], gaps: Mapping[str, Estimate], losses: Floats, weights: Floats) -> list[Slice]:
    """The slices and biases, those that stand out first, then by the size of the gap.

    Args:
        looks: of `looks_at`.
        gaps: the estimates of their statistics, by the same names.
        losses: `(N,)`.
        weights: `(N,)` of the rows.
    """
    slices = []
    for (key, look), adjusted_p in zip(looks.items(), _adjust([gaps[key].p_value for key in looks]), strict=True):
        trait, _, name = key.partition("\0")
        loss = float(np.average(losses[look.mask], weights=weights[look.mask]))
        slices.append(Slice(trait, name, int(look.mask.sum()), loss, gaps[key], float(adjusted_p)))
    return sorted(slices, key=lambda part: (not part.stands_out, -abs(part.gap.value)))


def surplus_of(predicted: Floats, targets: Floats, favoured: NDArray[np.int64], sides: tuple[int, int]) -> Floats:
    """By how much each row favours a side more than its label does, `(N,)`; NaN where no side is favoured.

    Half of the side's lead in probability less half of its lead in the label, so that a tie that is predicted too often
    or too rarely counts for neither; with two classes it is the probability less the label.

    Args:
        predicted: `(N, C)`.
        targets: `(N, C)`.
        favoured: `(N,)`: 0 for the first of `sides`, 1 for the second, -1 for none.
        sides: the columns of the two sides' victories.
    """
    a, b = sides
    lead = (predicted[:, a] - predicted[:, b] - targets[:, a] + targets[:, b]) / 2
    return np.where(favoured < 0, np.nan, np.where(favoured == 0, lead, -lead))


def _gap(losses: Floats, mask: NDArray[np.bool_]) -> Statistic:
    """The mean loss of the rows less that of the others."""
    columns = np.stack([losses * mask, mask, losses * ~mask, ~mask], axis=1).astype(np.float64)
    return Statistic(columns, lambda sums: ratio(sums[..., 0], sums[..., 1]) - ratio(sums[..., 2], sums[..., 3]))


def _adjust(p_values: Sequence[float]) -> Floats:
    """Benjamini and Hochberg's adjusted p-values; 1 where there is none. `scipy.stats` has them too, and takes a second
    to import."""
    known = np.array([1.0 if math.isnan(p) else p for p in p_values])
    order, count = np.argsort(known)[::-1], len(known)
    adjusted = np.empty(count)
    adjusted[order] = np.minimum.accumulate(known[order] * count / np.arange(count, 0, -1)).clip(max=1.0)
    return adjusted
