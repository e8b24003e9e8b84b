"""Plans lose nobody: every index stands in exactly one batch, whatever the sizes."""

from __future__ import annotations

from itertools import chain

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pairclf.inference.pending import PendingSequences
from pairclf.inputs.plan import LAYOUTS, by_token_budget, micro_batches, random_steps
from pairclf.inputs.sequences import Item, SequenceIndex
from pairclf.model.scoring import _batches

LENGTHS = st.lists(st.integers(1, 50), max_size=60)


@given(LENGTHS, st.integers(1, 120))
def test_batches_partition_the_rows_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = by_token_budget(lengths, budget)
    assert sorted(chain.from_iterable(batches)) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) * longest <= budget or len(batch) == 1
    order = [lengths[index] for index in chain.from_iterable(batches)]
    assert order == sorted(order, reverse=True)


@given(st.integers(0, 70), st.integers(1, 20), st.integers(0, 3), st.integers(0, 3))
def test_steps_partition_an_epoch_and_follow_the_seed(rows: int, size: int, seed: int, epoch: int) -> None:
    steps = list(random_steps(rows, size, seed=seed, epoch=epoch))
    assert sorted(np.concatenate(steps).tolist() if steps else []) == list(range(rows))
    assert len(steps) == -(-rows // size)
    assert all(len(step) <= size for step in steps)
    assert max(map(len, steps), default=0) - min(map(len, steps), default=0) <= 1
    again = random_steps(rows, size, seed=seed, epoch=epoch)
    assert [step.tolist() for step in steps] == [step.tolist() for step in again]


def test_epochs_and_seeds_differ() -> None:
    drawn = [next(random_steps(99, 99, seed=s, epoch=e)).tolist() for s, e in ((0, 0), (0, 1), (1, 0))]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 4), st.data())
def test_processes_share_a_step_without_overlap(rows: int, size: int, processes: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=rows, max_size=rows))
    step = np.arange(rows)
    parts = [micro_batches(step, lengths, size, process=process, processes=processes) for process in range(processes)]
    assert len({len(part) for part in parts}) == 1  # they reduce their gradients together
    shared = [row for part in parts for batch in part for row in batch]
    assert sorted(shared) == list(range(rows))
    assert all(len(batch) <= size for part in parts for batch in part)


def test_padded_rows_beyond_512_tokens_count_by_their_square() -> None:
    """A batch of 4,096 tokens holds no more than 4,096 x 512 scores a head, unless one row alone has them."""
    lengths, budget = [1024] * 4 + [512] * 8 + [2048], 4096
    items = [Item(row, 0, np.zeros(length, dtype=np.int32)) for row, length in enumerate(lengths)]
    index = SequenceIndex(np.array(lengths)[:, None], np.zeros(13, dtype=np.int64), np.arange(13)[:, None])
    pending = PendingSequences(index, (0,))
    expected = {"padded": [1, 2, 2, 8], "packed": [4, 8, 1]}
    for layout, sizes in expected.items():
        pending.layout = layout
        plans = {
            "training": micro_batches(np.arange(13), lengths, 99, process=0, processes=1, tokens_per_batch=budget,
                                      layout=LAYOUTS[layout]),
            "scoring": _batches(items, layout, budget),
            "prediction": pending.batches(budget),
        }  # fmt: skip
        for name, batches in plans.items():
            widths = [max(lengths[row] for row in batch) for batch in batches]
            assert sorted(chain.from_iterable(batches)) == list(range(13))
            assert sorted(map(len, batches)) == sorted(sizes) if layout == "padded" else len(batches) == 3, name
            if layout == "padded":
                scores = [len(batch) * width**2 for batch, width in zip(batches, widths, strict=True)]
                assert all(count <= budget * 512 for count in scores if count != 2048**2)
    pending.layout = "padded"
    assert pending.workload_left(budget).passes == np.ceil((4 * 2048 + 8 * 512 + 8192) / budget)
