"""The classifier that the jobs use: backbone, head and layout put together, and which combinations are legal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pairclf.config import Config
from pairclf.errors import ModelError
from pairclf.model.attention import why_not_packed
from pairclf.model.backbone import add_adapters, lm_head_rows, load_base, pick_dtype, resolve_base
from pairclf.model.batch import Batch, Inputs, Item
from pairclf.model.layouts import packed, padded
from pairclf.model.readout import HEADS, POOLINGS, Head, LinearHead

Layout = Callable[[Sequence[Item]], Batch]

LAYOUTS: dict[tuple[str, str, str], Layout] = {
    ("decoder", "head", "padded"): padded,
    ("decoder", "head", "packed"): packed,
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
        pooling: a key of `readout.POOLINGS`.
    """

    def __init__(self, backbone: nn.Module, head: Head, dtype: torch.dtype, pooling: str = "last") -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.dtype = dtype
        self.pooling = pooling
        self._why_not_packed = why_not_packed(backbone)

    def forward(self, inputs: Inputs, read_at: Tensor, lengths: Tensor) -> Tensor:
        if "cu_seq_lens_q" in inputs and self._why_not_packed:
            raise ModelError(
                f"{type(self.backbone).__name__} {self._why_not_packed}: packed rows would see each other",
                remedy="set train.layout=padded",
            )
        # The same autocast in training, validation and the notebook, whoever calls. No cache is kept: nothing is
        # generated, and a cache would have to be told of every layout.
        with torch.autocast(read_at.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = self.backbone(**inputs, use_cache=False).last_hidden_state
        logits: Tensor = self.head(POOLINGS[self.pooling](hidden, read_at, lengths))
        return logits

    @property
    def device(self) -> torch.device:
        return next(self.head.parameters()).device


def build(config: Config, device: torch.device, base: Path | None = None) -> Classifier:
    """A classifier with a fresh head (and fresh adapters), seeded by `config.seed`.

    Raises:
        ModelError: the base can't be loaded or adapted, or has no LM head or no one token for a label word.
    """
    torch.manual_seed(config.seed)
    classifier = build_frozen(config, device, base, training=True)
    if config.model.label_words and isinstance(classifier.head, LinearHead):  # the config allows no other head
        words = [config.model.label_words[name] for name in config.task.classes]
        source = resolve_base(config.model.base, base)
        classifier.head.start_from(lm_head_rows(source, config.model, words, classifier.backbone))
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
    head = HEADS[config.model.head](hidden_size, len(config.task.classes)).to(device)
    return Classifier(backbone, head, dtype, config.model.pooling)
