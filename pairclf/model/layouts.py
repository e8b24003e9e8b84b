"""Layouts: how sequences lie in a tensor, with masks, positions and where to read. Layouts know no models.

padded          read_at
[a a a a a a]   5
[b b b . . .]   8       . = padding, masked; every row starts at position 0
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
