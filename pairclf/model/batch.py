"""`Batch`: token ids with a description of their topology. Models read it and know no layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Span = tuple[int, int]
"""A range of tokens in a row: its start, and its end, which is excluded."""


class Segment(NamedTuple):
    """Adjacent tokens of a row, and the tokens that they see.

    Attributes:
        start: the first of them.
        stop: the place behind the last.
        sees: where the tokens lie that the last of them sees, by position; the piece's own tokens are the last. Those
            before the last see as many fewer.
    """

    start: int
    stop: int
    sees: tuple[Span, ...]


@dataclass(frozen=True, eq=False)
class Topology:
    """Which tokens see each other in a batch of one row. All are Python numbers: to read them, nobody waits for a GPU.

    Sequences `a a b b b` and `a a c c`, of which the row has the common start once, `a a b b b c c`:

        pieces  (0, 5, sees 0 to 5)  (5, 7, sees 0 to 2 and 5 to 7)
        paths   (0 to 5)  (0 to 2, 5 to 7)

    Attributes:
        segments: they cover the queries from first to last, without a gap.
        paths: where each sequence's tokens lie, by position; in the order of the items.
    """

    segments: tuple[Segment, ...]
    paths: tuple[tuple[Span, ...], ...]

    def at_ends(self) -> Topology:
        """The same keys for the last token of each sequence alone: query r is that of sequence r."""
        return Topology(tuple(Segment(place, place + 1, path) for place, path in enumerate(self.paths)), self.paths)


def end_to_end(lengths: Sequence[int]) -> Topology:
    """Sequences one after the other, each of which sees itself alone."""
    spans = list(pairwise(accumulate(lengths, initial=0)))
    return Topology(tuple(Segment(*span, (span,)) for span in spans), tuple((span,) for span in spans))


BackboneInputs = dict[str, Tensor | int | Topology]
"""Keyword arguments of a backbone."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The inputs of one forward pass, and the row and order of each logit. R is the number of items, S of sequences.

    They are one, unless items have branches (`inputs.render.BRANCH`): all have as many, which lie side by side.

    Attributes:
        inputs: keyword arguments of the backbone; `input_ids` and `position_ids` are `(B, T)` int64. What else there is
            says which tokens see each other: `attention_mask` `(B, T)`, or `topology` and FlashAttention's keywords.
        read_at: `(S,)` int64, places in the flattened `(B * T)` hidden states whose logits are wanted.
        lengths: `(S,)` int64, tokens of each sequence; unless some of them are shared, it lies at
            `read_at - lengths + 1` to `read_at`.
        row_at: `(R,)` int64, index of the row in its table.
        order: `(R,)` int64, `task.AB` or `task.BA`.
    """

    inputs: BackboneInputs
    read_at: Tensor
    lengths: Tensor
    row_at: Tensor
    order: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch with the tensors that the model reads on `device`."""
        inputs = {
            name: _to_device(value, device) if isinstance(value, Tensor) else value
            for name, value in self.inputs.items()
        }
        return Batch(
            inputs, _to_device(self.read_at, device), _to_device(self.lengths, device), self.row_at, self.order
        )


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a GPU through pinned memory: other copies wait until the GPU has finished the batch before."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
