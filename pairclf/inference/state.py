"""The state of a prediction: logits by model, row and order, and the probabilities that follow at any moment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from pairclf.inputs.sequences import Bools, Ints, SequenceIndex
from pairclf.scores.metrics import Floats, entropy_of
from pairclf.scores.probabilities import Calibration, mean_of_orders
from pairclf.task import AB, BA, Task


class Blender(Protocol):
    """Blends the models' probabilities (`ensemble.Ensemble`)."""

    @property
    def calibrations(self) -> Sequence[Calibration]: ...
    def blend(self, per_member: Sequence[Floats]) -> Floats: ...


ORDER_NAMES = ("AB", "BA")
"""Names of `task.AB` and `task.BA` in messages."""

ORDERS_HINT = "AB: the order of the file; BA: sides exchanged"


def pass_name(model: str, order: int, orders: int) -> str:
    """`fold0 BA`; the model's name alone if its task has one order."""
    return f"{model} {ORDER_NAMES[order]}" if orders > 1 else model


def orders_of(swap: str, member: int, inputs: SequenceIndex, swap_share: float = 1.0) -> tuple[int, ...]:
    """The orders that a model scores under `predict.swap`, the first one first; one order if the task can't swap, or
    if no row is to have both (`swap_share`)."""
    if swap == "off" or swap_share == 0 or inputs.lengths.shape[1] == 1:
        return (AB,)
    if swap == "split":
        return (AB,) if member % 2 == 0 else (BA,)
    return (AB, BA)


class PredictionState:
    """All logits so far.

    Args:
        inputs: each model's sequences; duplicates share one logit.
        task: its swap maps the second order's columns to the first order's.
        blender: calibrations, weights and the prior.
        swap: `predict.swap`. Logits of other orders are ignored, even if a duplicate of theirs was scored.
        swap_shares: part of each model's rows that have both orders; None: 1.
    """

    def __init__(
        self,
        inputs: Sequence[SequenceIndex],
        task: Task,
        blender: Blender,
        swap: str,
        swap_shares: Sequence[float] | None = None,
    ) -> None:
        self._inputs = inputs
        self._orders_used = [
            np.isin(np.arange(index.duplicate_of.shape[1]), orders_of(swap, member, index, swap_share))
            for member, (index, swap_share) in enumerate(zip(inputs, swap_shares or [1.0] * len(inputs), strict=True))
        ]
        self._task = task
        self._blender = blender
        self._logits = [np.full((index.duplicate_of.size, len(task.classes)), np.nan) for index in inputs]
        self.failed: list[dict[tuple[int, int], str]] = [{} for _ in inputs]
        """By model: `(row, order)` of sequences that can't be scored, and why."""

    def add(self, member: int, sequences: Sequence[tuple[int, int]], logits: Floats) -> None:
        """Add logits `(R, C)` of `(row, order)` sequences, in the order's own columns."""
        self._logits[member][self._flat_indices(member, sequences)] = logits

    def with_duplicates(
        self, member: int, sequences: Sequence[tuple[int, int]], logits: Floats
    ) -> tuple[list[tuple[int, int]], Floats]:
        """All sequences that have these logits `(R, C)`, duplicates among them, and the logits of each."""
        duplicate_of = self._inputs[member].duplicate_of
        places = np.full(duplicate_of.size, -1)
        places[self._flat_indices(member, sequences)] = np.arange(len(sequences))
        places = places[duplicate_of]
        return [(row, order) for row, order in np.argwhere(places >= 0).tolist()], logits[places[places >= 0]]

    def mark_failed(self, member: int, sequences: Sequence[tuple[int, int]], why: str) -> None:
        """Mark sequences, and all duplicates of them, as impossible to score."""
        is_failed = np.isin(self._inputs[member].duplicate_of, self._flat_indices(member, sequences))
        for row, order in np.argwhere(is_failed).tolist():
            self.failed[member][row, order] = why

    def _flat_indices(self, member: int, sequences: Sequence[tuple[int, int]]) -> list[int]:
        orders = self._inputs[member].duplicate_of.shape[1]
        return [row * orders + order for row, order in sequences]

    def logits(self, member: int) -> Floats:
        """`(N, O, C)`, each order in its own columns; NaN for sequences not scored, and for unused orders."""
        logits = self._logits[member][self._inputs[member].duplicate_of]
        return np.where(self._orders_used[member][:, None], logits, np.nan)

    def is_scored(self, member: int) -> Bools:
        """`(N, O)`: whether the model has scored each sequence."""
        return np.asarray(np.isfinite(self.logits(member)).all(axis=2))

    def num_orders(self) -> Ints:
        """`(N,)`: orders behind each row's probabilities: the fewest of any model that scored the row; 0: prior."""
        counts = np.stack([self.is_scored(member).sum(axis=1) for member in range(len(self._inputs))])  # (M, N)
        fewest = np.where(counts > 0, counts, len(ORDER_NAMES)).min(axis=0)
        return np.where(counts.any(axis=0), fewest, 0)

    def model_probabilities(self, member: int, order: int | None = None) -> Floats:
        """`(N, C)`: the mean of the scored orders, un-swapped, or one order's alone; NaN if none is scored."""
        logits = self.logits(member)
        if order is not None:
            logits = np.where((np.arange(logits.shape[1]) == order)[:, None], logits, np.nan)
        return mean_of_orders(logits, self._task, self._blender.calibrations[member])

    def probabilities(self, members: int | None = None, order: int | None = None) -> Floats:
        """`(N, C)`, every row finite: the blend of all scores so far, of the first `members` models alone, or of one
        order alone."""
        per_member = [self.model_probabilities(member, order) for member in range(len(self._inputs))]
        if members is not None:
            per_member[members:] = [np.full_like(per_member[0], np.nan)] * (len(per_member) - members)
        return self._blender.blend(per_member)

    def uncertainty_in_first_order(self, member: int) -> Floats:
        """`(N,)` nats: the entropy of the blend of the models up to this one, which counts in its first order alone."""
        per_model = [self.model_probabilities(earlier) for earlier in range(member)]
        first = self.logits(member)
        first[:, 1:] = np.nan
        per_model.append(mean_of_orders(first, self._task, self._blender.calibrations[member]))
        per_model += [np.full_like(per_model[0], np.nan)] * (len(self._inputs) - member - 1)
        return entropy_of(self._blender.blend(per_model), multi_label=self._task.multi_label)

    def uncertainty(self, members: int | None = None) -> Floats:
        """`(N,)` nats: the entropy of `probabilities`."""
        return entropy_of(self.probabilities(members), multi_label=self._task.multi_label)
