"""Readout: hidden states at `read_at` -> logits `(R, C)`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Head(nn.Linear):
    """A linear head on the last token's hidden state, in float32 whatever the backbone computes in.

    It is ours and stands outside the backbone: nothing quantises it, drops it on merging, or loads it at random, and
    it needs no `ForSequenceClassification` class to exist for the architecture.
    """

    def __init__(self, hidden_size: int, classes: int) -> None:
        super().__init__(hidden_size, classes, dtype=torch.float32)
        # Small, so that the first logits are near zero and the first loss is near log C.
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """`(R, H)` of any dtype -> `(R, C)` float32."""
        return super().forward(hidden.float())


def gather(hidden: Tensor, read_at: Tensor) -> Tensor:
    """`(B, T, H)` hidden states and `(R,)` flat places -> `(R, H)`."""
    return hidden.flatten(0, 1)[read_at]
