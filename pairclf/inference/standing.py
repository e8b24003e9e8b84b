"""What is known by now: logits by member, row and order; and the probabilities that follow from them at any moment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from pairclf.inference.backlog import Bools, Inputs, Ints
from pairclf.inference.work import Floats
from pairclf.scores.metrics import entropy_of
from pairclf.scores.probabilities import mean_of_orders
from pairclf.task import AB, BA, Task


class Judge(Protocol):
    """From members' probabilities to the blend (`members.Ensemble`)."""

    @property
    def temperatures(self) -> Sequence[float]: ...
    def blended(self, per_member: Sequence[Floats]) -> Floats: ...


ORDERS = ("AB", "BA")
"""For people: names of `task.AB` and `task.BA`."""


def orders_of(swap: str, member: int, inputs: Inputs) -> tuple[int, ...]:
    """The orders that `predict.swap` wants of a member, the first one first; a task that can't swap has one."""
    if swap == "off" or inputs.lengths.shape[1] == 1:
        return (AB,)
    if swap == "split":
        return (AB,) if member % 2 == 0 else (BA,)
    return (AB, BA)


class Standing:
    """Logits as they come in.

    Args:
        inputs: of each member; equal sequences have one place.
        task: for the swap.
        judge: temperatures, weights and the prior.
        swap: `predict.swap`; an order that it does not want does not count, though a twin may have been scored.
    """

    def __init__(self, inputs: Sequence[Inputs], task: Task, judge: Judge, swap: str) -> None:
        self._inputs = inputs
        self._wanted = [
            np.isin(np.arange(one.twin.shape[1]), orders_of(swap, member, one)) for member, one in enumerate(inputs)
        ]
        self._task = task
        self._judge = judge
        self._logits = [np.full((one.twin.size, len(task.classes)), np.nan) for one in inputs]
        self.failed: list[dict[tuple[int, int], str]] = [{} for _ in inputs]
        """By member: `(row, order)` of sequences that can't be scored, and why."""

    def add(self, member: int, sequences: Sequence[tuple[int, int]], logits: Floats) -> None:
        """Logits `(R, C)` of these `(row, order)`, in the order's own columns."""
        self._logits[member][self._places(member, sequences)] = logits

    def fail(self, member: int, sequences: Sequence[tuple[int, int]], why: str) -> None:
        """These, and the sequences that they stand for, can't be scored."""
        twins = np.argwhere(np.isin(self._inputs[member].twin, self._places(member, sequences)))
        for row, order in twins.tolist():
            self.failed[member][row, order] = why

    def _places(self, member: int, sequences: Sequence[tuple[int, int]]) -> list[int]:
        orders = self._inputs[member].twin.shape[1]
        return [row * orders + order for row, order in sequences]

    def logits(self, member: int) -> Floats:
        """`(N, O, C)`, each order in its own columns; NaN where nothing is known, or wanted."""
        found = self._logits[member][self._inputs[member].twin]
        return np.where(self._wanted[member][:, None], found, np.nan)

    def known(self, member: int) -> Bools:
        """`(N, O)`."""
        return np.asarray(np.isfinite(self.logits(member)).all(axis=2))

    def orders(self) -> Ints:
        """`(N,)`: how many orders stand behind each row: the fewest of a member that knows it; 0: nobody does."""
        known = np.stack([self.known(member).sum(axis=1) for member in range(len(self._inputs))])  # (M, N)
        fewest = np.where(known > 0, known, len(ORDERS)).min(axis=0)
        return np.where(known.any(axis=0), fewest, 0)

    def of_member(self, member: int) -> Floats:
        """`(N, C)`: the mean of the orders that are known, un-swapped; NaN where none is."""
        return mean_of_orders(self.logits(member), self._task, self._judge.temperatures[member])

    def probabilities(self, members: int | None = None) -> Floats:
        """`(N, C)`, every row finite: the blend of what is known; of the first `members` alone, if given."""
        parts = [self.of_member(member) for member in range(len(self._inputs))]
        if members is not None:
            parts[members:] = [np.full_like(parts[0], np.nan)] * (len(parts) - members)
        return self._judge.blended(parts)

    def uncertainty(self, members: int | None = None) -> Floats:
        """`(N,)` nats: the entropy of `probabilities`."""
        return entropy_of(self.probabilities(members), multi_label=self._task.multi_label)
