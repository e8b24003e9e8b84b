"""Readout: hidden states -> one state a sequence `(R, H)` -> logits `(R, C)`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class LinearHead(nn.Linear):
    """A linear head on a sequence's state, in float32 whatever the backbone computes in.

    It is ours and stands outside the backbone: nothing quantises it, drops it on merging, or loads it at random, and
    it needs no `ForSequenceClassification` class to exist for the architecture.
    """

    def __init__(self, hidden_size: int, classes: int) -> None:
        super().__init__(hidden_size, classes, dtype=torch.float32)
        _start_small(self)

    def forward(self, state: Tensor) -> Tensor:
        """`(R, H)` of any dtype -> `(R, C)` float32."""
        return super().forward(state.float())

    @torch.no_grad()
    def start_from(self, rows: Tensor) -> None:
        """Start from `(C, H)` rows of an LM head: the first logits are the LM's own for these words, bias zero.

        They are the LM's raw logits: where it caps or scales them afterwards (`final_logit_softcapping`,
        `logits_scaling`), nothing does so here. The order of the classes is the same under a cap, the distances are
        larger.
        """
        self.weight.copy_(rows)


class TwoLayerHead(nn.Module):
    """Linear H -> H, GELU, Linear H -> C, all in float32; see `LinearHead`."""

    def __init__(self, hidden_size: int, classes: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, hidden_size, dtype=torch.float32)
        self.outer = nn.Linear(hidden_size, classes, dtype=torch.float32)
        self.out_features = classes
        _start_small(self.outer)

    def forward(self, state: Tensor) -> Tensor:
        """`(R, H)` of any dtype -> `(R, C)` float32."""
        logits: Tensor = self.outer(functional.gelu(self.inner(state.float())))
        return logits


def _start_small(last: nn.Linear) -> None:
    """The first logits are near zero and the first loss is near log C."""
    nn.init.normal_(last.weight, std=0.02)
    nn.init.zeros_(last.bias)


Head = LinearHead | TwoLayerHead

HEADS: dict[str, type[LinearHead] | type[TwoLayerHead]] = {"linear": LinearHead, "two_layer": TwoLayerHead}


def last(hidden: Tensor, read_at: Tensor, lengths: Tensor) -> Tensor:
    """`(B, T, H)` hidden states -> `(R, H)`: the last token's of each sequence."""
    return hidden.flatten(0, 1)[read_at]


def mean(hidden: Tensor, read_at: Tensor, lengths: Tensor) -> Tensor:
    """`(B, T, H)` hidden states -> `(R, H)` float32: the mean over each sequence's tokens, however they are laid out.

    Sequence r lies at `read_at[r] - lengths[r] + 1` to `read_at[r]` of the flattened `(B * T)` places. Two of 2 and 3
    tokens in padded rows of 4, `read_at` 1 and 6: the places read are 0 1 4 5 6.
    """
    before = lengths.cumsum(0) - lengths  # tokens of the sequences before each
    shift = (read_at - lengths + 1 - before).repeat_interleave(lengths)
    places = shift + torch.arange(len(shift), device=shift.device)
    return torch.segment_reduce(hidden.flatten(0, 1)[places].float(), "mean", lengths=lengths)


POOLINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"last": last, "mean": mean}
"""`model.pooling`: `(B, T, H)` hidden states, `read_at` `(R,)` and `lengths` `(R,)` -> `(R, H)`."""
