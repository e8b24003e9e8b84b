"""The plan of batches: which rows share a forward pass, and how many tokens it computes. An index is in one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pairclf.inputs.sequences import Ints

SQUARE_FROM = 512
"""Tokens from which a padded row counts by its square. Models that can't pack write out the scores of their attention,
a number for every head and pair of tokens; DeBERTa does it three times. Up to here other activations are larger."""


MAX_SHARING = 4
"""A sequence takes at least its tokens, divided by this, of a batch's room, however few it does not share: kernels copy
the keys of all that it sees."""

DECIDED_ALONE = 0.05
"""Share of a rationale's tokens that a pass over one sequence decides, as rounding might change them. SmolLM2-135M's
greedy continuations of 12 sequences: 0.02 in float16, 0.08 in bfloat16, 0.001 in float32."""


class Layout(NamedTuple):
    """How sequences lie in a forward pass, as far as it decides what the pass computes.

    Attributes:
        spans: from lengths `(N, O)`, 0 where a sequence is not in the pass, and `SequenceIndex.shared` `(N,)`: the
            first position `(N, O)` that is computed for a sequence, and the one behind its last.
        pads: sequences are padded to the longest of the pass.
        together: the orders of a row are scored in one pass.
        shares: what sequences of different rows begin with is computed once in a pass.
    """

    spans: Callable[[Ints, Ints], tuple[Ints, Ints]]
    pads: bool
    together: bool
    shares: bool = False

    def of_rows(self, lengths: Ints, shared: Ints, once: Ints | int = 0) -> tuple[Ints, Ints]:
        """Tokens, and squares of the lengths, `(N,)`, that are computed of each row beside rows as long as it.

        `once`: tokens `(N, O)` that sequences begin with and that are not counted here, as a pass computes them once.
        """
        start, stop = self.spans(lengths, shared)
        start = np.minimum(np.maximum(start, once), stop)
        return (stop - start).sum(axis=1), (stop**2 - start**2).sum(axis=1)

    def of_pass(self, lengths: Ints, shared: Ints, once: Ints | int = 0) -> tuple[int, int]:
        """Tokens and squares of one pass over all of these rows."""
        tokens, squares = self.of_rows(self._padded(lengths), shared, once)
        return int(tokens.sum()), int(squares.sum())

    def computed(self, lengths: Sequence[int]) -> list[int]:
        """Lengths of sequences that share nothing, as one pass over them computes them."""
        sequences = np.array(lengths, dtype=np.int64)[:, None]
        start, stop = self.spans(self._padded(sequences), np.zeros(len(sequences), dtype=np.int64))
        sizes: list[int] = (stop - start)[:, 0].tolist()
        return sizes

    def sizes(self, lengths: Ints) -> Ints:
        """What sequences of these lengths, each beside others of its own, count in a budget of tokens.

        >>> LAYOUTS["packed"].sizes(np.array([100, 1024])), LAYOUTS["padded"].sizes(np.array([100, 1024]))
        (array([ 100, 1024]), array([ 100, 2048]))
        """
        squares = lengths.astype(np.int64) ** 2
        return np.where(lengths > SQUARE_FROM, -(-squares // SQUARE_FROM), lengths) if self.pads else lengths

    def _padded(self, lengths: Ints) -> Ints:
        return np.where(lengths > 0, lengths.max(initial=0), 0) if self.pads else lengths


def _whole(lengths: Ints, shared: Ints) -> tuple[Ints, Ints]:
    return np.zeros_like(lengths), lengths


def _common_once(lengths: Ints, shared: Ints) -> tuple[Ints, Ints]:
    start, orders = np.zeros_like(lengths), lengths.shape[1]
    start[:, -1] = shared * (np.count_nonzero(lengths, axis=1) == orders)
    return start, lengths


LAYOUTS: dict[str, Layout] = {
    "shared": Layout(_common_once, pads=False, together=True, shares=True),
    "packed": Layout(_whole, pads=False, together=True),
    "padded": Layout(_whole, pads=True, together=False),
}
"""By name, the cheapest first: `predict.layout=auto` takes the first that is legal. `model.layouts.BATCH_LAYOUTS` lays
them out and says where they are legal: a new layout is a record here, one there, and its name in the config."""

CHEAPEST = next(iter(LAYOUTS))

PLAIN = "packed"
"""The layout without padding and sharing; it is assumed for a model until its worker has chosen a layout."""


def token_budget(setting: int | None, *, gpu: bool) -> int:
    """`predict.tokens_per_batch`, or its default.

    A GPU needs large batches, also to dequantise 4-bit weights less often. On a CPU they only cost memory: the same
    rows took a 30M Llama 5.10, 4.99 and 4.96 s at 1,024, 2,048 and 8,192 tokens.
    """
    return setting or (16_384 if gpu else 2_048)


def by_token_budget(lengths: Sequence[int], tokens_per_batch: int, *, padded: bool = True) -> list[list[int]]:
    """Length-sorted batches whose size stays within a budget, longest first.

    Longest first, so that memory peaks in the first batch rather than hours later. What is longer than the budget goes
    alone. Ties keep their order, so that the plan depends on lengths alone.

    Args:
        lengths: tokens of each sequence, or of each row in all its orders if these stay together; as `Layout.sizes`
            counts them.
        tokens_per_batch: the budget.
        padded: whether padding to the longest counts.

    >>> by_token_budget([3, 8, 2, 8], 16)
    [[1, 3], [0, 2]]
    """
    batches: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        size = lengths[batches[-1][0]] if batches and padded else lengths[index]
        if batches and tokens + size <= tokens_per_batch:
            batches[-1].append(index)
            tokens += size
        else:
            batches.append([index])
            tokens = lengths[index]
    return batches


def random_steps(rows: int, rows_per_step: int, *, seed: int, epoch: int) -> Iterator[NDArray[np.int64]]:
    """The rows behind each optimizer step of one epoch: a fresh permutation for each `(seed, epoch)`.

    Every row stands in one step. Where they do not divide, all steps are a little smaller, by one row at most from each
    other: a last step of what is left would move the weights as far for a row or two as others for all of theirs.
    """
    permutation = np.random.default_rng((seed, epoch)).permutation(rows)
    yield from np.array_split(permutation, math.ceil(rows / rows_per_step)) if rows else ()


def micro_batches(
    step: NDArray[np.int64],
    lengths: Sequence[int],
    rows_per_batch: int,
    *,
    process: int,
    processes: int,
    tokens_per_batch: int | None = None,
    orders: int = 1,
    layout: Layout = LAYOUTS["padded"],
) -> list[list[int]]:
    """Split the rows of one step over processes and forward passes; it changes memory and speed, never the result.

    Rows are dealt to the processes by length, so that each has about as much to do, and similar lengths go together.
    Every process gets the same number of batches (empty ones where rows run out), as gradients are reduced together.

    Args:
        step: indices of the step's rows.
        lengths: tokens of each row in one order.
        rows_per_batch: most rows in a batch.
        process: number of the process whose batches are wanted.
        processes: how many there are.
        tokens_per_batch: most tokens in a batch, as `Layout.sizes` counts them; a row that is longer goes alone. None:
            no limit.
        orders: in how many orders each row is shown; all of them are in one batch.
        layout: how they lie in a batch.

    Returns:
        The batches of process number `process`.
    """
    ordered = sorted(step.tolist(), key=lambda row: (-lengths[row], row))
    dealt = []
    for first in range(processes):
        batches: list[list[int]] = []
        for row in ordered[first::processes]:
            grown = [*batches[-1], row] if batches else []
            size = orders * int(layout.sizes(np.array(layout.computed([lengths[row] for row in grown]))).sum())
            if grown and len(grown) <= rows_per_batch and size <= (tokens_per_batch or size):
                batches[-1] = grown
            else:
                batches.append([row])
        dealt.append(batches)
    mine = dealt[process]
    return mine + [[] for _ in range(max(map(len, dealt)) - len(mine))]


def computed_tokens(batch: Sequence[int], lengths: Sequence[int], *, orders: int, layout: Layout) -> int:
    """Tokens that a forward pass over the rows of `batch` computes, padding included."""
    return orders * sum(layout.computed([lengths[row] for row in batch]))
