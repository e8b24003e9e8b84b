"""Families of backbones: what is asked of a model by its kind. A new one is a new record of `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModel, PretrainedConfig

from pairclf.errors import ModelError

REMEDY = "use a decoder such as Gemma-2, Llama-3 or Qwen-2.5"


class Family(NamedTuple):
    """One kind of backbone.

    Attributes:
        matches: whether a model of this config is one.
        loader: transformers' class that makes it, without a head.
        causal: a token sees those before it alone, so that half of all pairs are computed.
        poolings: keys of `readout.POOLINGS` that sum up a row.
        forward: further keyword arguments of its forward pass.
        refuses: what it can't be combined with, and why: names of layouts, `trim`, `vllm`, `label_words`.
    """

    matches: Callable[[PretrainedConfig], bool]
    loader: Any
    causal: bool
    poolings: tuple[str, ...]
    forward: Mapping[str, Any]
    refuses: Mapping[str, str]


def _is_decoder(settings: PretrainedConfig) -> bool:
    return not settings.is_encoder_decoder and type(settings) not in MODEL_FOR_MASKED_LM_MAPPING


FAMILIES: dict[str, Family] = {
    "decoder": Family(
        matches=_is_decoder,
        loader=AutoModel,
        causal=True,
        poolings=("last", "mean"),
        # Nothing is generated, and a cache would have to be told of every layout.
        forward={"use_cache": False},
        refuses={},
    )
}


def family_of(settings: PretrainedConfig) -> Family:
    """The family of a model, by its transformers config.

    Raises:
        ModelError: it is of none.
    """
    for family in FAMILIES.values():
        if family.matches(settings):
            return family
    raise ModelError(
        f"model.base={settings.name_or_path} is a {settings.model_type}, not a decoder: its last token does not sum up "
        "the row",
        remedy=REMEDY,
    )
