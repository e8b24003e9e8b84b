"""Layouts: how sequences lie in a tensor, with masks, positions and where to read. Layouts know no models.

padded          read_at         packed                  read_at
[a a a a a a]   5               [a a a a a a b b b]     5, 8
[b b b . . .]   8

. = padding, masked; every sequence starts at position 0
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from pairclf.model.batch import Batch, Item

FILL = 0
"""Id at padded places. It is masked and never read, so that any id serves; no tokenizer needs a pad token."""


def padded(items: Sequence[Item]) -> Batch:
    """One row a sequence, padded on the right to the longest; the logit is read at each sequence's last token.

    The place to read is known from the lengths, never searched by pad id: a tokenizer whose pad is its eos, or a text
    that ends in eos, changes nothing.

    >>> batch = padded([Item(0, 0, np.array([7, 8, 9])), Item(1, 0, np.array([5]))])
    >>> batch.inputs["input_ids"].tolist(), batch.read_at.tolist()
    ([[7, 8, 9], [5, 0, 0]], [2, 3])
    """
    lengths = torch.tensor([len(item.ids) for item in items])
    width = int(lengths.max())
    input_ids = torch.full((len(items), width), FILL)
    for row, item in enumerate(items):
        input_ids[row, : len(item.ids)] = torch.from_numpy(item.ids)
    position_ids = torch.arange(width).expand(len(items), width)
    attention_mask = (position_ids < lengths[:, None]).long()
    return Batch(
        inputs={"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids.contiguous()},
        read_at=torch.arange(len(items)) * width + lengths - 1,
        lengths=lengths,
        row_at=torch.tensor([item.row for item in items]),
        order=torch.tensor([item.order for item in items]),
    )


def packed(items: Sequence[Item]) -> Batch:
    """All sequences end to end in one row, without padding; each starts at position 0 and sees itself alone.

    `cu_seq_lens_q` and `_k` (where sequences start, and the end) and `max_length_q` and `_k` (the longest) are
    FlashAttention's own words for it, which transformers passes through to attention functions: to ours, and to
    `flash_attention_2`. There is no mask, and who sees whom (`#`) is never written out:

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
    lengths = torch.tensor([len(item.ids) for item in items])
    ends = lengths.cumsum(0)
    starts = functional.pad(ends, (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return Batch(
        inputs={
            "input_ids": torch.from_numpy(np.concatenate([item.ids for item in items])).long()[None],
            "position_ids": torch.cat([torch.arange(len(item.ids)) for item in items])[None],
            "cu_seq_lens_q": starts,
            "cu_seq_lens_k": starts,
            "max_length_q": longest,
            "max_length_k": longest,
        },
        read_at=ends - 1,
        lengths=lengths,
        row_at=torch.tensor([item.row for item in items]),
        order=torch.tensor([item.order for item in items]),
    )
