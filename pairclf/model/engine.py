"""The classifier that the jobs use: backbone, head and layout put together, and which combinations are legal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig

from pairclf.bundles.base import resolve_base
from pairclf.config import Config, Train
from pairclf.errors import ModelError
from pairclf.inputs.builder import builder_for
from pairclf.inputs.sequences import Item
from pairclf.model.attention import NAME, AttentionCalls, recording_calls, why_not_packed
from pairclf.model.backbone import (
    add_adapters,
    load_base,
    load_tokenizer,
    pick_dtype,
    read_settings,
    require_safetensors,
)
from pairclf.model.batch import BackboneInputs
from pairclf.model.families import REMEDY, class_of, family_of, require_pooling, states_settings
from pairclf.model.inputs import with_pooling
from pairclf.model.isolation import isolation_of
from pairclf.model.layouts import BATCH_LAYOUTS, layout_of
from pairclf.model.lm_head import lm_head_of
from pairclf.model.positions import first_position, moved, require_positions
from pairclf.model.precision import in_float32
from pairclf.model.rationale import RationaleWriter, filled_layers, writer_of
from pairclf.model.readout import POOLINGS, READOUTS, BaseParts, Head, pooled
from pairclf.model.trim import reading_at


class Classifier(nn.Module):
    """Backbone and head: `(inputs, read_at, lengths)` -> logits `(R, C)` in float32; R and S as in `Batch`.

    Args:
        backbone: returns an output with `last_hidden_state` `(B, T, H)`.
        head: `(S, H)` -> `(R, C)`.
        dtype: what the backbone computes in.
        pooling: a key of `readout.POOLINGS`; None: the family's first.

    Attributes:
        family: the kind of the backbone.
        first_position: number of a row's first position, as the backbone counts them.
        isolation: which layouts give every row the states that it has alone.
        writer: of rationales; None: it writes none.

    Raises:
        ModelError: the backbone can't be run or not be read so, or not even padded rows score as each alone.
    """

    def __init__(self, backbone: nn.Module, head: Head, dtype: torch.dtype, pooling: str | None = None) -> None:
        super().__init__()
        self.family = family_of(backbone.config)  # type: ignore[arg-type]
        pooling = pooling or self.family.poolings[0]
        require_pooling(backbone.config, pooling)  # type: ignore[arg-type]
        self.backbone = backbone
        self.head = head
        self.dtype = dtype
        self.pooling = pooling
        self.first_position = first_position(backbone)
        self.isolation = isolation_of(backbone, dtype)
        self.writer: RationaleWriter | None = None

    def forward(self, inputs: BackboneInputs, read_at: Tensor, lengths: Tensor, *, trim: bool = False) -> Tensor:
        """Logits `(R, C)` of a batch.

        Args:
            inputs: `Batch.inputs`, and so on.
            read_at: `(S,)`.
            lengths: `(S,)`.
            trim: compute the last layer at the read tokens alone, where `why_not_trim` is None; the others have no say
                in a logit, nor in a gradient.
        """
        with reading_at(self.backbone, self._place(read_at, lengths)) if trim else nullcontext():
            hidden = self._hidden(inputs, self.family.states)
        states = hidden[0] if trim else pooled(self.pooling, hidden, read_at, lengths)
        logits: Tensor = self.head(states)
        return logits

    def _hidden(self, inputs: BackboneInputs, states: Callable[[nn.Module, BackboneInputs], Tensor]) -> Tensor:
        """Hidden states of a batch's inputs, by `states` of the backbone and what it is given of them."""
        topology = inputs.get("topology")
        layout = layout_of(inputs)
        if why := self.why_not(layout):
            raise ModelError(f"layout {layout}: {why}", remedy="set train.layout=padded and predict.layout=auto")
        keywords, calls = inputs, AttentionCalls(requires_topology=topology is not None)
        if topology is not None and self.attention != NAME:
            keywords = {name: value for name, value in inputs.items() if name != "topology"}
        # The same autocast in training, validation and the notebook, whoever calls.
        with (
            torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32),
            recording_calls(calls) if topology is not None else nullcontext(),
        ):
            hidden = states(self.backbone, moved(keywords, self.first_position))
        if topology is not None:
            self._require_topology_received(calls, layout)
        return hidden

    def _place(self, read_at: Tensor, lengths: Tensor) -> Tensor:
        """`(S,)`: places of the tokens that are read, where the pooling reads one a sequence."""
        place = POOLINGS[self.pooling]
        assert place is not None
        return place(read_at, lengths)

    def with_rationales(self, items: Sequence[Item], layout: str) -> list[Item]:
        """The items of a pass in this layout, with rationales in place of their marks if there is a writer."""
        if (writer := self.writer) is None:
            return list(items)

        def read(inputs: BackboneInputs, cache: DynamicCache | None) -> Tensor:
            if cache is None:
                return self._hidden(inputs, self.family.states)
            return self._hidden(inputs, partial(_extended, cache=cache))

        return writer.completed(read, items, BATCH_LAYOUTS[layout].lay_out)

    @torch.inference_mode()
    def cached_bytes(self) -> int:
        """Bytes of a token's keys and values, which are kept while a rationale is written; 0: none is."""
        if self.writer is None:
            return 0
        cache, token = DynamicCache(), torch.ones(1, 1, dtype=torch.long, device=self.device)
        inputs: BackboneInputs = {"input_ids": token, "attention_mask": token, "position_ids": token - 1}
        self._hidden(inputs, partial(_extended, cache=cache))
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in filled_layers(cache))

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
        if POOLINGS[self.pooling] is None:
            return f"model.pooling={self.pooling} reads every token"
        return self.family.refuses.get("trim") or self.isolation.trimmed

    def trims_training(self, train: Train) -> bool:
        """Whether passes of a training, too, compute the last layer at the read tokens alone.

        A layer whose activations are recomputed is run again in backward, when nobody hands it those tokens.
        """
        return not train.gradient_checkpointing and self.why_not_trim(train.layout) is None

    @property
    def device(self) -> torch.device:
        return next(self.head.parameters()).device


