"""What a member has still to score: sequences, equal ones once, and how they go together into forward passes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pairclf.inference.work import Piece
from pairclf.inputs.plan import by_token_budget
from pairclf.inputs.render import Encoded

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is known of a member's sequences without holding their ids. A task that can't swap has one order, O = 1.

    Attributes:
        lengths: `(N, O)`, tokens of each row in each order.
        shared: `(N,)`, tokens that both orders of a row begin with; 0 with one order.
        twin: `(N, O)`, flat index `row * O + order` of the first sequence with the same ids: its own, where it is the
            first. A row with A == B has one sequence.
    """

    lengths: Ints
    shared: Ints
    twin: Ints

    @property
    def first(self) -> Bools:
        """`(N, O)`: the sequences that are to be scored; the others get their twin's logits."""
        flat: Bools = self.twin == np.arange(self.twin.size).reshape(self.twin.shape)
        return flat


def look_at(encoded: Iterable[tuple[Encoded, ...]]) -> Inputs:
    """Go through a member's rows once, and keep of each what `Inputs` has."""
    lengths, shared, twin = [], [], []
    known: dict[bytes, int] = {}
    for row, shown in enumerate(encoded):
        lengths.append([len(one.ids) for one in shown])
        shared.append(_same_start(shown[0].ids, shown[1].ids) if len(shown) > 1 else 0)
        keys = [hashlib.blake2b(one.ids.tobytes(), digest_size=16).digest() for one in shown]
        twin.append([known.setdefault(key, row * len(shown) + order) for order, key in enumerate(keys)])
    return Inputs(*(np.array(one, dtype=np.int64) for one in (lengths, shared, twin)))


def _same_start(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    """Length of what both begin with, less than either: the last token is read, and never shared."""
    size = min(len(one), len(other)) - 1
    apart = np.flatnonzero(one[:size] != other[:size])
    return int(apart[0]) if len(apart) else size


class Load(NamedTuple):
    """What a forward pass computes: tokens, and the sum of the squares of the sequences' lengths; sums add up."""

    tokens: float
    squares: float
    passes: float = 1.0


class Backlog:
    """The sequences of one member that nobody was given yet.

    Sequences have a rank: 1, those of a row's first order, which all rows are to have before any has more; 2, those of
    the other order; 0, those that are not wanted or that a twin stands for.

    Args:
        inputs: of the member.
        orders: the orders wanted, the first one first.
    """

    def __init__(self, inputs: Inputs, orders: Sequence[int]) -> None:
        self.inputs = inputs
        self.layout = "packed"
        """How workers lay out a batch: shared computes once what both orders begin with; padded computes padding."""
        self.rank = np.zeros(inputs.lengths.shape, dtype=np.int8)
        for rank, order in reversed(list(enumerate(orders[: inputs.lengths.shape[1]], start=1))):
            self.rank.reshape(-1)[inputs.twin[:, order]] = rank  # a twin that both ranks want is of the first
        self.todo: Bools = self.rank.astype(bool)

    def __len__(self) -> int:
        return len(self.rank)

    def rows(self, rank: int | None = None) -> Bools:
        """`(N,)`: rows with a sequence left, of this rank or any."""
        return np.asarray(self._left(rank).any(axis=1))

    def pieces(self, rows: Iterable[int], rank: int | None = None) -> list[Piece]:
        """What is left of these rows: of this rank, or of both at once."""
        wanted = self._left(rank)
        found = ((int(row), np.flatnonzero(wanted[row])) for row in rows)
        return [Piece(row, tuple(orders.tolist())) for row, orders in found if len(orders)]

    def batches(self, budget: int, rank: int | None = None) -> list[list[int]]:
        """The rows of all that was ever wanted, in forward passes, longest first; what was given away is in them too.

        They depend on the inputs and the budget alone: what is left after a kill is scored in the passes, and to the
        bits, that it would have been scored in.
        """
        wanted = self.rank > 0 if rank is None else self.rank == rank
        members = np.flatnonzero(wanted.any(axis=1))
        padded = self.layout == "padded"
        widths = wanted.shape[1] * (self.inputs.lengths * wanted).max(axis=1)
        sizes = widths if padded else self._tokens(wanted)
        return [members[batch].tolist() for batch in by_token_budget(sizes[members].tolist(), budget, padded=padded)]

    def _tokens(self, wanted: Bools) -> Ints:
        """`(N,)` tokens that each row's wanted sequences are, if they go together."""
        tokens: Ints = (self.inputs.lengths * wanted).sum(axis=1) - self._common(wanted)
        return tokens

    def _common(self, wanted: Bools) -> Ints:
        """`(N,)` tokens that are computed once for two wanted sequences."""
        both = wanted.sum(axis=1) > 1
        return self.inputs.shared * both if self.layout == "shared" else np.zeros(len(self), dtype=np.int64)

    def load_of(self, pieces: Iterable[Piece]) -> Load:
        """What one forward pass over these pieces computes."""
        tokens = squares = longest = count = 0
        for row, orders in pieces:
            lengths = [int(self.inputs.lengths[row, order]) for order in orders]
            common = int(self.inputs.shared[row]) if self.layout == "shared" and len(orders) > 1 else 0
            tokens += sum(lengths) - common
            squares += sum(length**2 for length in lengths) - common**2
            longest, count = max(longest, *lengths), count + len(lengths)
        if self.layout == "padded":
            return Load(count * longest, count * longest**2)
        return Load(tokens, squares)

    def left(self, budget: int, rank: int | None = None) -> Load:
        """What all that is left computes, in all its forward passes; `rank` None: both orders of a row at once."""
        wanted = self._left(rank)
        tokens = float(self._tokens(wanted).sum())
        squares = float((self.inputs.lengths**2 * wanted).sum() - (self._common(wanted) ** 2).sum())
        return Load(tokens, squares, float(np.ceil(tokens / budget)))

    def costs(self, rank: int) -> Ints:
        """`(N,)` tokens of what each row has left of a rank."""
        return self._tokens(self._left(rank))

    def _left(self, rank: int | None) -> Bools:
        return self.todo if rank is None else self.todo & (self.rank == rank)

    def keep(self, rows: Ints) -> None:
        """Want nothing but these rows (and the twins that stand for them)."""
        stand = np.zeros(self.rank.size, dtype=bool)
        stand[self.inputs.twin[rows].reshape(-1)] = True
        self.rank[~stand.reshape(self.rank.shape)] = 0
        self.todo &= self.rank > 0

    def give(self, pieces: Iterable[Piece]) -> None:
        """These are somebody's now, or known."""
        for row, orders in pieces:
            self.todo[row, list(orders)] = False

    def take_back(self, pieces: Iterable[Piece]) -> None:
        """These were not done after all."""
        for row, orders in pieces:
            self.todo[row, list(orders)] = True
