"""Calibration: fit temperatures and tied vector scaling, and say by nested folds what they are worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pairclf.scores.figures import Judged
from pairclf.scores.intervals import Estimate
from pairclf.scores.metrics import Floats, log_loss, row_losses
from pairclf.scores.probabilities import Calibration, has_tie, logits_of, probabilities
from pairclf.task import Task

Method = Literal["temperature", "temperature per label", "tied vector scaling"]
METHODS: tuple[Method, ...] = get_args(Method)

RANGE = (0.05, 20.0)
"""The range of temperatures, and of the tie's scale. A fit at a bound means that the scores are not probabilities."""

BIAS = 10.0
"""The largest bias of the tie, in nats."""

GRID = 49
"""Grid points before the refinement: the loss of a mean of two orders may have several minima."""

STEPS = 30
"""Steps of the golden section, each of which shortens the interval to 62%."""

SAMPLE = 4_000
"""Rows on which a fit starts, if there are more: it then needs a few steps on all rows."""

NEAR = 1.5
"""The factor around the sample's temperature within which that of all rows is searched for first."""


NESTED_FOLDS = 5
"""Folds of prompts in which a calibration is nested, where the scores come from no folds."""

NESTED, FLATTERING = "log_loss_calibrated", "log_loss_calibrated_own_rows"
"""Names in a bundle's manifest: log loss of the held-out rows with a temperature that was fitted to others of them, and
with one that was fitted to these very rows. The bundle does not apply it."""


Rows = NDArray[np.intp] | NDArray[np.bool_]


class Scores(Protocol):
    """Maps a calibration, or a temperature, to the probabilities `(R, C)` of some rows (places, or a mask), or of all.

    The calibration is in its final place: before the mean of both orders for a member of an ensemble, after it for the
    temperature of a blend.
    """

    def __call__(self, calibration: Calibration | float, rows: Rows | None = None, /) -> Floats: ...


def scores_of(values: Floats, task: Task) -> Scores:
    """The scores of a table of probabilities `(N, C)`, whose logits are calibrated."""
    logits = logits_of(values, task)

    def at(calibration: Calibration | float, rows: Rows | None = None, /) -> Floats:
        if calibration in (1.0, Calibration()):
            return values if rows is None else values[rows]
        return probabilities(logits if rows is None else logits[rows], task, calibration)

    return at


def method_of(calibration: Calibration) -> Method:
    """The simplest method that can fit this."""
    if isinstance(calibration.temperature, tuple):
        return "temperature per label"
    return "temperature" if calibration == Calibration(calibration.temperature) else "tied vector scaling"


def methods_of(task: Task) -> list[Method]:
    """The methods that a task can use, the simplest first."""
    several, tie = task.multi_label and len(task.classes) > 1, has_tie(task)
    usable = {"temperature": True, "temperature per label": several, "tied vector scaling": tie}
    return [method for method in METHODS if usable[method]]


def fit_temperature(
    scores: Callable[[float], Floats],
    targets: ArrayLike,
    task: Task,
    weights: ArrayLike | None = None,
    *,
    near: float | None = None,
) -> float:
    """The temperature with the lowest log loss on these rows. Use held-out rows: on training rows it is too low.

    Args:
        scores: as `Scores`, of a temperature and all rows.
        targets: `(N, C)`.
        task: whether a row has several labels.
        weights: `(N,)` of the rows; None: equal.
        near: a temperature, such as that of a sample, around which the minimum is searched for first; None: everywhere.

    Raises:
        DataError: as `log_loss`.
    """
    from scipy.optimize import minimize_scalar  # slow to import, and most commands fit nothing

    def loss(log_temperature: float) -> float:
        at = scores(float(np.exp(log_temperature)))
        return log_loss(at, targets, weights, multi_label=task.multi_label)

    def refined(low: float, high: float) -> float:
        return float(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6}).x)

    if near is not None:
        width, place = float(np.log(NEAR)), float(np.log(near))
        found = refined(place - width, place + width)
        if abs(found - place) < 0.9 * width:
            return float(np.exp(found))
    grid = np.log(np.geomspace(*RANGE, GRID))
    best = int(np.argmin([loss(float(place)) for place in grid]))
    return float(np.exp(refined(grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)])))


def temperature_of(scores: Floats, targets: Floats, task: Task, weights: Floats) -> float:
    """`fit_temperature` of one table of probabilities `(N, C)`, in a fraction of the time.

    The log loss is convex in the factor of the logits, so that its minimum is the root of its slope.
    """
    from scipy.optimize import brentq  # slow to import, and most commands fit nothing

    logits = logits_of(scores, task)

    def slope(factor: float) -> float:
        residuals = probabilities(logits * factor, task) - targets
        return float(weights @ (residuals * logits).sum(axis=1))

    low, high = 1 / RANGE[1], 1 / RANGE[0]
    if slope(low) >= 0:
        return RANGE[1]
    return RANGE[0] if slope(high) <= 0 else 1 / float(brentq(slope, low, high, xtol=1e-7))


def fit(method: Method, scores: Scores, targets: Floats, task: Task, weights: Floats) -> Calibration:
    """The calibration with the lowest log loss on these rows.

    Args:
        method: one of `methods_of(task)`.
        scores: of these rows.
        targets: `(N, C)`.
        task: what is judged.
        weights: `(N,)`.

    Raises:
        DataError: as `log_loss`.
    """
    if method == "temperature per label":
        return _fit_per_label(scores, targets, weights)
    near = _of_sample(scores, targets, task, weights)
    if method == "tied vector scaling":
        return _fit_tied(near, scores, targets, weights)
    return Calibration(near if len(targets) <= SAMPLE else fit_temperature(scores, targets, task, weights, near=near))


