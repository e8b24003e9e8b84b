"""An index of a file's sequences without their ids: lengths, shared starts, duplicates."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pairclf.inputs.render import BRANCH, RATIONALE, TEMPLATE, Encoded
from pairclf.inputs.truncate import Ids

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

MIN_SHARED_TOKENS = 16
"""Tokens that a sequence must have in common with another for them to be computed once.

On a CPU any number pays: attention over a sequence in two places costs no more than over one (`attention.QUERIES`). A
template's few first tokens are left alone, so that rows which have nothing else in common stay in one place each.
"""

PREFIX_SHARE = 1 / 8
"""Share of a file's sequences that begin with a prefix, from which on each batch is expected to hold several of them:
an instruction, or examples that stand before every row, and their mirrors."""


@dataclass(frozen=True, slots=True)
class SequenceIndex:
    """A model's sequences without their ids. A task that can't swap has one order, O = 1.

    Attributes:
        lengths: `(N, O)`, tokens of each row in each order.
        shared: `(N,)`, tokens that both orders of a row begin with; with one order, those that the row before it in
            its unit begins with, too.
        duplicate_of: `(N, O)`, flat index `row * O + order` of the first sequence with the same ids; a sequence's own
            index if it is the first. A row with A == B has one sequence.
        prefix: `(N, O)`, the number of what stands before a sequence's own text, if many sequences of the file begin
            with it; 0: nothing. None: 0 for all.
        prefixes: `(P,)`, tokens of each such prefix, 0 of the first.
        rationale: tokens that the model may write in each sequence, and lengths count; each takes a forward pass.
        units: `(N,)`, numbers that do not decrease: rows of one unit are scored together (`in_units`); None: each row
            is one.
    """

    lengths: Ints
    shared: Ints
    duplicate_of: Ints
    prefix: Ints | None = None
    prefixes: tuple[int, ...] = (0,)
    rationale: int = 0
    units: Ints | None = None

    @property
    def prefix_numbers(self) -> Ints:
        """`prefix`, zeros in place of None."""
        return np.zeros_like(self.lengths) if self.prefix is None else self.prefix

    @property
    def unit_of(self) -> Ints:
        """`(N,)`, the number of each row's unit."""
        return np.arange(len(self.lengths)) if self.units is None else self.units

    @property
    def is_first(self) -> Bools:
        """`(N, O)`: the sequences to be scored; the others are duplicates, and get the logits of the first."""
        flat: Bools = self.duplicate_of == np.arange(self.duplicate_of.size).reshape(self.duplicate_of.shape)
        return flat

    def in_units(
        self, groups: Ints, budget: int, encoded: Sequence[tuple[Encoded, ...]] | None = None
    ) -> SequenceIndex:
        """The index with the rows of each group in as few units as stay within a budget.

        Args:
            groups: `(N,)`, numbers that do not decrease.
            budget: tokens of a unit; a row that has more is a unit by itself.
            encoded: the rows, if they have one order and a unit computes once what they have in common.
        """
        units, shared, tokens, before = self.lengths[:, 0].copy(), self.shared.copy(), 0, None
        for row, (group, lengths) in enumerate(zip(groups.tolist(), self.lengths, strict=True)):
            ids = encoded[row][0].ids if encoded is not None and lengths[0] else None
            alike = row > 0 and group == groups[row - 1]
            common = 0 if ids is None or before is None or not alike else min(shared_start(before, ids), len(ids) - 1)
            joins = alike and tokens + int(lengths.sum()) - common <= budget
            units[row] = units[row - 1] + (not joins) if row else 0
            if encoded is not None:
                shared[row] = common if joins else 0
            tokens = (tokens if joins else 0) + int(lengths.sum()) - (common if joins else 0)
            before = ids
        return replace(self, shared=shared, units=units)

    @classmethod
    def empty(cls) -> SequenceIndex:
        """The index of no rows."""
        return cls(np.zeros((0, 2), np.int64), np.zeros(0, np.int64), np.zeros((0, 2), np.int64))

    @property
    def is_known(self) -> Bools:
        """`(N,)`: the rows that were indexed; the others were added by `padded`, and have no length."""
        return np.asarray(self.lengths[:, 0] > 0)

    def padded(self, rows: int, orders: int) -> SequenceIndex:
        """The index with rows at its end that are not known, so that it has so many."""
        known = len(self.shared)
        lengths, shared = np.zeros((rows, orders), dtype=np.int64), np.zeros(rows, dtype=np.int64)
        duplicate_of, prefix = np.arange(rows * orders).reshape(rows, orders), np.zeros_like(lengths)
        if known:
            lengths[:known], shared[:known], duplicate_of[:known] = self.lengths, self.shared, self.duplicate_of
            prefix[:known] = self.prefix_numbers
        return SequenceIndex(lengths, shared, duplicate_of, prefix, self.prefixes, self.rationale)

    def of_rows(self, rows: Ints, duplicate_of: Ints | None = None) -> SequenceIndex:
        """The index of some rows, with duplicates as given; None: without any."""
        lengths = self.lengths[rows]
        own = np.arange(lengths.size).reshape(lengths.shape)
        duplicates = own if duplicate_of is None else duplicate_of
        return SequenceIndex(
            lengths, self.shared[rows], duplicates, self.prefix_numbers[rows], self.prefixes, self.rationale
        )


