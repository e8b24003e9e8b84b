"""The classifier that the jobs use: backbone, head and layout put together, and which combinations are legal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pairclf.bundles.base import resolve_base
from pairclf.config import Config
from pairclf.errors import ModelError
from pairclf.model.attention import NAME, AttentionCalls, recording_calls
from pairclf.model.backbone import add_adapters, load_base, load_tokenizer, pick_dtype
from pairclf.model.batch import BackboneInputs
from pairclf.model.families import REMEDY, family_of
from pairclf.model.inputs import builder_for
from pairclf.model.isolation import isolation_of
from pairclf.model.layouts import BATCH_LAYOUTS, layout_of
from pairclf.model.lm_head import lm_head_of
from pairclf.model.positions import require_positions
from pairclf.model.precision import in_float32
from pairclf.model.readout import POOLINGS, READOUTS, BaseParts, Head
from pairclf.model.trim import reading_at


class Classifier(nn.Module):
    """Backbone and head: `(inputs, read_at, lengths)` -> logits `(R, C)` in float32; R and S as in `Batch`.

    Args:
        backbone: returns an output with `last_hidden_state` `(B, T, H)`.
        head: `(S, H)` -> `(R, C)`.
        dtype: what the backbone computes in.
        pooling: a key of `readout.POOLINGS`.

    Attributes:
        family: the kind of the backbone.
        isolation: which layouts give every row the states that it has alone.

    Raises:
        ModelError: the backbone can't be run or not be read so, or not even padded rows score as each alone.
    """

    def __init__(self, backbone: nn.Module, head: Head, dtype: torch.dtype, pooling: str = "last") -> None:
        super().__init__()
        self.family = family_of(backbone.config)  # type: ignore[arg-type]
        if pooling not in self.family.poolings:
            raise ModelError(f"model.pooling={pooling} is none of the base's: {', '.join(self.family.poolings)}")
        self.backbone = backbone
        self.head = head
        self.dtype = dtype
        self.pooling = pooling
        self.isolation = isolation_of(backbone, dtype)

    def forward(self, inputs: BackboneInputs, read_at: Tensor, lengths: Tensor, *, trim: bool = False) -> Tensor:
        """Logits `(R, C)` of a batch.

        Args:
            inputs: `Batch.inputs`, and so on.
            read_at: `(S,)`.
            lengths: `(S,)`.
            trim: compute the last layer at `read_at` alone; for evaluation, and where `why_not_trimmed` is None.
        """
        topology = inputs.get("topology")
        layout = layout_of(inputs)
        if why := self.why_not(layout):
            raise ModelError(f"layout {layout}: {why}", remedy="set train.layout=padded and predict.layout=auto")
        keywords, calls = inputs, AttentionCalls(requires_topology=topology is not None)
        if topology is not None and self.attention != NAME:
            keywords = {name: value for name, value in inputs.items() if name != "topology"}
        # The same autocast in training, validation and the notebook, whoever calls.
        with (
            torch.autocast(read_at.device.type, self.dtype, enabled=self.dtype != torch.float32),
            reading_at(self.backbone, read_at) if trim else nullcontext(),
            recording_calls(calls) if topology is not None else nullcontext(),
        ):
            hidden = self.backbone(**keywords, **self.family.forward).last_hidden_state
        if topology is not None:
            self._require_topology_received(calls, layout)
        if trim:
            read_at = torch.arange(len(read_at), device=read_at.device)
        logits: Tensor = self.head(POOLINGS[self.pooling](hidden, read_at, lengths))
        return logits

    @contextmanager
    def computing_in_float32(self) -> Iterator[None]:
        """Within, the backbone computes in float32, whatever its weights are stored in."""
        dtype, self.dtype = self.dtype, torch.float32
        try:
            with in_float32(self.backbone):
                yield
        finally:
            self.dtype = dtype

    @property
    def attention(self) -> str:
        """The backbone's attention implementation, as transformers names it."""
        config: Any = self.backbone.config
        return str(config._attn_implementation)

    def why_not(self, layout: str) -> str | None:
        """Why sequences can't lie so; None: they can."""
        record = BATCH_LAYOUTS[layout]
        if self.head.branches > 1 and not record.branches:
            return f"a row has {self.head.branches} branches, which the layout shared alone can lay out"
        return self.family.refuses.get(layout) or record.why_not(self.isolation, self.pooling)

    def _require_topology_received(self, calls: AttentionCalls, layout: str) -> None:
        """Every layer's attention knew in a forward pass where the rows lie. In training, layers may be dropped."""
        expected = self.isolation.attentions
        if self.attention != NAME or calls.calls == expected or (self.training and calls.calls):
            return
        raise ModelError(
            f"layout {layout}: {type(self.backbone).__name__} called its attention {calls.calls} times, "
            f"not {expected}: rows would see each other",
            remedy="set train.layout=padded and predict.layout=padded",
        )

    def why_not_trim(self, layout: str) -> str | None:
        """Why the last layer is computed for every token; None: it need not be."""
        if not BATCH_LAYOUTS[layout].topology:
            return f"rows are {layout}"
        if self.pooling != "last":
            return f"model.pooling={self.pooling} reads every token"
        return self.family.refuses.get("trim") or self.isolation.trimmed

    @property
    def device(self) -> torch.device:
        return next(self.head.parameters()).device


