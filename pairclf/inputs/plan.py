"""Which rows go through the model together, and when. Every index stands in exactly one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


def by_token_budget(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Length-sorted batches whose padded size stays within a budget, longest first.

    Longest first, so that memory peaks in the first batch rather than hours later. A sequence that is longer than the
    budget goes alone. Ties keep their order, so that the plan depends on lengths alone.

    >>> by_token_budget([3, 8, 2, 8], 16)
    [[1, 3], [0, 2]]
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and (len(batches[-1]) + 1) * longest <= tokens_per_batch:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def random_steps(rows: int, rows_per_step: int, *, seed: int, epoch: int) -> Iterator[NDArray[np.int64]]:
    """The rows behind each optimizer step of one epoch: a fresh permutation for each `(seed, epoch)`.

    The last step takes what is left and may be smaller; the loss is normalised by the rows it really has.
    """
    permutation = np.random.default_rng((seed, epoch)).permutation(rows)
    for start in range(0, rows, rows_per_step):
        yield permutation[start : start + rows_per_step]


def micro_batches(
    step: NDArray[np.int64], lengths: Sequence[int], rows_per_batch: int, *, process: int, processes: int
) -> list[list[int]]:
    """Split the rows of one step over processes and forward passes, similar lengths together to save padding.

    Every process gets the same number of batches (empty ones where rows run out), as gradients are reduced together.

    Returns:
        The batches of process number `process`.
    """
    ordered = sorted(step.tolist(), key=lambda row: (-lengths[row], row))
    batches = [ordered[start : start + rows_per_batch] for start in range(0, len(ordered), rows_per_batch)]
    batches += [[] for _ in range(-len(batches) % processes)]
    return batches[process::processes]