def _extended(backbone: nn.Module, inputs: BackboneInputs, cache: DynamicCache) -> Tensor:
    """Hidden states of tokens behind those of a cache, which takes them up."""
    states: Tensor = backbone(**inputs, past_key_values=cache, use_cache=True).last_hidden_state
    return states


def build(config: Config, device: torch.device) -> Classifier:
    """A classifier with a fresh head (and fresh adapters), seeded by `config.seed`.

    Raises:
        ModelError: the base can't be loaded or adapted, does not go with `train.layout`, or has no LM head or no one
            token for a label word.
    """
    classifier = build_untrained(config, device)
    if why := classifier.why_not(config.train.layout):
        raise _layout_error(config, why, [name for name in BATCH_LAYOUTS if classifier.why_not(name) is None])
    if config.trains_all and not any(weight.requires_grad for weight in classifier.backbone.parameters()):
        raise ModelError(
            f"model.base={config.model.base} holds quantised weights: model.lora=null leaves only the head to train",
            remedy="give model.lora, or a base whose weights are not quantised",
        )
    if config.model.lora is not None:
        classifier.backbone = add_adapters(classifier.backbone, config.model.lora)
    return classifier


def require_base(config: Config, settings: PretrainedConfig) -> None:
    """Do nothing if a base's files and class allow its training as set, as far as is known before they are loaded.

    Raises:
        ModelError: its weights are pickles, or its rows can't lie as `train.layout` says.
    """
    require_safetensors(resolve_base(config.model.base))
    family, kind = family_of(settings), class_of(settings)
    mixes = None if kind is None else why_not_packed(kind, settings)

    def why_not(layout: str) -> str | None:
        if (why := family.refuses.get(layout)) or kind is None or mixes is None:
            return why
        return f"{kind.__name__} {mixes}" if BATCH_LAYOUTS[layout].topology else None

    if config.trains and (why := why_not(config.train.layout)):
        raise _layout_error(config, why, [name for name in BATCH_LAYOUTS if why_not(name) is None])


def _layout_error(config: Config, why: str, legal: Sequence[str]) -> ModelError:
    return ModelError(
        f"train.layout={config.train.layout} does not go with model.base={config.model.base}: {why}",
        remedy=f"set train.layout={' or '.join(legal)}" if legal else "use another base",
    )


def build_untrained(config: Config, device: torch.device) -> Classifier:
    """The base with its head as it is before any training, seeded by `config.seed`; no adapters yet.

    Raises:
        ModelError: the base can't be loaded, or has no LM head or no one token for a label word.
    """
    config = with_pooling(config, family_of(read_settings(resolve_base(config.model.base), config.model.pooling)))
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
    source = resolve_base(config.model.base, base)
    family = family_of(read_settings(source, config.model.pooling))
    in_float32 = training and (config.trains_all or family.float32)
    backbone = load_base(source, config.model, torch.float32 if in_float32 else dtype, device, others)
    hidden_size: int | None = getattr(states_settings(backbone.config), "hidden_size", None)
    if hidden_size is None:
        raise ModelError(
            f"model.base={config.model.base}: the config of {type(backbone).__name__} has no hidden_size", remedy=REMEDY
        )
    require_positions(config, backbone.config)  # type: ignore[arg-type]
    readout, parts = READOUTS[config.model.readout], _parts_of(config, base, backbone, tokenizer)
    head = readout.make(config, hidden_size, backbone.config, parts.builder).to(device)
    readout.attach(head, config, parts)
    classifier = Classifier(backbone, head, dtype, config.model.pooling)
    if config.rationale:
        source = resolve_base(config.model.base, base)
        classifier.writer = writer_of(source, backbone, parts.lm_head("prompt.rationale"), dtype, classifier.isolation)
    return classifier
