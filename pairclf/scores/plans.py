"""Plans for a limited time: which models score which rows in which orders, for the lowest log loss of their blend.

A plan is what an ensemble's file says: models in the order in which they run, the part of the rows that each scores
(`share`), and the part of these that it scores in both orders (`swap_share`); the parts are the most uncertain rows.
`scored` scores held-out rows as prediction would, and `search` finds the plans that no other beats in loss and time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pairclf.scores.blend import Blend, HeldOutRows, arithmetic_calibrated
from pairclf.scores.calibration import Method
from pairclf.scores.metrics import Floats, entropy_of

SHARES = (1.0, 0.5, 0.2)
"""Parts of the rows that a plan may give to a model."""

SWAP_SHARES = (1.0, 0.3, 0.0)
"""Parts of these that it may have scored in both orders."""

EXACT = 1000
"""With no more possible plans than these, all are fitted; else neighbours of the best plans are, until none is new."""

STEP = 1000
"""About so many neighbours of the best plans are fitted before the best are chosen again; those of three plans at
least."""

SEARCHED_ROWS, LOCAL_ROWS = 20_000, 2_000
"""Plans are compared on so many rows at most. A local search fits more plans: it compares them on `LOCAL_ROWS`, and the
best of them then on `SEARCHED_ROWS`. Figures are of all rows."""

LEAST_GAIN = 5e-5
"""Nats a row. A plan that takes longer than another one must be better by this: a smaller gain is no reason to wait."""


class Use(NamedTuple):
    """How a plan uses a model: its place among the models, the part of the rows, and of these in both orders."""

    member: int
    share: float = 1.0
    swap_share: float = 1.0


Plan = tuple[Use, ...]
"""Models in the order in which they run. The first scores all rows."""


class Seconds(NamedTuple):
    """What a model takes: to load it, and for all rows in the first order, and in the second."""

    load: float
    first: float
    second: float


@dataclass(frozen=True, slots=True, eq=False)
class PlannableRows:
    """Held-out rows, with what each model says of them in one order and in both.

    Attributes:
        rows: `members` are the means of both orders, or of the one that there is.
        first: `(M, N, C)`, of the order that is scored first.
        two_orders: `(M,)`, whether the model has both orders.
        seconds: of each model, for all rows of the hidden test.
    """

    rows: HeldOutRows
    first: Floats
    two_orders: Sequence[bool]
    seconds: Sequence[Seconds]

    def only(self, chosen: NDArray[np.bool_]) -> PlannableRows:
        """Some of the rows: `chosen` is `(N,)`."""
        return PlannableRows(self.rows.only(chosen), self.first[:, chosen], self.two_orders, self.seconds)

    def seconds_of(self, plan: Plan) -> float:
        """Seconds of a plan."""
        return sum(
            self.seconds[use.member].load
            + use.share * (self.seconds[use.member].first + use.swap_share * self.seconds[use.member].second)
            for use in plan
        )


@dataclass(frozen=True, slots=True)
class FoundPlan:
    """A plan with its seconds and its expected log loss on other rows, in nats a row."""

    plan: Plan
    seconds: float
    loss: float


# --- what a plan scores ----------------------------------------------------------------------------------------------


def scored(plan: Plan, data: PlannableRows, fitted: Blend | None = None) -> Floats:
    """Probabilities `(m, N, C)` of a plan's models, as prediction has them; NaN where a model does not score a row.

    Args:
        plan: `m` models.
        data: the rows.
        fitted: the blend of these models, which tells uncertain rows; None: equal weights.
    """
    rows, count = data.rows, data.rows.members.shape[1]
    blend = fitted or Blend(np.full(len(plan), 1 / len(plan)))
    result = np.full((len(plan), *rows.members.shape[1:]), np.nan)
    for place, use in enumerate(plan):
        chosen = np.arange(count)
        if use.share < 1:
            chosen = _most_uncertain(chosen, use.share, result, place, blend, rows)
        result[place, chosen] = data.first[use.member, chosen]
        if use.swap_share and data.two_orders[use.member]:
            if use.swap_share < 1:
                chosen = _most_uncertain(chosen, use.swap_share, result, place + 1, blend, rows)
            result[place, chosen] = rows.members[use.member, chosen]
    return result


def _most_uncertain(
    candidates: NDArray[np.int64], share: float, per_model: Floats, models: int, blend: Blend, rows: HeldOutRows
) -> NDArray[np.int64]:
    """The share of the candidates of which the blend of the first models is least sure."""
    first = Blend(blend.weights[:models], blend.calibration)
    uncertainty = entropy_of(first.of(per_model[:models], rows.task), multi_label=rows.task.multi_label)
    ranked = candidates[np.argsort(-uncertainty[candidates], kind="stable")]
    return ranked[: round(share * len(candidates))]


def fit_plan(plan: Plan, data: PlannableRows, method: Method = "temperature") -> Blend:
    """The weights of a plan's models and the calibration of their mean, fitted to the rows as the plan scores them."""
    return arithmetic_calibrated(_as_scored(plan, data), method)


