"""`Batch`: token ids with a description of their topology. Models read it and know no layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pairclf.inputs.truncate import Ids

Inputs = dict[str, Tensor | int]
"""Keyword arguments of a backbone."""


class Item(NamedTuple):
    """One sequence to be scored: the row's index in its table, the order it is told in, and its ids `(T,)` int32."""

    row: int
    order: int
    ids: Ids


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass needs, and which logit belongs to whom. R is the number of logits read.

    Attributes:
        inputs: keyword arguments of the backbone; `input_ids` and `position_ids` are `(B, T)` int64. What else there is
            says which tokens see each other: `attention_mask` `(B, T)`, or the keywords that `attention` reads.
        read_at: `(R,)` int64, places in the flattened `(B * T)` hidden states whose logits are wanted.
        lengths: `(R,)` int64, tokens of each sequence; it lies at `read_at - lengths + 1` to `read_at`.
        row_at: `(R,)` int64, index of the row in its table.
        order: `(R,)` int64, `task.AB` or `task.BA`.
    """

    inputs: Inputs
    read_at: Tensor
    lengths: Tensor
    row_at: Tensor
    order: Tensor

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int(self.lengths.sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch with the tensors that the model reads on `device`."""
        inputs = {name: one.to(device) if isinstance(one, Tensor) else one for name, one in self.inputs.items()}
        return Batch(inputs, self.read_at.to(device), self.lengths.to(device), self.row_at, self.order)
