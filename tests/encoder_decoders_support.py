"""Tiny encoder-decoders with an LM head, and a tokenizer that closes a text as T5's does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    MT5Config,
    PreTrainedTokenizerFast,
    T5Config,
    T5Gemma2Config,
    T5GemmaConfig,
    UMT5Config,
)

WINDOW = 8
_T5 = {"vocab_size": 320, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
_START = {"decoder_start_token_id": 0}
_GEMMA = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 16,
    "final_logit_softcapping": 3.0,
}


def _gemma() -> T5GemmaConfig:
    narrow = {**_GEMMA, "hidden_size": 32}
    return T5GemmaConfig(encoder=_GEMMA, decoder=narrow, vocab_size=320)


def _gemma2() -> T5Gemma2Config:
    kinds = ["sliding_attention", "full_attention"]
    images = {"model_type": "siglip_vision_model", "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    images |= {"hidden_size": 32, "intermediate_size": 32, "patch_size": 14}
    of_images = {"image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302, "mm_tokens_per_image": 4}
    encoder = {"text_config": {**_GEMMA, "layer_types": kinds}, "vision_config": images, **of_images}
    return T5Gemma2Config(encoder=encoder, decoder={**_GEMMA, "layer_types": kinds}, image_token_index=300)


KINDS: dict[str, Callable[[], Any]] = {
    "t5": lambda: T5Config(**_T5, **_START),
    "t5_v1_1": lambda: T5Config(**_T5, **_START, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": lambda: MT5Config(**_T5, **_START),
    "umt5": lambda: UMT5Config(**_T5, **_START),
    "t5gemma": _gemma,
    "t5gemma2": _gemma2,
}
"""T5 with a tied LM head and with an own one, its multilingual kin; T5Gemma with an encoder wider than its decoder, and
T5Gemma 2, which could see."""


def closing_tokenizer(folder: Path) -> None:
    """Byte-level, without an opening token; `</s>` closes a text, pad starts the decoder."""
    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder)


def tiny_encoder_decoder(kind: str, folder: Path) -> None:
    """Random weights, so large that every token that is seen moves the decoder's state; `kind` is a key of `KINDS`."""
    torch.manual_seed(0)
    model: Any = AutoModelForSeq2SeqLM.from_config(KINDS[kind]())
    if kind == "t5_v1_1":  # as FLAN-T5's files are, whatever its config says of it
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.1)
    random = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "lm_head" not in name and "shared" not in name:
            weight.data.normal_(std=0.5 if "embed" in name else weight.shape[-1] ** -0.5, generator=random)
    model.save_pretrained(folder)
    closing_tokenizer(folder)