def _as_scored(plan: Plan, data: PlannableRows, fitted: Blend | None = None) -> HeldOutRows:
    rows = data.rows
    return HeldOutRows(scored(plan, data, fitted), rows.targets, rows.weights, rows.task)


def probabilities_of(plan: Plan, data: PlannableRows, fitted: Blend) -> Floats:
    """`(N, C)`: what prediction with this plan and this blend gives."""
    return fitted.of(scored(plan, data, fitted), data.rows.task)


def expected_loss(plan: Plan, data: PlannableRows) -> float:
    """The log loss of a plan's best weights and temperature on these rows, and what fitting them flatters.

    That is m / (2 N) nats: m - 1 free weights, and the temperature. The temperature belongs to it: a mean of models
    that are too sure is softer than each of them, which is no merit once a temperature is fitted to either.
    """
    rows = _as_scored(plan, data)
    return rows.loss(arithmetic_calibrated(rows).of(rows.members, rows.task)) + len(plan) / (2 * len(rows.targets))


# --- the search ------------------------------------------------------------------------------------------------------


def uses_of(member: int, data: PlannableRows) -> list[Use]:
    """All ways to use a model. Where both orders have the same scores, one is enough."""
    swaps = SWAP_SHARES if data.two_orders[member] else (1.0,)
    if data.two_orders[member] and np.abs(data.first[member] - data.rows.members[member]).max() < 1e-6:
        swaps = (0.0,)
    return [Use(member, share, swap) for share in SHARES for swap in swaps]


def ordered(uses: Iterable[Use], ranks: Sequence[int]) -> Plan:
    """Models in the order in which they run: those for all rows first; among them, the better one first."""
    return tuple(sorted(uses, key=lambda use: (use.share < 1, ranks[use.member])))


