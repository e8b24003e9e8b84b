"""The classifier that the jobs use: backbone, head and layout put together, and which combinations are legal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pairclf.config import Config
from pairclf.errors import ModelError
from pairclf.model.backbone import add_adapters, load_base, pick_dtype, resolve_base
from pairclf.model.batch import Batch, Item
from pairclf.model.layouts import padded
from pairclf.model.readout import Head, gather

Layout = Callable[[Sequence[Item]], Batch]

LAYOUTS: dict[tuple[str, str, str], Layout] = {
    ("decoder", "head", "padded"): padded,
}
"""Legal (backbone, readout, layout); what is not here is refused by `layout_of`."""


def layout_of(backbone: str, readout: str, layout: str) -> Layout:
    """The layout function of a legal combination.

    Raises:
        ModelError: the combination is not legal; the message lists those that are.
    """
    try:
        return LAYOUTS[backbone, readout, layout]
    except KeyError:
        legal = "; ".join(" + ".join(key) for key in LAYOUTS)
        raise ModelError(f"{backbone} + {readout} + {layout} can't be combined", remedy=f"legal: {legal}") from None


class Classifier(nn.Module):
    """Backbone and head: `(inputs, read_at, lengths)` -> logits `(R, C)` in float32.

    Args:
        backbone: returns an output with `last_hidden_state` `(B, T, H)`.
        head: `(R, H)` -> `(R, C)`.
        dtype: what the backbone computes in.
    """

    def __init__(self, backbone: nn.Module, head: Head, dtype: torch.dtype) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.dtype = dtype

    def forward(self, inputs: dict[str, Tensor], read_at: Tensor, lengths: Tensor) -> Tensor:
        # The same autocast in training, validation and the notebook, whoever calls. No cache is kept: nothing is
        # generated, and a cache would have to be told of every layout.
        with torch.autocast(read_at.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = self.backbone(**inputs, use_cache=False).last_hidden_state
        logits: Tensor = self.head(gather(hidden, read_at))
        return logits

    @property
    def device(self) -> torch.device:
        return self.head.weight.device


def build(config: Config, device: torch.device, base: Path | None = None) -> Classifier:
    """A classifier with a fresh head (and fresh adapters), seeded by `config.seed`.

    Raises:
        ModelError: the base can't be loaded or adapted.
    """
    torch.manual_seed(config.seed)
    classifier = build_frozen(config, device, base, training=True)
    if config.model.lora is not None:
        classifier.backbone = add_adapters(classifier.backbone, config.model.lora)
    return classifier


def build_frozen(config: Config, device: torch.device, base: Path | None, *, training: bool) -> Classifier:
    """The base with a head that a bundle or the training will fill; no adapters yet."""
    dtype, _ = pick_dtype(config.model.dtype, device)
    # Full fine-tuning keeps its weights in float32 and computes under autocast: bf16 weights swallow small updates.
    stored = torch.float32 if training and config.model.lora is None else dtype
    backbone = load_base(resolve_base(config.model.base, base), config.model, stored, device)
    hidden_size: int = backbone.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
    head = Head(hidden_size, len(config.task.classes)).to(device)
    return Classifier(backbone, head, dtype)
