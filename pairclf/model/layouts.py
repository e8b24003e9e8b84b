"""Layouts: how sequences lie in a tensor, with masks, positions and where to read. Layouts know no models.

padded          read_at         packed                  read_at
[a a a a a a]   5               [a a a a a a b b b]     5, 8
[b b b . . .]   8

. = padding, masked; every sequence starts at position 0

shared: a a b b b and a a c c, whose common start is there once
[a a b b b c c]   read_at 4, 6; positions 0 1 2 3 4 2 3
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pairclf.inputs.sequences import MIN_SHARED_TOKENS, Item, branches_of, shared_start
from pairclf.inputs.truncate import Ids
from pairclf.model.batch import BackboneInputs, Batch, Segment, Span, Topology, end_to_end

PAD_ID = 0
"""Id at padded places. It is masked and never read, so that any id serves; no tokenizer needs a pad token."""


def padded(items: Sequence[Item]) -> Batch:
    """Lay each sequence in a row of its own, padded on the right; its logit is read at its last token.

    The place to read is known from the lengths, never searched by pad id: a tokenizer whose pad is its eos, or a text
    that ends in eos, changes nothing.

    >>> batch = padded([Item(0, 0, np.array([7, 8, 9])), Item(1, 0, np.array([5]))])
    >>> batch.inputs["input_ids"].tolist(), batch.read_at.tolist()
    ([[7, 8, 9], [5, 0, 0]], [2, 3])
    """
    lengths = _lengths(items)
    width = int(lengths.max())
    input_ids = torch.full((len(items), width), PAD_ID)
    for row, item in enumerate(items):
        input_ids[row, : len(item.ids)] = torch.from_numpy(item.ids)
    position_ids = torch.arange(width).expand(len(items), width)
    attention_mask = (position_ids < lengths[:, None]).long()
    position_ids = position_ids.contiguous()
    inputs: BackboneInputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    return _batch(items, inputs, torch.arange(len(items)) * width + lengths - 1, lengths)


def packed(items: Sequence[Item]) -> Batch:
    """Lay all sequences end to end in one row, without padding; each starts at position 0 and sees only itself.

    `cu_seq_lens_q` and `_k` (where sequences start, and the end) and `max_length_q` and `_k` (the longest) are
    FlashAttention's own words for it, which transformers passes through to `flash_attention_2`; `topology` says the
    same to our attention. There is no mask, and who sees whom (`#`) is never written out:

        a # . . . .
        a # # . . .
        a # # # . .
        b . . . # .
        b . . . # #

    >>> batch = packed([Item(0, 0, np.array([7, 8, 9])), Item(1, 0, np.array([5, 6]))])
    >>> batch.inputs["input_ids"].tolist(), batch.inputs["position_ids"].tolist()
    ([[7, 8, 9, 5, 6]], [[0, 1, 2, 0, 1]])
    >>> batch.inputs["cu_seq_lens_q"].tolist(), batch.inputs["max_length_q"], batch.read_at.tolist()
    ([0, 3, 5], 3, [2, 4])
    """
    lengths = _lengths(items)
    ends = lengths.cumsum(0)
    starts = functional.pad(ends, (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    inputs: BackboneInputs = {
        "input_ids": torch.from_numpy(np.concatenate([item.ids for item in items])).long()[None],
        "position_ids": torch.cat([torch.arange(len(item.ids)) for item in items])[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
        "topology": end_to_end(lengths.tolist()),
    }
    return _batch(items, inputs, ends - 1, lengths)


def shared(items: Sequence[Item]) -> Batch:
    """Lay sequences as `packed`, with common beginnings once: an instruction, a row's prompt, a repeated prompt.

    Sequences stand in the order of their ids, as in a dictionary. Then none before has more in common with one than
    its neighbour has, and what it has in common lies where the neighbour's first tokens lie. It is found by comparing
    ids, so that no template has to say where its prompt ends. The last token, which is read, is always a sequence's
    own. Positions go on where the common ones end. An item with branches is as many sequences.

    Two sequences `a a b` and `a a c c`, who sees whom (`#`):

        a # . . . .
        a # # . . .
        b # # # . .
        c # # . # .
        c # # . # #

    >>> batch = shared([Item(0, 0, np.array([*range(16), 7])), Item(0, 1, np.array([*range(16), 8, 9]))])
    >>> batch.inputs["input_ids"].tolist()[0][15:], batch.inputs["position_ids"].tolist()[0][15:]
    ([15, 7, 8, 9], [15, 16, 16, 17])
    >>> batch.inputs["topology"].paths, batch.read_at.tolist()
    ((((0, 17),), ((0, 16), (17, 19))), [16, 18])
    """
    sequences = [branch for item in items for branch in branches_of(item.ids)]
    paths: list[tuple[Span, ...]] = [()] * len(sequences)
    pieces, ids, positions = [], [], []
    before: Ids | None = None
    path: tuple[Span, ...] = ()
    stop = 0
    for index in sorted(range(len(sequences)), key=lambda index: sequences[index].astype(">u4").tobytes()):
        sequence = sequences[index]
        common = 0 if before is None else min(shared_start(before, sequence), len(sequence) - 1)
        common = common if common >= MIN_SHARED_TOKENS else 0
        start, stop = stop, stop + len(sequence) - common
        path = paths[index] = _joined([*_first(path, common), (start, stop)])
        pieces.append(Segment(start, stop, path))
        ids.append(sequence[common:])
        positions.append(np.arange(common, len(sequence)))
        before = sequence
    inputs: BackboneInputs = {
        "input_ids": torch.from_numpy(np.concatenate(ids)).long()[None],
        "position_ids": torch.from_numpy(np.concatenate(positions))[None],
        "topology": Topology(tuple(pieces), tuple(paths)),
    }
    read_at = torch.tensor([path_of_sequence[-1][1] - 1 for path_of_sequence in paths])
    return _batch(items, inputs, read_at, torch.tensor([len(sequence) for sequence in sequences]))


def _batch(items: Sequence[Item], inputs: BackboneInputs, read_at: Tensor, lengths: Tensor) -> Batch:
    """The batch of these items, whose sequences have `lengths` `(S,)` and are read at `read_at` `(S,)`."""
    rows, orders = torch.tensor([(item.row, item.order) for item in items]).T.contiguous()
    return Batch(inputs, read_at, lengths, rows, orders)


def _lengths(items: Sequence[Item]) -> Tensor:
    return torch.tensor([len(item.ids) for item in items])


def _first(path: Sequence[Span], tokens: int) -> list[Span]:
    """The spans of the first `tokens` tokens of a path."""
    kept = []
    for start, stop in path:
        if tokens <= 0:
            break
        kept.append((start, min(stop, start + tokens)))
        tokens -= stop - start
    return kept


def _joined(path: Sequence[Span]) -> tuple[Span, ...]:
    """The same places, with spans that meet as one."""
    joined = [path[0]]
    for start, stop in path[1:]:
        if joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


# --- where they are legal --------------------------------------------------------------------------------------------


MakeBatch = Callable[[Sequence[Item]], Batch]


class Isolation(NamedTuple):
    """Why sequences can't lie so in a batch of a base; None: they can.

    Attributes:
        packed: end to end.
        shared: with common beginnings once.
        trimmed: with the last layer computed at the read tokens alone.
        attentions: calls of the attention function in one forward pass.
    """

    packed: str | None
    shared: str | None
    trimmed: str | None
    attentions: int


class BatchLayout(NamedTuple):
    """A layout of `inputs.plan.LAYOUTS`, as tensors.

    Attributes:
        lay_out: makes a batch of sequences.
        why_not: by what holds for the base and by `model.pooling`, why rows would not score as each alone; None: they
            do.
        topology: attention is told which rows lie where, in place of a mask.
        branches: an item may have several, which are sequences of their own.
    """

    lay_out: MakeBatch
    why_not: Callable[[Isolation, str], str | None]
    topology: bool
    branches: bool = False


def _why_not_shared(isolation: Isolation, pooling: str) -> str | None:
    reads_all = None if pooling == "last" else f"model.pooling={pooling} reads every token of a sequence by itself"
    return isolation.shared or reads_all


BATCH_LAYOUTS: dict[str, BatchLayout] = {
    "shared": BatchLayout(shared, _why_not_shared, topology=True, branches=True),
    "packed": BatchLayout(packed, lambda isolation, pooling: isolation.packed, topology=True),
    "padded": BatchLayout(padded, lambda isolation, pooling: None, topology=False),
}


def layout_of(inputs: BackboneInputs) -> str:
    """The layout whose legality decides over a batch, by what the model is told of it."""
    if "cu_seq_lens_q" in inputs:
        return "packed"
    return "shared" if "topology" in inputs else "padded"
