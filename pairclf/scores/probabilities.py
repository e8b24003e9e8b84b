"""The one way from logits to probabilities: temperature, softmax or sigmoid, the swap undone, the mean of both orders.

Training validates with it, `evaluate` fits the temperature through it, and `predict` and the server answer by it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, softmax

from pairclf.scores.metrics import Floats
from pairclf.task import BA, Task


def unswap(scores: ArrayLike, task: Task) -> Floats:
    """Scores `(..., C)` of order BA (probabilities or logits) in the columns of order AB; its own inverse.

    >>> from pairclf.task import LMSYS
    >>> unswap([[0.7, 0.2, 0.1]], LMSYS).tolist()
    [[0.2, 0.7, 0.1]]
    """
    given = np.asarray(scores, dtype=np.float64)
    return given[..., list(task.swapped_columns)]


def probabilities(logits: ArrayLike, task: Task, temperature: float = 1.0) -> Floats:
    """Softmax (sigmoid, where a row has several labels) of logits `(..., C)` divided by the temperature."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    found: Floats = expit(scaled) if task.multi_label else softmax(scaled, axis=-1)
    return found


def mean_of_orders(logits: ArrayLike, task: Task, temperature: float = 1.0) -> Floats:
    """Mean probabilities `(N, C)` of a row's orders; NaN where no order is known.

    Args:
        logits: `(N, O, C)`, order AB and, where a task can swap, order BA, each in its own columns; an order that holds
            a NaN is not known.
        task: for the swap.
        temperature: divides the logits of each order, before the mean.
    """
    given = np.asarray(logits, dtype=np.float64)
    known = np.isfinite(given).all(axis=2, keepdims=True)
    each = probabilities(np.where(known, given, 0.0), task, temperature)
    if each.shape[1] > BA:
        each[:, BA] = unswap(each[:, BA], task)
    count = known.sum(axis=1)
    mean: Floats = np.where(known, each, 0.0).sum(axis=1) / np.maximum(count, 1)
    return np.where(count > 0, mean, np.nan)
