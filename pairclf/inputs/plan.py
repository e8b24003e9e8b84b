"""Which rows go through the model together, and when. Every index stands in exactly one batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


def token_budget(setting: int | None, *, gpu: bool) -> int:
    """`predict.tokens_per_batch`, or what it is if it is not set.

    A GPU wants many tokens a pass, and needs 4-bit weights dequantised seldom. On a CPU more buy memory alone: the same
    rows took a 30M Llama 5.10, 4.99 and 4.96 s at 1,024, 2,048 and 8,192 tokens.
    """
    return setting or (16_384 if gpu else 2_048)


def by_token_budget(lengths: Sequence[int], tokens_per_batch: int, *, padded: bool = True) -> list[list[int]]:
    """Length-sorted batches whose size stays within a budget, longest first.

    Longest first, so that memory peaks in the first batch rather than hours later. What is longer than the budget goes
    alone. Ties keep their order, so that the plan depends on lengths alone.

    Args:
        lengths: tokens of each sequence, or of each row in all its orders if these stay together.
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
    padded: bool = True,
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
        tokens_per_batch: most tokens in a batch; a row that is longer goes alone. None: no limit.
        orders: in how many orders each row is shown; all of them are in one batch.
        padded: whether padding to the longest counts.

    Returns:
        The batches of process number `process`.
    """
    ordered = sorted(step.tolist(), key=lambda row: (-lengths[row], row))
    dealt = []
    for first in range(processes):
        batches: list[list[int]] = []
        for row in ordered[first::processes]:
            grown = [*batches[-1], row] if batches else []
            size = computed_tokens(grown, lengths, orders=orders, padded=padded)
            if grown and len(grown) <= rows_per_batch and size <= (tokens_per_batch or size):
                batches[-1] = grown
            else:
                batches.append([row])
        dealt.append(batches)
    mine = dealt[process]
    return mine + [[] for _ in range(max(map(len, dealt)) - len(mine))]


def computed_tokens(batch: Sequence[int], lengths: Sequence[int], *, orders: int, padded: bool) -> int:
    """Tokens that a forward pass over the rows of `batch` computes, padding included."""
    sizes = [lengths[row] for row in batch]
    return orders * (max(sizes, default=0) * len(sizes) if padded else sum(sizes))
