"""A model's pending sequences, without duplicates, and the batches that they form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from pairclf.inference.messages import RowOrders
from pairclf.inputs.plan import DECIDED_ALONE, LAYOUTS, MAX_SHARING, PLAIN, Layout, by_token_budget
from pairclf.inputs.sequences import Bools, Ints, SequenceIndex


class Workload(NamedTuple):
    """What forward passes compute: tokens, and the sum of squared sequence lengths; and their number.

    Each token of a rationale is a pass over its batch, beside the batch's own; a share of the tokens is a pass over one
    sequence.
    """

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
        """All wanted rows in batches, longest units first, including rows that are no longer pending.

        The batches depend on the inputs and the budget alone, not on what is still pending. So a resumed run scores the
        remaining rows in the same batches, to the same bits, as an uninterrupted one.
        """
        wanted = self.rank > 0 if rank is None else self.rank == rank
        rows = np.flatnonzero(wanted.any(axis=1))
        padded = self.record.pads
        widths = wanted.shape[1] * self.record.sizes((self.inputs.lengths * wanted).max(axis=1))
        sizes = widths if padded else self._sizes(wanted)
        by_unit = np.split(rows, 1 + np.flatnonzero(np.diff(self.inputs.unit_of[rows]))) if len(rows) else []
        tokens = [int(sizes[unit].sum()) for unit in by_unit]
        batches = by_token_budget(tokens, self.room(budget), padded=padded)
        return [np.concatenate([by_unit[unit] for unit in batch]).tolist() for batch in batches]

    @property
    def record(self) -> Layout:
        return LAYOUTS[self.layout]

    @property
    def _prefixes(self) -> Ints:
        """Tokens of each prefix of the file that a pass computes once."""
        tokens: Ints = np.array(self.inputs.prefixes, dtype=np.int64) * int(self.record.shares)
        return tokens

    def room(self, budget: int) -> int:
        """The tokens of a pass that are left for the rows' own, beside the prefixes that it computes once."""
        return max(1, budget - int(self._prefixes.sum()))

    def _computed(self, selected: Bools) -> tuple[Ints, Ints]:
        """`(N,)` own tokens and squares of each row's selected sequences, if they share a batch."""
        once = self._prefixes[self.inputs.prefix_numbers]
        return self.record.of_rows(self.inputs.lengths * selected, self.inputs.shared, once)

    def _sizes(self, selected: Bools) -> Ints:
        """`(N,)` tokens that a row's selected sequences take of a batch's room."""
        if self.record.pads:
            return np.asarray(self.record.sizes(self.inputs.lengths * selected).sum(axis=1))
        whole = (self.inputs.lengths * selected).sum(axis=1)
        sizes: Ints = np.maximum(self._computed(selected)[0], -(-whole // MAX_SHARING))
        return sizes

    def workload_of(self, batch: Iterable[RowOrders]) -> Workload:
        """The workload of one forward pass over this batch."""
        items = list(batch)
        rows = [row for row, _ in items]
        lengths = np.zeros_like(self.inputs.lengths[rows])
        for index, (row, orders) in enumerate(items):
            lengths[index, list(orders)] = self.inputs.lengths[row, list(orders)]
        numbers = self.inputs.prefix_numbers[rows]
        tokens, squares = self.record.of_pass(lengths, self.inputs.shared[rows], self._prefixes[numbers])
        once = self._prefixes[np.unique(numbers[lengths > 0])]
        passes = self._passes(1.0, int(np.count_nonzero(lengths)))
        return Workload(tokens + int(once.sum()), squares + int((once**2).sum()), passes)

    def workload_left(self, budget: int, rank: int | None = None) -> Workload:
        """The workload of all pending sequences of a rank; None: of both ranks, a row's orders together."""
        pending, once = self._pending_mask(rank), self._prefixes
        tokens, squares = (float(by_row.sum()) for by_row in self._computed(pending))
        batches = self.batches_left(budget, rank)
        passes = self._passes(batches, int(np.count_nonzero(pending)))
        return Workload(tokens + batches * float(once.sum()), squares + batches * float((once**2).sum()), passes)

    def _passes(self, batches: float, sequences: int) -> float:
        return batches + self.inputs.rationale * (batches + DECIDED_ALONE * sequences)

    def batches_left(self, budget: int, rank: int | None = None) -> float:
        """About how many batches the pending sequences of a rank take."""
        return float(np.ceil(self._sizes(self._pending_mask(rank)).sum() / self.room(budget)))

    def tokens_left(self, rank: int) -> Ints:
        """`(N,)` tokens that each row's pending sequences of a rank take of a batch's `room`."""
        return self._sizes(self._pending_mask(rank))

    def _pending_mask(self, rank: int | None) -> Bools:
        return self.is_pending if rank is None else self.is_pending & (self.rank == rank)

    def restrict_to(self, rows: Ints) -> None:
        """Drop all other rows, except sequences that a kept row is a duplicate of."""
        kept = np.zeros(self.rank.size, dtype=bool)
        kept[self.inputs.duplicate_of[rows].reshape(-1)] = True
        self.rank[~kept.reshape(self.rank.shape)] = 0
        self.is_pending &= self.rank > 0

    def restrict_second_to(self, rows: Ints) -> None:
        """Drop the second order of all other rows, except sequences that a kept row is a duplicate of."""
        kept = np.zeros(self.rank.size, dtype=bool)
        kept[self.inputs.duplicate_of[rows].reshape(-1)] = True
        self.rank[(self.rank == 2) & ~kept.reshape(self.rank.shape)] = 0
        self.is_pending &= self.rank > 0

    def mark_taken(self, batch: Iterable[RowOrders]) -> None:
        """A worker was given this batch, or its scores are known."""
        for row, orders in batch:
            self.is_pending[row, list(orders)] = False

    def put_back(self, batch: Iterable[RowOrders]) -> None:
        """This batch was not scored: make it pending again."""
        for row, orders in batch:
            self.is_pending[row, list(orders)] = True
