"""Both orders of a pair: how far a model contradicts itself when the sides are exchanged, and what their mean gains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pairclf.scores.intervals import Statistic, mean_of
from pairclf.scores.metrics import TIE, Floats, entropy_of, likeliest, row_losses
from pairclf.scores.probabilities import Calibration, mean_of_orders, probabilities, unswap
from pairclf.task import AB, BA, Task

ORDER_TITLES = {
    "flip_rate": "other class in the other order",
    "side_flip_rate": "other side in the other order",
    "first_position_bias": "bias for the side that stands first",
    "order_divergence": "divergence of the orders (nats)",
    "swap_gain": "the mean gains over order AB (nats)",
    "jensen_gain": "the mean gains over one order, on average (nats)",
}
"""The figures of `order_statistics`, by name."""

QUANTILES = (0.5, 0.9, 0.99)
SHARES = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
"""The shares of rows of `gain_curve`."""


@dataclass(frozen=True, slots=True)
class TwoOrders:
    """What a model says of each row in both orders, and their mean, `(N, C)` each, in the columns of order AB."""

    first: Floats
    second: Floats
    mean: Floats


def two_orders(logits: Floats, task: Task, calibration: Calibration) -> TwoOrders:
    """The probabilities of logits `(N, 2, C)`, each order in its own columns."""
    each = probabilities(logits, task, calibration)
    return TwoOrders(each[:, AB], unswap(each[:, BA], task), mean_of_orders(logits, task, calibration))


def order_statistics(orders: TwoOrders, targets: Floats, task: Task) -> dict[str, Statistic]:
    """The statistics of `ORDER_TITLES`.

    - `flip_rate`: share of rows whose likeliest class is another in the other order.
    - `side_flip_rate`: share of rows where the likelier side is the other one, ties left aside; sides that are equally
      likely in an order (within `TIE`) have not flipped.
    - `first_position_bias`: how much more probability the side gets that stands first than half of both sides'
      probability: 0 is fair, -0.5 and 0.5 are the limits. Above 0 the first is favoured.
    - `order_divergence`: mean of both Kullback-Leibler divergences.
    - `swap_gain`: log loss of order AB less that of the mean.
    - `jensen_gain`: mean of both orders' log losses less that of the mean; it is never below 0.
    """
    a, b = (task.classes.index(name) for name in task.swap_classes or ())
    p, q = orders.first, orders.second
    lead_p, lead_q = p[:, a] - p[:, b], q[:, a] - q[:, b]
    half = (p[:, [a, b]].sum(axis=1) + q[:, [a, b]].sum(axis=1)) / 4
    loss_p, loss_q, loss = (row_losses(values, targets) for values in (p, q, orders.mean))
    values = {
        "flip_rate": likeliest(p) != likeliest(q),
        "side_flip_rate": (lead_p * lead_q < 0) & (np.minimum(np.abs(lead_p), np.abs(lead_q)) > TIE),
        "first_position_bias": (p[:, a] + q[:, b]) / 2 - half,
        "order_divergence": _divergence(p, q),
        "swap_gain": loss_p - loss,
        "jensen_gain": (loss_p + loss_q) / 2 - loss,
    }
    return {name: mean_of(rows) for name, rows in values.items()}


def _divergence(p: Floats, q: Floats) -> Floats:
    """Half of Jeffreys' divergence, `(N,)`."""
    tiny = np.finfo(np.float64).tiny
    gap: Floats = ((p - q) * (np.log(np.maximum(p, tiny)) - np.log(np.maximum(q, tiny)))).sum(axis=1) / 2
    return gap


def shift_quantiles(orders: TwoOrders) -> dict[str, float]:
    """Quantiles over the rows of the largest change of a class's probability between the orders."""
    shifts = np.abs(orders.first - orders.second).max(axis=1)
    return {f"{share:g}": float(np.quantile(shifts, share)) for share in QUANTILES}


def gain_curve(orders: TwoOrders, targets: Floats, weights: Floats) -> list[dict[str, float]]:
    """What a second order gains if only the most uncertain share of the rows gets one, in nats over all rows.

    The uncertainty is the entropy of order AB, as under a deadline.
    """
    order = np.argsort(-entropy_of(orders.first), kind="stable")
    gains = (row_losses(orders.first, targets) - row_losses(orders.mean, targets)) * weights / weights.sum()
    sums = np.cumsum(gains[order])
    counts = [max(1, round(share * len(sums))) for share in SHARES]
    return [{"share": share, "gain": float(sums[count - 1])} for share, count in zip(SHARES, counts, strict=True)]
