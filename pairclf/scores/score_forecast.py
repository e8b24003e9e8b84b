"""Forecasts of the leaderboard: draws of the public and private scores that held-out scores let expect, and two picks.

Two things are uncertain: which prompts the held-out rows happen to have, and which the hidden rows have. A draw takes
the held-out prompts anew, with replacement, as the population; then the public and the private prompts from it. Where
hidden texts are unlike the held-out ones, a prompt's chance is its importance weight. A prompt brings all its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pairclf.errors import DataError
from pairclf.scores.figures import METRICS, judge
from pairclf.scores.intervals import Estimate, Statistic, estimate
from pairclf.scores.metrics import Floats, checked_weights
from pairclf.task import Task

DRAWS = 2000
LEVEL = 0.9
"""The share of hidden sets whose score the interval should hold."""

CLIP = 10.0
"""Importance weights lie between 1 / CLIP and CLIP: a few rows must not decide a forecast."""

PENALTY = 0.03
"""L2 penalty of `balanced`. From 0.01 to 0.1 little changes; with 0, lengths that few held-out rows have decide all."""

ORIGIN = Task(name="origin", fields=("text",), classes=("held out", "hidden"))


@dataclass(frozen=True, slots=True)
class ScoreInterval:
    """A score's mean and its interval of `LEVEL` over draws of hidden sets."""

    mean: float
    low: float
    high: float

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high


@dataclass(frozen=True, slots=True, eq=False)
class ScoreDraws:
    """Scores of `R` runs on `D` draws of the hidden set; a draw has the same rows for all runs.

    Attributes:
        public: `(D, R)`.
        private: `(D, R)`.
    """

    public: Floats
    private: Floats


def interval_of(draws: Floats) -> ScoreInterval:
    """The interval of `(D,)` scores; NaN where no draw has one."""
    known = draws[np.isfinite(draws)]
    if not len(known):
        return ScoreInterval(math.nan, math.nan, math.nan)
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return ScoreInterval(float(known.mean()), float(low), float(high))


