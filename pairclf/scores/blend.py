"""Blends: weights and temperatures of several models, fitted to the labels of held-out rows, and judged on others.

`BLENDS` is the one table of ways to fit. All but greedy selection are convex problems of the log loss, which scipy
solves: the weights of an arithmetic mean on the simplex, and the exponents of a geometric mean (the logarithmic opinion
pool, which holds a temperature). `cross_fit` judges them on folds that they were not fitted to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pairclf.scores.calibration import RANGE, Method, methods_of, scores_of, temperature_of
from pairclf.scores.calibration import fit as fit_calibration
from pairclf.scores.metrics import Floats, class_prior, log_loss
from pairclf.scores.probabilities import Calibration, Mean, blend, logits_of, probabilities
from pairclf.task import Task

SMALLEST = 0.01
"""Members with a smaller weight are left out, and the others are fitted again."""

ROUNDS = 50
"""Rounds of greedy selection, each of which adds a member: weights are multiples of 1/50."""

_EPS = float(np.finfo(np.float64).eps)
_SOLVER = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 2000, "maxcor": 20}


@dataclass(frozen=True, slots=True, eq=False)
class HeldOutRows:
    """Rows with a label that several models have scored, none of which was trained on them.

    Attributes:
        members: `(M, N, C)`, the models' probabilities; NaN where one has not scored a row.
        targets: `(N, C)`.
        weights: `(N,)`, of the rows.
        task: whether a row has several labels.
    """

    members: Floats
    targets: Floats
    weights: Floats
    task: Task

    def only(self, chosen: NDArray[np.bool_]) -> HeldOutRows:
        """Some of the rows: `chosen` is `(N,)`."""
        return HeldOutRows(self.members[:, chosen], self.targets[chosen], self.weights[chosen], self.task)

    def loss(self, scores: Floats) -> float:
        """The log loss of probabilities `(N, C)`."""
        return log_loss(scores, self.targets, self.weights, multi_label=self.task.multi_label)


@dataclass(frozen=True, slots=True, eq=False)
class Blend:
    """How members' probabilities become one.

    Attributes:
        weights: `(M,)`, from 0 up, with the sum 1.
        calibration: of the mean.
        mean: its kind.
    """

    weights: Floats
    calibration: Calibration = field(default=Calibration())
    mean: Mean = "arithmetic"

    def of(self, members: Floats, task: Task) -> Floats:
        """Probabilities `(N, C)` from those of the members `(M, N, C)`, as `predict` computes them."""
        used = np.flatnonzero(self.weights)
        return blend(
            list(members[used]),
            task,
            weights=self.weights[used],
            prior=np.zeros(members.shape[2]),
            calibration=self.calibration,
            kind=self.mean,
        )


# --- methods ---------------------------------------------------------------------------------------------------------


def best_single(rows: HeldOutRows) -> Blend:
    """The member with the lowest log loss alone."""
    losses = [rows.loss(member) for member in rows.members]
    return Blend(np.eye(len(losses))[int(np.argmin(losses))])


def uniform(rows: HeldOutRows) -> Blend:
    """Equal weights."""
    return Blend(np.full(len(rows.members), 1 / len(rows.members)))


def greedy(rows: HeldOutRows) -> Blend:
    """Ensemble selection with replacement: each round adds the member with which the mean is best.

    The round with the lowest loss counts. Caruana et al., Ensemble Selection from Libraries of Models, ICML 2004.
    """
    terms, shares = _labelled(rows)
    counts, total = np.zeros(len(terms)), np.zeros(terms.shape[1])
    best = (np.inf, counts)
    for number in range(1, ROUNDS + 1):
        losses = -(np.log((total + terms) / number) @ shares)
        member = int(np.argmin(losses))
        total, counts = total + terms[member], counts + np.eye(len(terms))[member]
        if losses[member] < best[0] - 1e-12:
            best = (float(losses[member]), counts / number)
    return Blend(best[1])


def arithmetic(rows: HeldOutRows) -> Blend:
    """The weights on the simplex whose mean of probabilities has the lowest log loss: a convex problem.

    The loss plus the sum of the weights has its minimum over all weights from 0 up where their sum is 1, so bounds
    suffice (Kim, Carbonetto, Stephens and Anitescu 2020, arXiv 1806.01412, section 2).
    """
    if not np.isfinite(rows.members).all():
        return _arithmetic_in_part(rows)
    terms, shares = _labelled(rows)

    def objective(weights: Floats) -> tuple[float, Floats]:
        mean = np.maximum(weights @ terms, _EPS)
        return float(weights.sum() - shares @ np.log(mean)), 1 - terms @ (shares / mean)

    weights = _minimised(objective, len(terms), upper=None)
    return Blend(weights / weights.sum())


def _arithmetic_in_part(rows: HeldOutRows) -> Blend:
    """`arithmetic`, where members have not scored all rows (NaN): the weights of those that did are normalised.

    The loss is the difference of two convex functions, so that this is a minimum near equal weights. No weight is 0:
    each row needs one that is above.
    """
    known: NDArray[np.bool_] = np.asarray(np.isfinite(rows.members).all(axis=2))
    filled = np.where(known[..., None], rows.members, 0.5)
    terms, shares = _labelled(HeldOutRows(filled, rows.targets, rows.weights, rows.task))
    columns = np.concatenate([rows.targets, 1 - rows.targets], axis=1) if rows.task.multi_label else rows.targets
    is_known = known[:, np.nonzero(columns * rows.weights[:, None] > 0)[0]].astype(np.float64)

    def objective(weights: Floats) -> tuple[float, Floats]:
        mean, total = np.maximum(weights @ (terms * is_known), _EPS), weights @ is_known
        gradient = is_known @ (shares / total) - (terms * is_known) @ (shares / mean)
        return float(shares @ (np.log(total) - np.log(mean))), gradient

    weights = _minimised(objective, len(terms), upper=1.0, lower=SMALLEST / len(terms))
    return Blend(weights / weights.sum())


def arithmetic_calibrated(rows: HeldOutRows, method: Method = "temperature") -> Blend:
    """`arithmetic`, and then a calibration of its mean: a method that the task can use."""
    fitted = arithmetic(rows)
    mean, known = fitted.of(rows.members, rows.task), (rows.targets, rows.task, rows.weights)
    if method == "temperature":
        return Blend(fitted.weights, Calibration(temperature_of(mean, *known)))
    return Blend(fitted.weights, fit_calibration(method, scores_of(mean, rows.task), *known))


def geometric(rows: HeldOutRows) -> Blend:
    """Exponents b from 0 up of the normalised product of p_m ** b_m with the lowest log loss: a convex problem.

    It is a multinomial logistic regression on the members' logits with one coefficient a member. The weights are
    b / sum(b), and the temperature is 1 / sum(b).
    """
    logits = np.stack([logits_of(member, rows.task) for member in rows.members])
    shares = rows.weights / rows.weights.sum()

    def objective(exponents: Floats) -> tuple[float, Floats]:
        fitted = probabilities(np.tensordot(exponents, logits, axes=1), rows.task)
        residuals = (fitted - rows.targets) * shares[:, None]
        return rows.loss(fitted), np.tensordot(logits, residuals, axes=2)

    exponents = _minimised(objective, len(logits), upper=1 / RANGE[0])
    total = float(exponents.sum())
    if total < 1 / RANGE[1]:  # no member knows anything: nearly uniform probabilities are best
        return Blend(np.full(len(logits), 1 / len(logits)), Calibration(RANGE[1]), "geometric")
    return Blend(exponents / total, Calibration(1 / total), "geometric")


Fit = Callable[[HeldOutRows], Blend]


def without_small(fit: Fit, rows: HeldOutRows) -> Blend:
    """The blend of a fit without members below `SMALLEST`: the others are fitted again until none is."""
    used = np.arange(len(rows.members))
    while True:
        fitted = fit(HeldOutRows(rows.members[used], rows.targets, rows.weights, rows.task))
        kept = fitted.weights >= min(SMALLEST, fitted.weights.max())
        if kept.all():
            weights = np.zeros(len(rows.members))
            weights[used] = fitted.weights
            return replace(fitted, weights=weights)
        used = used[kept]


CALIBRATED: dict[str, Method] = {
    "arithmetic, temperature per label": "temperature per label",
    "arithmetic, tied vector scaling": "tied vector scaling",
}
"""Blends whose mean gets more than a temperature, and the method, which the task must be able to use."""

BLENDS: dict[str, Fit] = {
    "best single": best_single,
    "uniform": uniform,
    "greedy": partial(without_small, greedy),
    "arithmetic": partial(without_small, arithmetic),
    "arithmetic, tempered": partial(without_small, arithmetic_calibrated),
    "geometric": partial(without_small, geometric),
    **{
        name: partial(without_small, partial(arithmetic_calibrated, method=method))
        for name, method in CALIBRATED.items()
    },
}
"""Ways to fit a blend, the simplest first."""


def blends_of(task: Task) -> dict[str, Fit]:
    """The ways that a task can use. All of them are printed, and the best on held-out folds is written."""
    usable = methods_of(task)
    return {name: fit for name, fit in BLENDS.items() if CALIBRATED.get(name, "temperature") in usable}


# --- judging ---------------------------------------------------------------------------------------------------------


def cross_fit(fit: Fit, rows: HeldOutRows, folds: NDArray[np.int64], done: Callable[[], object]) -> Floats:
    """Probabilities `(N, C)` of each fold's rows by the blend that was fitted to the rows of all other folds.

    Args:
        fit: fits a blend.
        rows: of all folds.
        folds: `(N,)`, two or more different ones.
        done: is called after each fold.
    """
    scores = np.empty_like(rows.targets)
    for fold in np.unique(folds):
        held_out = folds == fold
        scores[held_out] = fit(rows.only(~held_out)).of(rows.members[:, held_out], rows.task)
        done()
    return scores


def gains(fitted: Blend, rows: HeldOutRows) -> list[tuple[int, float]]:
    """The members of a blend in the order in which they help most, with the gain of each over those before it.

    Returns:
        Place of the member, and nats a row: the first one's gain is over the class prior.
    """
    prior = np.tile(class_prior(rows.targets, rows.weights), (len(rows.targets), 1))
    left, chosen, before = np.flatnonzero(fitted.weights).tolist(), list[int](), rows.loss(prior)
    ordered = []
    while left:
        losses = [_loss_of_some(fitted, rows, [*chosen, member]) for member in left]
        best = int(np.argmin(losses))
        chosen.append(left.pop(best))
        ordered.append((chosen[-1], before - losses[best]))
        before = losses[best]
    return ordered


def _loss_of_some(fitted: Blend, rows: HeldOutRows, members: Sequence[int]) -> float:
    """The log loss while these members alone have scored the rows."""
    weights = np.zeros_like(fitted.weights)
    weights[members] = fitted.weights[members]
    return rows.loss(replace(fitted, weights=weights).of(rows.members, rows.task))


# --- arithmetic ------------------------------------------------------------------------------------------------------


def _labelled(rows: HeldOutRows) -> tuple[Floats, Floats]:
    """The probabilities `(M, K)` of all classes with a part in a row's target, and the part of each in the loss `(K,)`.

    With several labels per row, a label that does not hold is a class of its own.
    """
    members, targets = rows.members, rows.targets
    if rows.task.multi_label:
        members, targets = (np.concatenate([values, 1 - values], axis=-1) for values in (members, targets))
    parts = targets * rows.weights[:, None]
    used = parts > 0
    return np.maximum(members[:, used], _EPS), parts[used] / parts.sum()


def _minimised(
    objective: Callable[[Floats], tuple[float, Floats]], members: int, *, upper: float | None, lower: float = 0.0
) -> Floats:
    """The minimum of a convex function over `(M,)` numbers from `lower` to `upper`, from its value and gradient."""
    from scipy.optimize import minimize  # slow to import, and most commands fit nothing

    start, bounds = np.full(members, 1 / members), [(lower, upper)] * members
    result = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=_SOLVER)
    minimum: Floats = result.x
    return minimum
