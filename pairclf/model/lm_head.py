"""The LM head of a base: the rows that score a token as the next one, and what the model does to their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pairclf.errors import ModelError
from pairclf.model.backbone import weight_files
from pairclf.model.families import family_of

BLOCK = 1 << 14
"""Tokens of the vocabulary that are scored at a time: their rows are copied to float32."""


def _cap(scores: Tensor, most: float) -> Tensor:
    return most * torch.tanh(scores / most)


AFTERWARDS: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "lm_head_multiplier": torch.mul,  # Falcon-H1
    "logit_scale": torch.mul,  # Cohere
    "logits_scaling": torch.div,  # Granite
    "final_logit_softcapping": _cap,  # Gemma
    "logits_soft_cap": _cap,  # RecurrentGemma
}
"""What a decoder does to its LM head's scores, by the number in its config that it does it with."""

UNLIKE = frozenset(
    {"bert-generation", "bigbird_pegasus", "cpmant", "inkling_text", "modernbert-decoder", "plbart", "xlnet"}
)
"""`model_type` of decoders that do something else to a state or its scores; a test looks for more of them."""

NAMES = ("lm_head", "embed_out", "lm_head.out_proj")
"""What an LM head is called; GPT-NeoX has the second, T5Gemma the third."""

SCALES_STATES = ("t5", "umt5")
"""`model_type` of models that, where their LM head is tied, multiply a state by `d_model ** -0.5` before it."""


def afterwards(settings: Any) -> Callable[[Tensor], Tensor]:
    """What the model of this config does to scores `(..., V)` before they are logits."""
    text = settings.get_text_config()
    numbers = {name: number for name in AFTERWARDS if (number := getattr(text, name, None)) is not None}

    def apply(scores: Tensor) -> Tensor:
        for name, number in numbers.items():
            scores = AFTERWARDS[name](scores, number)
        return scores

    return apply


class LmHead(NamedTuple):
    """An LM head, on the disk or in memory.

    Attributes:
        size: V, as the base's embedding has it.
        weight: `(V, H)`, a tensor or a slice of a safetensors file, of which a part is read when it is asked for.
        bias: `(V,)` likewise; None: there is none.
        scale: factor of the states before it.
    """

    size: int
    weight: Any
    bias: Any
    scale: float = 1.0

    def rows(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Weight `(len(ids), H)` and bias `(len(ids),)` of these tokens, float32; a bias of zeros if there is none.

        The scale of the states is in the weight.
        """
        weight = torch.cat([self.weight[token : token + 1] for token in ids]).detach().float() * self.scale
        if self.bias is None:
            return weight, weight.new_zeros(len(ids))
        return weight, torch.cat([self.bias[token : token + 1] for token in ids]).detach().float()

    def on(self, device: torch.device) -> LmHead:
        """The whole of it in a device's memory, in the dtype of the files."""
        bias = None if self.bias is None else self.bias[:].to(device)
        return self._replace(weight=self.weight[:].detach().to(device), bias=bias)

    def log_total(self, state: Tensor, finish: Callable[[Tensor], Tensor]) -> Tensor:
        """Logarithm `(R,)` of the sum over the vocabulary of the exponentials of the logits, of states `(R, H)`.

        A block of the vocabulary at a time, which is computed again in the backward pass: neither all logits nor a
        copy of the head in float32 is ever in memory.
        """
        parts = [
            checkpoint(partial(_log_total, finish), state.float() * self.scale, *block, use_reentrant=False)
            for block in self._blocks()
        ]
        return torch.stack(parts).logsumexp(dim=0)

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for start in range(0, self.size, BLOCK):
            stop = start + BLOCK
            yield self.weight[start:stop], None if self.bias is None else self.bias[start:stop]


def _log_total(finish: Callable[[Tensor], Tensor], state: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return finish(functional.linear(state, weight.float(), None if bias is None else bias.float())).logsumexp(dim=-1)


def lm_head_of(source: str, backbone: nn.Module, setting: str) -> LmHead:
    """The LM head of the base at `source`, whose backbone is loaded.

    It alone is opened in the base's files. Where these have none, and head and embedding are tied, it is the embedding;
    that of the decoder, if the base has an encoder too. FLAN-T5's files have one although its config ties them, and
    transformers then takes it.

    Args:
        source: folder or hub id.
        backbone: without its LM head.
        setting: the one that asks for it, for messages.

    Raises:
        ModelError: the base has none, or holds it quantised.
    """
    config: Any = backbone.config
    why = family_of(config).refuses.get("label_words")
    if config.model_type in UNLIKE:
        why = f"what a {config.model_type} does to the scores of its LM head is not known here"
    if why:
        raise ModelError(f"{setting}: {why}", remedy=f"remove {setting}")
    bias = _open(source, "bias")
    embedding: Tensor = backbone.get_decoder().get_input_embeddings().weight  # type: ignore[operator]
    scale = _scale_of(config)
    weight = _open(source, "weight")
    if weight is None and getattr(config, "tie_word_embeddings", False):
        # Trained weights move on; the head stays what it was.
        tied = embedding.detach().clone() if embedding.requires_grad else embedding
        return LmHead(len(embedding), tied, bias, scale)
    if weight is None:
        raise ModelError(
            f"{setting} needs the LM head of {source}, whose files hold no lm_head.weight",
            remedy=f"remove {setting}, or give a base that was saved with its LM head",
        )
    if (shape := weight.get_shape()) != list(embedding.shape):
        raise ModelError(
            f"{setting} needs the LM head of {source} as it is, and its shape is {shape}, that of the embedding "
            f"{list(embedding.shape)}: it is quantised",
            remedy="give a base whose lm_head.weight is not quantised",
        )
    return LmHead(len(embedding), weight, bias, scale)


def _scale_of(config: Any) -> float:
    # transformers 5.23 calls every T5 tied, and says by another name whether it was published so; 5.0 does neither.
    scales = config.model_type in SCALES_STATES and getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
    return float(config.d_model**-0.5) if scales else 1.0


def _open(source: str, part: str) -> Any:
    """Weight or bias of the LM head, not read yet; None: the base has none."""
    endings = tuple(f"{name}.{part}" for name in NAMES)
    for path in weight_files(source):
        weights: Any = safe_open(path, framework="pt")
        for name in weights.keys():  # noqa: SIM118 - it is no dict
            if name.endswith(endings):
                return weights.get_slice(name)
    return None