def build(config: Config, device: torch.device) -> Classifier:
    """A classifier with a fresh head (and fresh adapters), seeded by `config.seed`.

    Raises:
        ModelError: the base can't be loaded or adapted, does not go with `train.layout`, or has no LM head or no one
            token for a label word.
    """
    classifier = build_untrained(config, device)
    if why := classifier.why_not(config.train.layout):
        legal = [name for name in BATCH_LAYOUTS if classifier.why_not(name) is None]
        raise ModelError(
            f"train.layout={config.train.layout} does not go with model.base={config.model.base}: {why}",
            remedy=f"set train.layout={legal[-1]}" if legal else "use another base",
        )
    if config.trains_all and not any(weight.requires_grad for weight in classifier.backbone.parameters()):
        raise ModelError(
            f"model.base={config.model.base} holds quantised weights: model.lora=null leaves only the head to train",
            remedy="give model.lora, or a base whose weights are not quantised",
        )
    if config.model.lora is not None:
        classifier.backbone = add_adapters(classifier.backbone, config.model.lora)
    return classifier


def build_untrained(config: Config, device: torch.device) -> Classifier:
    """The base with its head as it is before any training, seeded by `config.seed`; no adapters yet.

    Raises:
        ModelError: the base can't be loaded, or has no LM head or no one token for a label word.
    """
    torch.manual_seed(config.seed)
    classifier = build_frozen(config, device, None, training=True)
    READOUTS[config.model.readout].start(classifier.head, config, _parts_of(config, None, classifier.backbone, None))
    return classifier


def _parts_of(config: Config, base: Path | None, backbone: nn.Module, tokenizer: Path | None) -> BaseParts:
    source = resolve_base(config.model.base, base)
    return BaseParts(
        builder=lambda: builder_for(config, load_tokenizer(str(tokenizer or source))),
        lm_head=lambda setting: lm_head_of(source, backbone, setting),
    )


def build_frozen(
    config: Config,
    device: torch.device,
    base: Path | None,
    *,
    training: bool,
    others: Sequence[torch.device] = (),
    tokenizer: Path | None = None,
) -> Classifier:
    """The base with a head that a bundle or the training will fill; no adapters yet. `others`: see `load_base`.

    Args:
        tokenizer: its folder; None: it is the base's.

    Raises:
        ModelError: the base can't be loaded, or rows of its batches have a say in each other's states.
    """
    dtype, _ = pick_dtype(config.model.dtype, device)
    # Full fine-tuning keeps its weights in float32 and computes under autocast: bf16 weights swallow small updates.
    stored = torch.float32 if training and config.trains_all else dtype
    backbone = load_base(resolve_base(config.model.base, base), config.model, stored, device, others)
    hidden_size: int | None = getattr(backbone.config.get_text_config(), "hidden_size", None)  # type: ignore[union-attr, operator]
    if hidden_size is None:
        raise ModelError(
            f"model.base={config.model.base}: the config of {type(backbone).__name__} has no hidden_size", remedy=REMEDY
        )
    require_positions(config, backbone.config)  # type: ignore[arg-type]
    readout, parts = READOUTS[config.model.readout], _parts_of(config, base, backbone, tokenizer)
    head = readout.make(config, hidden_size, backbone.config, parts.builder).to(device)
    readout.attach(head, config, parts)
    return Classifier(backbone, head, dtype, config.model.pooling)