def index_sequences(encoded: Iterable[tuple[Encoded, ...]]) -> SequenceIndex:
    """Index a model's rows in one pass."""
    lengths, shared, duplicate_of, starts = [], [], [], []
    # Digests, as the ids of a whole file may not fit into memory; 16 bytes make a collision practically impossible.
    first_index: dict[bytes, int] = {}
    rationale = 0
    for row, orders in enumerate(encoded):
        lengths.append([len(sequence.ids) for sequence in orders])
        shared.append(_shared_by(orders))
        starts.append([_start_of(sequence) for sequence in orders])
        rationale = rationale or int(np.count_nonzero(orders[0].ids == RATIONALE))
        digests = [_digest(sequence.ids) for sequence in orders]
        indices = [first_index.setdefault(digest, row * len(orders) + order) for order, digest in enumerate(digests)]
        duplicate_of.append(indices)
    lengths_of, shared_of, first_of = (np.array(values, np.int64) for values in (lengths, shared, duplicate_of))
    return SequenceIndex(lengths_of, shared_of, first_of, *_prefixes(starts), rationale)


def _digest(ids: Ids) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


_Start = tuple[bytes, int]
"""What stands before a sequence's own text: its digest, and its tokens."""


def _start_of(sequence: Encoded) -> _Start:
    stop = next((span.start for span in sequence.spans if span.name != TEMPLATE), 0)
    return _digest(sequence.ids[:stop]), stop


def _prefixes(starts: Sequence[Sequence[_Start]]) -> tuple[Ints, tuple[int, ...]]:
    """`SequenceIndex.prefix` and `prefixes` of sequences by row and order."""
    counts = Counter(chain.from_iterable(starts))
    common = [start for start, count in counts.items() if count >= max(2, PREFIX_SHARE * counts.total())]
    kept = [start for start in common if start[1] >= MIN_SHARED_TOKENS]
    number = {start: place for place, start in enumerate(kept, start=1)}
    numbers = np.array([[number.get(start, 0) for start in row] for row in starts], dtype=np.int64)
    return numbers, (0, *(tokens for _, tokens in kept))


def shared_start(left: Ids, right: Ids) -> int:
    """The number of tokens that both begin with."""
    size = min(len(left), len(right))
    differing = left[:size] != right[:size]
    return int(differing.argmax()) if differing.any() else size


def common_starts(sequences: Sequence[Ids]) -> tuple[Ints, int]:
    """What sequences begin with that at least `PREFIX_SHARE` of them begin with, by their ids alone.

    Returns:
        Tokens of each sequence's common start, `(N,)`, and the tokens of all these starts, each counted once.
    """
    many, starts = max(2, math.ceil(PREFIX_SHARE * len(sequences))), np.zeros(len(sequences), dtype=np.int64)
    if len(sequences) < many:
        return starts, 0
    # Sorted, what the first and the last of so many begin with, those between them begin with too.
    order = sorted(range(len(sequences)), key=lambda index: sequences[index].astype(">u4").tobytes())
    firsts, lasts = order[: len(order) - many + 1], order[many - 1 :]
    ends = [
        min(shared_start(sequences[first], sequences[last]), len(sequences[first]) - 1, len(sequences[last]) - 1)
        for first, last in zip(firsts, lasts, strict=True)
    ]
    windows = pl.Series([end if end >= MIN_SHARED_TOKENS else 0 for end in ends] + [0] * (many - 1))
    starts[order] = np.minimum(
        windows.rolling_max(many, min_samples=1).to_numpy(), [len(sequences[at]) - 1 for at in order]
    )
    before: Ids = np.zeros(0, dtype=np.int32)
    once = 0
    for at in order:
        start = sequences[at][: starts[at]]
        once += len(start) - shared_start(before, start)
        before = start if len(start) else before
    return starts, once


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