def draw_scores(
    statistics: Sequence[Statistic],
    groups: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    importance: ArrayLike | None = None,
    public_rows: int,
    private_rows: int,
    draws: int = DRAWS,
    seed: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> ScoreDraws:
    """Draw hidden sets, and score runs on them.

    Args:
        statistics: of each run, on the same `N` held-out rows.
        groups: `(N,)` keys, equal for rows of one prompt.
        weights: `(N,)`, the rows' weights in the score; None: equal.
        importance: `(N,)`, how many times more likely such a row is among the hidden rows; None: equally likely.
        public_rows: rows of the public part.
        private_rows: rows of the private part.
        draws: number of hidden sets.
        seed: the same seed gives the same draws.
        advance: is called after each draw.

    Raises:
        DataError: there is one prompt alone, shapes differ, or a weight is not finite or below 0.
    """
    keys, place = np.unique(np.asarray(groups), return_inverse=True)
    if len(keys) < 2:
        raise DataError("rows of one prompt tell nothing about others", remedy="give runs with more prompts")
    n = len(place)
    own = np.ones(n) if weights is None else checked_weights(weights, n)
    likely = np.ones(n) if importance is None else checked_weights(importance, n)
    count = np.bincount(place)
    chance = np.bincount(place, likely) / count
    relative = own * likely / chance[place]
    columns = np.concatenate([statistic.columns for statistic in statistics], axis=1)
    sums = np.zeros((len(keys), columns.shape[1]))
    np.add.at(sums, place, columns * relative[:, None])
    per_prompt = float((chance * count).sum() / chance.sum())
    sizes = [max(1, round(rows / per_prompt)) for rows in (public_rows, private_rows)]
    ends = np.cumsum([statistic.columns.shape[1] for statistic in statistics])[:-1]
    generator = np.random.default_rng(seed)
    totals = np.empty((2, draws, columns.shape[1]))
    for draw in range(draws):
        population = generator.integers(len(keys), size=len(keys))
        steps = np.cumsum(chance[population])
        for part, size in enumerate(sizes):
            at = np.searchsorted(steps, generator.random(size) * steps[-1], side="right")
            totals[part, draw] = sums[population[np.minimum(at, len(keys) - 1)]].sum(axis=0)
        advance()
    public, private = (
        np.stack([of.of(split) for of, split in zip(statistics, np.split(part, ends, axis=1), strict=True)], axis=1)
        for part in totals
    )
    return ScoreDraws(public, private)


@dataclass(frozen=True, slots=True)
class FinalPicks:
    """The two submissions to choose, by their private scores on the same draws.

    Attributes:
        first: the run with the best mean.
        second: the run with which the better of the two is best on average; None: there is one run.
        gain: how much better the better of both is than the first, on average; 0 or more.
        chance: the share of draws in which the second is better than the first.
    """

    first: int
    second: int | None = None
    gain: float = 0.0
    chance: float = 0.0


def pick_two(private: Floats, better: int) -> FinalPicks:
    """Choose from `(D, R)` private scores; `better` is 1 if higher is better, -1 if lower is better.

    Raises:
        DataError: no draw has a score of all runs.
    """
    losses = -better * private[np.isfinite(private).all(axis=1)]
    if not len(losses):
        raise DataError("no draw of hidden rows has a score of all runs", remedy="give runs with more rows")
    first = int(losses.mean(axis=0).argmin())
    others = [run for run in range(losses.shape[1]) if run != first]
    if not others:
        return FinalPicks(first)
    of_pairs = {run: float(np.minimum(losses[:, first], losses[:, run]).mean()) for run in others}
    second = min(others, key=lambda run: of_pairs[run])
    gain = float(losses[:, first].mean()) - of_pairs[second]
    return FinalPicks(first, second, max(gain, 0.0), float((losses[:, second] < losses[:, first]).mean()))


@dataclass(frozen=True, slots=True, eq=False)
class TextShift:
    """How unlike the hidden texts are, by a classifier that tells hidden rows from held-out ones.

    Attributes:
        area: its area under the ROC curve, out of fold; .5: they are alike.
        importance: `(N,)` of the held-out rows, with a mean of 1; all 1 where `found` is not set.
        effective_rows: Kish's effective number of held-out rows under these weights.
    """

    area: Estimate
    importance: Floats

    @property
    def found(self) -> bool:
        """Whether the area is above .5 by its interval."""
        return self.area.low > 0.5

    @property
    def effective_rows(self) -> float:
        return float(self.importance.sum() ** 2 / (self.importance**2).sum())


def balanced(weights: Floats, columns: Floats, wanted: Floats) -> Floats:
    """Weights `(N,)`, changed no more than the weighted means of columns need to become the wanted ones.

    Entropy balancing (J. Hainmueller, "Entropy Balancing for Causal Effects", Political Analysis 20, 2012): the logs of
    the weights change by a linear function of the columns, here with an L2 penalty `PENALTY` on its coefficients.

    Args:
        weights: `(N,)`, above 0.
        columns: `(N, K)`, in units of their standard deviation.
        wanted: `(K,)`.
    """
    from scipy.optimize import minimize
    from scipy.special import logsumexp

    base = np.log(weights)

    def objective(slopes: Floats) -> tuple[float, Floats]:
        logs = base + columns @ slopes
        total = logsumexp(logs)
        value = float(total - slopes @ wanted + PENALTY / 2 * slopes @ slopes)
        return value, np.exp(logs - total) @ columns - wanted + PENALTY * slopes

    logs = base + columns @ minimize(objective, np.zeros(len(wanted)), jac=True, method="L-BFGS-B").x
    moved: Floats = len(logs) * np.exp(logs - logsumexp(logs))
    return moved


def shift_of(chances: Floats, hidden: NDArray[np.bool_], groups: ArrayLike, columns: Floats) -> TextShift:
    """The shift that a classifier found.

    Its chances fall short of a shift, the more the fewer rows it has seen. So the weights that follow from them are
    changed until what is known of all rows has the same mean in weighted held-out rows and in hidden ones.

    Args:
        chances: `(N + M,)`, its probability that a row is hidden, where both kinds are equally frequent, out of fold.
        hidden: `(N + M,)`, whether the row is.
        groups: `(N + M,)` keys, equal for rows of one prompt.
        columns: `(N + M, K)`, what is known of the rows, in units of its standard deviation.
    """
    judged = judge(np.stack([1 - chances, chances], axis=1), np.stack([~hidden, hidden], axis=1).astype(float), ORIGIN)
    drawn = estimate({"area": METRICS["roc_auc"].statistic(judged)}, groups)["area"]
    # A model of each fold has seen the others: each pair of rows counts twice, which doubles the variance of chance.
    area = Estimate(drawn.value, drawn.value + math.sqrt(2) * (drawn.draws - drawn.value))
    held_out = np.clip(chances[~hidden], 1e-6, 1 - 1e-6)
    importance: Floats = np.ones(len(held_out))
    if area.low > 0.5:
        odds = np.clip(held_out / (1 - held_out), 1 / CLIP, CLIP)
        moved = np.clip(balanced(odds, columns[~hidden], columns[hidden].mean(axis=0)), 1 / CLIP, CLIP)
        importance = moved / moved.mean()
    return TextShift(area, importance)
