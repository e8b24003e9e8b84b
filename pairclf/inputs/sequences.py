"""An index of a file's sequences without their ids: lengths, shared starts, duplicates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pairclf.inputs.render import BRANCH, Encoded
from pairclf.inputs.truncate import Ids

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class SequenceIndex:
    """A model's sequences without their ids. A task that can't swap has one order, O = 1.

    Attributes:
        lengths: `(N, O)`, tokens of each row in each order.
        shared: `(N,)`, tokens that both orders of a row begin with; 0 with one order.
        duplicate_of: `(N, O)`, flat index `row * O + order` of the first sequence with the same ids; a sequence's own
            index if it is the first. A row with A == B has one sequence.
    """

    lengths: Ints
    shared: Ints
    duplicate_of: Ints

    @property
    def is_first(self) -> Bools:
        """`(N, O)`: the sequences to be scored; the others are duplicates, and get the logits of the first."""
        flat: Bools = self.duplicate_of == np.arange(self.duplicate_of.size).reshape(self.duplicate_of.shape)
        return flat

    @classmethod
    def empty(cls) -> SequenceIndex:
        """The index of no rows."""
        return cls(*(np.zeros(shape, dtype=np.int64) for shape in ((0, 2), (0,), (0, 2))))

    @property
    def is_known(self) -> Bools:
        """`(N,)`: the rows that were indexed; the others were added by `padded`, and have no length."""
        return np.asarray(self.lengths[:, 0] > 0)

    def padded(self, rows: int, orders: int) -> SequenceIndex:
        """The index with rows at its end that are not known, so that it has so many."""
        known = len(self.shared)
        lengths, shared = np.zeros((rows, orders), dtype=np.int64), np.zeros(rows, dtype=np.int64)
        duplicate_of = np.arange(rows * orders).reshape(rows, orders)
        if known:
            lengths[:known], shared[:known], duplicate_of[:known] = self.lengths, self.shared, self.duplicate_of
        return SequenceIndex(lengths, shared, duplicate_of)


def index_sequences(encoded: Iterable[tuple[Encoded, ...]]) -> SequenceIndex:
    """Index a model's rows in one pass."""
    lengths, shared, duplicate_of = [], [], []
    # Digests, as the ids of a whole file may not fit into memory; 16 bytes make a collision practically impossible.
    first_index: dict[bytes, int] = {}
    for row, orders in enumerate(encoded):
        lengths.append([len(sequence.ids) for sequence in orders])
        shared.append(_shared_by(orders))
        digests = [hashlib.blake2b(sequence.ids.tobytes(), digest_size=16).digest() for sequence in orders]
        indices = [first_index.setdefault(digest, row * len(orders) + order) for order, digest in enumerate(digests)]
        duplicate_of.append(indices)
    return SequenceIndex(*(np.array(values, dtype=np.int64) for values in (lengths, shared, duplicate_of)))


def shared_start(left: Ids, right: Ids) -> int:
    """The number of tokens that both begin with."""
    size = min(len(left), len(right))
    differing = left[:size] != right[:size]
    return int(differing.argmax()) if differing.any() else size


def _shared_by(orders: Sequence[Encoded]) -> int:
    """Tokens that both orders begin with; the last token of either is read, so it is never shared."""
    if len(orders) == 1:
        return 0
    left, right = (order.ids for order in orders)
    return min(shared_start(left, right), len(left) - 1, len(right) - 1)


class Item(NamedTuple):
    """One sequence to be scored: the row's index in its table, its order, and what the approach makes of it.

    `ids` are token ids `(T,)` int32 for a language model, and the row for a classical one; their `len` is its length.
    """

    row: int
    order: int
    ids: Any


def branches_of(ids: NDArray[np.int32]) -> list[NDArray[np.int32]]:
    """The branches of a sequence, each with what it shares.

    >>> [branch.tolist() for branch in branches_of(np.array([7, 8, -1, 5, -1, 6, 4], dtype=np.int32))]
    [[7, 8, 5], [7, 8, 6, 4]]
    """
    start, *parts = np.split(ids, np.flatnonzero(ids == BRANCH))
    return [np.concatenate([start, part[1:]]) for part in parts] or [ids]


def with_branches(ids: NDArray[np.int32], branches: int) -> NDArray[np.int32]:
    """Dummy ids and so many branches of a token each, for passes that only measure."""
    return ids if branches == 1 else np.concatenate([ids, np.tile(np.array([BRANCH, 1], dtype=np.int32), branches)])


class LargestPass(NamedTuple):
    """The largest forward pass of a prediction.

    Attributes:
        longest: tokens of the longest sequence.
        tokens_per_batch: the token budget.
        orders: orders of a row that are scored together; a row over the budget forms a batch of its own.
    """

    longest: int
    tokens_per_batch: int
    orders: int

    @classmethod
    def of(cls, inputs: SequenceIndex, budget: int) -> LargestPass:
        """The largest pass over these inputs with this budget."""
        lengths = inputs.lengths
        return cls(int(lengths.max()), min(budget, int(lengths.sum())), lengths.shape[1])

    @property
    def tokens(self) -> int:
        """Most tokens that it computes."""
        return max(self.tokens_per_batch, self.orders * self.longest)

    def scaled(self, factor: float) -> LargestPass:
        """A smaller pass with the same proportions."""
        longest, tokens = max(2, round(factor * self.longest)), max(2, round(factor * self.tokens_per_batch))
        return LargestPass(longest, tokens, self.orders)
