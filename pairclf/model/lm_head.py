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

NAMES = ("lm_head", "embed_out")
"""What an LM head is called; GPT-NeoX has the second."""


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
    """

    size: int
    weight: Any
    bias: Any

    def rows(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Weight `(len(ids), H)` and bias `(len(ids),)` of these tokens, float32; a bias of zeros if there is none."""
        weight = torch.cat([self.weight[token : token + 1] for token in ids]).detach().float()
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
            checkpoint(partial(_log_total, finish), state.float(), *block, use_reentrant=False)
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

    Where head and embedding are tied it is the embedding; otherwise it alone is opened in the base's files.

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
    embedding: Tensor = backbone.get_input_embeddings().weight  # type: ignore[operator]
    if getattr(config, "tie_word_embeddings", False):
        # Trained weights move on; the head stays what it was.
        return LmHead(len(embedding), embedding.detach().clone() if embedding.requires_grad else embedding, bias)
    weight = _open(source, "weight")
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
    return LmHead(len(embedding), weight, bias)


def _open(source: str, part: str) -> Any:
    """Weight or bias of the LM head, not read yet; None: the base has none."""
    endings = tuple(f"{name}.{part}" for name in NAMES)
    for path in weight_files(source):
        weights: Any = safe_open(path, framework="pt")
        for name in weights.keys():  # noqa: SIM118 - it is no dict
            if name.endswith(endings):
                return weights.get_slice(name)
    return None