def search(
    data: PlannableRows, limit: float = float("inf"), done: Callable[[], object] = lambda: None
) -> list[FoundPlan]:
    """The plans that no other one beats: each is better than all that take no longer, by `LEAST_GAIN` at least.

    With at most `EXACT` plans all are fitted. Otherwise it is a Pareto local search (Paquete, Chiarandini and Stuetzle
    2004): the plans that differ in one model from one of the best are fitted, until the best ones have no new one. With
    many models it follows some of the best plans, from the quickest to the best.

    Args:
        data: the rows.
        limit: seconds; plans that take longer are not looked at.
        done: is called after each plan.

    Returns:
        From the quickest to the best; empty if no plan is in time.
    """
    models = range(len(data.seconds))
    options = [uses_of(member, data) for member in models]
    is_exact = np.prod([len(ways) + 1.0 for ways in options]) <= EXACT
    searched = _sampled(data, SEARCHED_ROWS if is_exact else LOCAL_ROWS)
    losses = [searched.rows.loss(member) for member in searched.rows.members]
    ranks = [sorted(models, key=losses.__getitem__).index(member) for member in models]
    found: dict[Plan, FoundPlan] = {}

    def look_at(plans: Iterable[Iterable[Use]]) -> None:
        for uses in plans:
            plan = ordered(uses, ranks)
            if plan and plan[0].share == 1 and plan not in found and (seconds := data.seconds_of(plan)) <= limit:
                found[plan] = FoundPlan(plan, seconds, expected_loss(plan, searched))
                done()

    if is_exact:
        look_at(filter(None, choice) for choice in product(*([None, *ways] for ways in options)))
        return front_of(found.values())
    look_at([use] for ways in options for use in ways)
    expanded: set[Plan] = set()
    most = max(3, STEP // sum(map(len, options)))
    while new := [entry.plan for entry in _spread(front_of(found.values()), most) if entry.plan not in expanded]:
        expanded.update(new)
        look_at(plan for entry in new for plan in _neighbours(entry, options))
    more = _sampled(data, SEARCHED_ROWS)
    best = front_of(found.values())
    return front_of(replace(entry, loss=expected_loss(entry.plan, more)) for entry in best)


def _sampled(data: PlannableRows, most: int) -> PlannableRows:
    count = len(data.rows.targets)
    if count <= most:
        return data
    chosen = np.zeros(count, dtype=bool)
    chosen[np.random.default_rng(0).choice(count, most, replace=False)] = True
    return data.only(chosen)


def _spread(front: Sequence[FoundPlan], most: int) -> list[FoundPlan]:
    """So many plans of the front at most, from the quickest to the best."""
    places = np.unique(np.linspace(0, len(front) - 1, min(most, len(front))).round().astype(int))
    return [front[place] for place in places]


def _neighbours(plan: Plan, options: Sequence[Sequence[Use]]) -> Iterator[list[Use]]:
    """Plans that differ from this one in one model: added, left out, or used in another way."""
    for member, ways in enumerate(options):
        others = [use for use in plan if use.member != member]
        yield others
        yield from ([*others, use] for use in ways)


def front_of(plans: Iterable[FoundPlan]) -> list[FoundPlan]:
    """The plans that are better than all that take no longer, from the quickest to the best."""
    front: list[FoundPlan] = []
    for entry in sorted(plans, key=lambda entry: (entry.seconds, entry.loss, len(entry.plan))):
        if not front or entry.loss < front[-1].loss - LEAST_GAIN:
            front.append(entry)
    return front


def best_within(front: Sequence[FoundPlan], seconds: float) -> FoundPlan | None:
    """The best plan of a front that takes no longer; None: there is none."""
    return next((entry for entry in reversed(front) if entry.seconds <= seconds), None)


# --- judging ---------------------------------------------------------------------------------------------------------


def nested_scores(
    data: PlannableRows,
    folds: NDArray[np.int64],
    limits: Sequence[float],
    longest: float,
    methods: Sequence[Method],
    done: Callable[[], object] = lambda: None,
) -> dict[Method, list[Floats]]:
    """Probabilities `(N, C)` of each fold's rows by the plan that was chosen, and weights that were fitted, without it.

    Args:
        data: rows of all folds.
        folds: `(N,)`, two or more different ones.
        limits: seconds that a plan may take: one result each.
        longest: seconds; plans that take longer are not looked at.
        methods: of the calibration, which is fitted with the weights: results for each.
        done: is called after each plan that is looked at.
    """
    results = {method: [np.empty_like(data.rows.targets) for _ in limits] for method in methods}
    for fold in np.unique(folds):
        held_out = folds == fold
        training, judged = data.only(~held_out), data.only(held_out)
        front = search(training, longest, done)
        for (method, scores), (place, limit) in product(results.items(), enumerate(limits)):
            found = best_within(front, limit) or front[0]
            fitted = fit_plan(found.plan, training, method)
            scores[place][held_out] = probabilities_of(found.plan, judged, fitted)
    return results
