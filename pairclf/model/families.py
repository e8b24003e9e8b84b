"""Families of backbones: what is asked of a model by its kind. A new one is a new record of `FAMILIES`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForTextEncoding,
    PretrainedConfig,
)

from pairclf.errors import ModelError
from pairclf.model.batch import BackboneInputs

REMEDY = (
    "use a decoder such as Gemma-2, Llama-3 or Qwen-2.5, an encoder such as DeBERTa-v3 or ModernBERT, or an "
    "encoder-decoder such as FLAN-T5 or T5Gemma"
)

ENCODER_DECODERS = {
    **dict.fromkeys(("t5", "mt5", "umt5"), "pad_token_id"),
    **dict.fromkeys(("t5gemma", "t5gemma2"), "bos_token_id"),
}
"""`model_type` of the encoder-decoders, and the token that the decoder begins with where the config has no
`decoder_start_token_id`; each is proved by a test."""


class Family(NamedTuple):
    """One kind of backbone.

    Attributes:
        matches: whether a model of this config is one.
        loader: transformers' class that makes it, without a head.
        options: keyword arguments of the loader, by the model's config.
        causal: a token sees those before it alone, so that half of all pairs are computed.
        poolings: keys of `readout.POOLINGS` that sum up a row; the first is the default of `model.pooling`.
        swap: the default of `train.swap`.
        special_tokens: which of the tokenizer's own tokens a row must have, as the model was never trained without
            them: `opening` ([CLS], `<s>`), `closing` ([SEP], `</s>`).
        float32: weights are held in float32 in training even where they are frozen, whatever is computed in.
        states: runs the backbone, with adapters or without: hidden states `(B, T, H)` of a batch's inputs.
        float32_layers: names of linear layers that are stored and computed in float32, always.
        unread: prefixes within the names of weights that are in the files and not in the model.
        once_a_row: whether a module, by its name, computes one token of a row and not all of them.
        idle: the parts of a model without a say in any state, such as those that read images: they are not trained.
        refuses: what it can't be combined with, and why: names of layouts and readouts, `trim`, `vllm`, `label_words`.
    """

    matches: Callable[[PretrainedConfig], bool]
    loader: Any
    options: Callable[[PretrainedConfig], Mapping[str, Any]]
    causal: bool
    poolings: tuple[str, ...]
    swap: Literal["none", "random", "both"]
    special_tokens: tuple[Literal["opening", "closing"], ...]
    float32: bool
    states: Callable[[nn.Module, BackboneInputs], Tensor]
    refuses: Mapping[str, str]
    float32_layers: tuple[str, ...] = ()
    unread: tuple[str, ...] = ("lm_head.",)
    once_a_row: Callable[[str], bool] = lambda name: False
    idle: Callable[[nn.Module], list[nn.Module]] = lambda backbone: []


def _is_decoder(settings: PretrainedConfig) -> bool:
    others = settings.model_type in ENCODER_DECODERS or type(settings) in MODEL_FOR_MASKED_LM_MAPPING
    return not settings.is_encoder_decoder and not others


def _decoder_states(backbone: nn.Module, inputs: BackboneInputs) -> Tensor:
    # Nothing is generated, and a cache would have to be told of every layout.
    states: Tensor = backbone(**inputs, use_cache=False).last_hidden_state
    return states


def _is_encoder(settings: PretrainedConfig) -> bool:
    is_decoder = settings.is_encoder_decoder or getattr(settings, "is_decoder", False)
    return not is_decoder and type(settings) in MODEL_FOR_MASKED_LM_MAPPING


def class_of(settings: PretrainedConfig) -> type | None:
    """transformers' class of the backbone; None: it comes with the model's own code."""
    kinds: Any = MODEL_MAPPING.get(type(settings), None)
    kind: type | None = kinds[0] if isinstance(kinds, tuple) else kinds
    return kind


def _without_pooler(settings: PretrainedConfig) -> Mapping[str, Any]:
    """Masked language models are saved without a pooler, which a head of our own has no use for."""
    kind: Any = class_of(settings)
    return {"add_pooling_layer": False} if "add_pooling_layer" in signature(kind.__init__).parameters else {}


def _encoder_states(backbone: nn.Module, inputs: BackboneInputs) -> Tensor:
    if getattr(backbone.config, "type_vocab_size", 0):
        # All of the first type. Some versions of transformers look them up by place, and not by position, in a table
        # that ends where positions do: packed rows are longer.
        input_ids = inputs["input_ids"]
        assert isinstance(input_ids, Tensor)
        inputs = {**inputs, "token_type_ids": torch.zeros_like(input_ids)}
    states: Tensor = backbone(**inputs).last_hidden_state
    return states


def start_token(settings: PretrainedConfig) -> int:
    """The id of the token that the decoder of an encoder-decoder begins with.

    Raises:
        ModelError: its config does not say.
    """
    name = ENCODER_DECODERS[settings.model_type]
    start = getattr(settings, "decoder_start_token_id", None)
    start = getattr(settings.get_text_config(), name, None) if start is None else start
    if start is None:
        raise ModelError(
            f"model.base={settings.name_or_path}: config.json names no token that the decoder begins with",
            remedy=f"write decoder_start_token_id into it; a {settings.model_type} has its {name} there",
        )
    return int(start)


def _first_decoder_state(backbone: nn.Module, inputs: BackboneInputs) -> Tensor:
    """`(B, 1, H)`: the encoder has read the text, and the decoder its start token. Both count positions themselves."""
    input_ids = inputs["input_ids"]
    assert isinstance(input_ids, Tensor)
    start = input_ids.new_full((len(input_ids), 1), start_token(backbone.config))  # type: ignore[arg-type]
    read = {"input_ids": input_ids, "attention_mask": inputs["attention_mask"], "decoder_input_ids": start}
    states: Tensor = backbone(**read, use_cache=False).last_hidden_state
    return states


def _text_encoder_states(backbone: nn.Module, inputs: BackboneInputs) -> Tensor:
    if "attention_mask" in inputs:  # T5 has no positions to be told
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    states: Tensor = backbone(**inputs).last_hidden_state
    return states


def _decodes(name: str) -> bool:
    """Whether a module is the decoder's, but not one that makes keys or values of the encoder's states.

    T5Gemma 2 has no such modules apart: keys and values of both kinds come from the same ones, and are not counted.
    """
    in_decoder = re.search(r"\bdecoder\.", name) is not None
    return in_decoder and not re.search(r"\.(EncDecAttention|cross_attn)\.(k|v|k_proj|v_proj)\b", name)


def _beside_text(backbone: nn.Module) -> list[nn.Module]:
    """What stands beside the text model of a multimodal one."""
    model: Any = backbone
    if model.config.get_text_config() is model.config:
        return []
    text: nn.Module = model.get_decoder()
    holders = {id(module) for module in backbone.modules() if any(inner is text for inner in module.modules())}
    inside = {id(module) for module in text.modules()}
    children = [child for holder in backbone.modules() if id(holder) in holders - inside for child in holder.children()]
    return [child for child in children if id(child) not in holders]


_IMAGES = r"\b(vision_tower|multi_modal_projector)$"
_OWN_KEYS = r"\bdecoder\..*\.(SelfAttention\.[qk]|self_attn\.[qk]_proj)$"


def _idle_of_encoder_decoder(backbone: nn.Module) -> list[nn.Module]:
    """What T5Gemma 2's encoder has for images; and queries and keys of a decoder that sees its start token alone.

    Of one key the softmax is 1, whatever the scores: a gradient there is rounding noise, which AdamW makes steps of.
    In T5Gemma 2, the keys of the text stand beside that one.
    """
    model_type: Any = backbone.config.model_type  # type: ignore[union-attr]
    idle = _IMAGES if model_type == "t5gemma2" else _OWN_KEYS
    return [module for name, module in backbone.named_modules() if re.search(idle, name)]


def idle_modules(backbone: nn.Module) -> set[nn.Module]:
    """All modules within the parts that have no say in any state (`Family.idle`)."""
    parts = family_of(backbone.config).idle(backbone)  # type: ignore[arg-type]
    return {module for part in parts for module in part.modules()}


def has_encoder_alone(settings: PretrainedConfig) -> bool:
    """Whether the encoder of an encoder-decoder can be loaded without the decoder."""
    return settings.model_type in ENCODER_DECODERS and type(settings) in MODEL_FOR_TEXT_ENCODING_MAPPING


_BEHIND = "in an encoder a token sees those behind it, so that a common beginning has other states in each row"
_ALONE = "both sides of a row share the prompt's states, which an encoder computes anew beside each"

FAMILIES: dict[str, Family] = {
    "decoder": Family(
        matches=_is_decoder,
        loader=AutoModel,
        options=lambda settings: {},
        causal=True,
        poolings=("last", "mean"),
        swap="both",
        special_tokens=(),
        float32=False,
        states=_decoder_states,
        refuses={},
        idle=_beside_text,
    ),
    "encoder": Family(
        matches=_is_encoder,
        loader=AutoModel,
        options=_without_pooler,
        causal=False,
        poolings=("first", "mean"),
        # Augmentation by swaps made small encoders worse, where it helped large decoders.
        swap="none",
        special_tokens=("opening", "closing"),
        # DeBERTa is published in float16, and its training in float16 alone ends in NaN.
        float32=True,
        states=_encoder_states,
        refuses={
            "shared": _BEHIND,
            "vllm": "it serves decoders alone here, and the base is an encoder",
            "label_tokens": "an encoder does not tell the next token",
            "label_words": "an encoder does not tell the next token",
            "reward": _ALONE,
        },
        idle=_beside_text,
    ),
    "encoder_decoder": Family(
        matches=lambda settings: settings.model_type in ENCODER_DECODERS and settings.is_encoder_decoder,
        loader=AutoModel,
        options=lambda settings: {},
        causal=False,
        poolings=("decoder",),  # with mean, `read_settings` reads a model of the next record
        swap="both",
        special_tokens=(),
        float32=False,
        states=_first_decoder_state,
        refuses={
            "packed": "each row of the encoder has a row of the decoder beside it",
            "shared": _BEHIND,
            "vllm": "it serves decoders alone here, and the base is an encoder-decoder",
            "reward": _ALONE,
        },
        # Its output is beyond float16's largest number: https://github.com/huggingface/transformers/issues/20287
        float32_layers=("wo",),
        once_a_row=_decodes,
        idle=_idle_of_encoder_decoder,
    ),
    "text_encoder": Family(
        matches=lambda settings: settings.model_type in ENCODER_DECODERS and not settings.is_encoder_decoder,
        loader=AutoModelForTextEncoding,
        options=lambda settings: {},
        causal=False,
        poolings=("mean",),
        swap="both",
        special_tokens=(),
        float32=False,
        states=_text_encoder_states,
        refuses={
            "shared": _BEHIND,
            "vllm": "it serves decoders alone here, and the base is an encoder",
            "label_tokens": "model.pooling=mean reads the encoder, which does not tell the next token",
            "label_words": "model.pooling=mean reads the encoder, which does not tell the next token",
            "reward": _ALONE,
        },
        float32_layers=("wo",),
        unread=("lm_head.", "decoder."),
    ),
}


def require_pooling(settings: PretrainedConfig, pooling: str) -> None:
    """Do nothing if a model of this config can be read by `model.pooling`.

    Raises:
        ModelError: it can't.
    """
    legal = family_of(settings).poolings
    if settings.is_encoder_decoder and has_encoder_alone(settings):
        legal = (*legal, "mean")  # of which `read_settings` makes a config without a decoder
    if pooling not in legal:
        raise ModelError(
            f"model.pooling={pooling} is none of the base's: {', '.join(legal)}",
            remedy=f"set model.pooling={' or '.join(legal)}, or remove it",
        )


def decoder_layers(settings: Any) -> int:
    """Layers of the decoder behind an encoder; 0: there is none."""
    if not settings.is_encoder_decoder:
        return 0
    return int(getattr(settings, "num_decoder_layers", None) or settings.get_text_config().num_hidden_layers)


def text_settings(settings: PretrainedConfig) -> Any:
    """The config of the part of a model that reads the text: of T5Gemma its encoder's, where others have one alone."""
    encoder = getattr(settings, "encoder", None)
    return (encoder if isinstance(encoder, PretrainedConfig) else settings).get_text_config()


def states_settings(settings: Any) -> Any:
    """The config of the part whose states are read: a decoder behind an encoder, or what reads the text."""
    return settings.get_text_config() if settings.is_encoder_decoder else text_settings(settings)


def family_of(settings: PretrainedConfig) -> Family:
    """The family of a model, by its transformers config.

    Raises:
        ModelError: it is of none.
    """
    for family in FAMILIES.values():
        if family.matches(settings):
            return family
    raise ModelError(
        f"model.base={settings.name_or_path} is a {settings.model_type}, which is none of: {', '.join(FAMILIES)}",
        remedy=REMEDY,
    )
