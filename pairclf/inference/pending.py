"""A model's pending sequences, without duplicates, and the batches that they form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from pairclf.inference.messages import RowOrders
from pairclf.inputs.plan import LAYOUTS, PLAIN, Layout, by_token_budget
from pairclf.inputs.sequences import Bools, Ints, SequenceIndex


class Workload(NamedTuple):
    """What forward passes compute: tokens, and the sum of squared sequence lengths. Workloads can be added."""

    tokens: float
    squares: float
    passes: float = 1.0


class PendingSequences:
    """The sequences of one model that no worker has been given yet.

    Each sequence has a rank. 1: the row's first order, which is scored for all rows before any second order. 2: the
    second order. 0: not wanted, not known, or a duplicate of another sequence.

    Args:
        inputs: the model's sequences.
        orders: the orders to score, the first one first.
    """

    def __init__(self, inputs: SequenceIndex, orders: Sequence[int]) -> None:
        self.inputs = inputs
        self.layout = PLAIN
        """Batch layout of the workers, a key of `LAYOUTS`."""
        self.rank = np.zeros(inputs.lengths.shape, dtype=np.int8)
        # Rank 1 is written last: a sequence that is wanted in both ranks (A == B) has rank 1.
        for rank, order in reversed(list(enumerate(orders[: inputs.lengths.shape[1]], start=1))):
            self.rank.reshape(-1)[inputs.duplicate_of[:, order]] = rank
        self.rank[~inputs.is_known] = 0
        self.is_pending: Bools = self.rank.astype(bool)

    def __len__(self) -> int:
        return len(self.rank)

    def rows_left(self, rank: int | None = None) -> Bools:
        """`(N,)`: rows with a pending sequence of this rank, or of any."""
        return np.asarray(self._pending_mask(rank).any(axis=1))

    def row_orders(self, rows: Iterable[int], rank: int | None = None) -> list[RowOrders]:
        """The pending sequences of these rows, of one rank or of both together."""
        pending = self._pending_mask(rank)
        by_row = ((int(row), np.flatnonzero(pending[row])) for row in rows)
        return [RowOrders(row, tuple(orders.tolist())) for row, orders in by_row if len(orders)]

    def batches(self, budget: int, rank: int | None = None) -> list[list[int]]:
        """All wanted rows in batches, longest first, including rows that are no longer pending.

        The batches depend on the inputs and the budget alone, not on what is still pending. So a resumed run scores the
        remaining rows in the same batches, to the same bits, as an uninterrupted one.
        """
        wanted = self.rank > 0 if rank is None else self.rank == rank
        rows = np.flatnonzero(wanted.any(axis=1))
        padded = self.record.pads
        widths = wanted.shape[1] * (self.inputs.lengths * wanted).max(axis=1)
        sizes = widths if padded else self._computed(wanted)[0]
        return [rows[batch].tolist() for batch in by_token_budget(sizes[rows].tolist(), budget, padded=padded)]

    @property
    def record(self) -> Layout:
        return LAYOUTS[self.layout]

    def _computed(self, selected: Bools) -> tuple[Ints, Ints]:
        """`(N,)` tokens and squares of each row's selected sequences, if they share a batch."""
        return self.record.of_rows(self.inputs.lengths * selected, self.inputs.shared)

    def workload_of(self, batch: Iterable[RowOrders]) -> Workload:
        """The workload of one forward pass over this batch."""
        items = list(batch)
        rows = [row for row, _ in items]
        lengths = np.zeros_like(self.inputs.lengths[rows])
        for index, (row, orders) in enumerate(items):
            lengths[index, list(orders)] = self.inputs.lengths[row, list(orders)]
        return Workload(*self.record.of_pass(lengths, self.inputs.shared[rows]))

    def workload_left(self, budget: int, rank: int | None = None) -> Workload:
        """The workload of all pending sequences of a rank; None: of both ranks, a row's orders together."""
        tokens, squares = (float(by_row.sum()) for by_row in self._computed(self._pending_mask(rank)))
        return Workload(tokens, squares, float(np.ceil(tokens / budget)))

    def tokens_left(self, rank: int) -> Ints:
        """`(N,)` pending tokens of each row in a rank."""
        return self._computed(self._pending_mask(rank))[0]

    def _pending_mask(self, rank: int | None) -> Bools:
        return self.is_pending if rank is None else self.is_pending & (self.rank == rank)

    def restrict_to(self, rows: Ints) -> None:
        """Drop all other rows, except sequences that a kept row is a duplicate of."""
        kept = np.zeros(self.rank.size, dtype=bool)
        kept[self.inputs.duplicate_of[rows].reshape(-1)] = True
        self.rank[~kept.reshape(self.rank.shape)] = 0
        self.is_pending &= self.rank > 0

    def mark_taken(self, batch: Iterable[RowOrders]) -> None:
        """A worker was given this batch, or its scores are known."""
        for row, orders in batch:
            self.is_pending[row, list(orders)] = False

    def put_back(self, batch: Iterable[RowOrders]) -> None:
        """This batch was not scored: make it pending again."""
        for row, orders in batch:
            self.is_pending[row, list(orders)] = True