def _of_sample(scores: Scores, targets: Floats, task: Task, weights: Floats) -> float:
    """The temperature of a sample of the rows; of all, if they are few."""
    if len(targets) <= SAMPLE:
        return fit_temperature(scores, targets, task, weights)
    rows = np.linspace(0, len(targets) - 1, SAMPLE).astype(np.intp)
    return fit_temperature(of_rows(scores, rows), targets[rows], task, weights[rows])


def of_rows(scores: Scores, rows: Rows) -> Scores:
    """The scores of some rows; of these, `rows` of the result are counted anew."""
    places = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows

    def at(calibration: Calibration | float, chosen: Rows | None = None, /) -> Floats:
        return scores(calibration, places if chosen is None else places[chosen])

    return at


def _fit_tied(temperature: float, scores: Scores, targets: Floats, weights: Floats) -> Calibration:
    from scipy.optimize import minimize

    def read(values: Floats) -> Calibration:
        return Calibration(float(np.exp(values[0])), float(np.exp(values[1])), float(values[2]))

    scale = (float(np.log(RANGE[0])), float(np.log(RANGE[1])))
    minimum = minimize(
        lambda values: log_loss(scores(read(values)), targets, weights),
        np.array([np.log(temperature), 0.0, 0.0]),
        bounds=[scale, scale, (-BIAS, BIAS)],
        method="L-BFGS-B",
        options={"ftol": 1e-10, "gtol": 1e-7},
    )
    return read(minimum.x)


def _fit_per_label(scores: Scores, targets: Floats, weights: Floats) -> Calibration:
    """One temperature a label: the labels' losses add up, so all are searched for at once, by golden section."""
    labels = targets.shape[1]

    def losses(log_temperatures: Floats) -> Floats:
        predicted = scores(Calibration(tuple(np.exp(log_temperatures).tolist())))
        by_label = [row_losses(predicted[:, [place]], targets[:, [place]], multi_label=True) for place in range(labels)]
        return np.average(np.stack(by_label, axis=1), axis=0, weights=weights)

    grid = np.log(np.geomspace(*RANGE, GRID))
    best = np.argmin([losses(np.full(labels, place)) for place in grid], axis=0)
    low, high = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, GRID - 1)]
    golden = (np.sqrt(5) - 1) / 2
    for _ in range(STEPS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        is_left = losses(left) <= losses(right)
        low, high = np.where(is_left, low, left), np.where(is_left, right, high)
    return Calibration(tuple(np.exp((low + high) / 2).tolist()))


def at_bound(calibration: Calibration) -> bool:
    """Whether a fit ended at the bound of its range: the scores are no probabilities, or there are too few rows."""
    scales = np.append(calibration.temperature, calibration.tie_scale)
    low, high = RANGE
    return bool(
        (scales < low * 1.001).any() or (scales > high / 1.001).any() or abs(calibration.tie_bias) > 0.999 * BIAS
    )


@dataclass(frozen=True, slots=True)
class FittedCalibration:
    """A method of calibration, fitted.

    Attributes:
        method: how it was fitted.
        calibration: fitted on all rows; this is what would be used.
        losses: `(N,)`, of rows whose calibration was fitted on the rows of the other folds.
        flattering: log loss of the calibration on the rows that it was fitted on.
        nested: `(N, C)`, the probabilities that `losses` are of.
    """

    method: Method
    calibration: Calibration
    losses: Floats
    flattering: float
    nested: Floats


@dataclass(frozen=True, slots=True)
class NestedCalibration:
    """What a fitted calibration is worth.

    Attributes:
        fitted: the calibration.
        raw: log loss without it.
        nested: log loss of rows whose calibration was fitted on the rows of the other folds.
        gain: `raw - nested` in nats, paired, with its interval.
    """

    fitted: FittedCalibration
    raw: float
    nested: float
    gain: Estimate

    @property
    def is_worth_it(self) -> bool:
        """Whether the gain's interval lies above 0, and the fit inside its range."""
        return self.gain.low > 0 and not at_bound(self.fitted.calibration)

    def is_better_than(self, other: NestedCalibration) -> bool:
        """Whether the interval of the difference of two gains, which share their draws, lies above 0."""
        return Estimate(self.gain.value - other.gain.value, self.gain.draws - other.gain.draws).low > 0


def fit_nested(method: Method, scores: Scores, judged: Judged, folds: NDArray[np.int64]) -> FittedCalibration:
    """Fit a method on all rows; and for each fold on the others, for losses that do not flatter.

    Args:
        method: one of `methods_of(task)`.
        scores: of all rows.
        judged: targets and weights.
        folds: `(N,)`, two or more.

    Raises:
        DataError: as `log_loss`.
    """
    targets, weights, task = judged.target, judged.weights, judged.task
    nested = np.empty_like(judged.predicted)
    for fold in np.unique(folds):
        inside, others = folds == fold, folds != fold
        calibration = fit(method, of_rows(scores, others), targets[others], task, weights[others])
        nested[inside] = scores(calibration, inside)
    calibration = fit(method, scores, targets, task, weights)
    honest, flattering = (
        row_losses(values, targets, multi_label=task.multi_label) for values in (nested, scores(calibration))
    )
    return FittedCalibration(method, calibration, honest, float(np.average(flattering, weights=weights)), nested)
