"""`model`: the base model, its quantisation, its adapters, and how logits are read out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pairclf.config.section import Section, as_list
from pairclf.task import Label
from pairclf.trust import REMOTE_CODE


class Lora(Section):
    """Named as in PEFT's `LoraConfig`."""

    r: int = Field(16, ge=1, description="rank of the adapters")
    lora_alpha: int = Field(32, ge=1, description="scale: the adapters' output is multiplied by lora_alpha / r")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="dropout probability before the adapters")
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = Field(
        "all-linear", description="names of the linear modules that get adapters; all-linear: all except the head"
    )
    first_layer: int = Field(0, ge=0, description="lowest layer with adapters, counted from 0")
    use_dora: bool = Field(False, description="DoRA: train each weight's magnitude separately from its direction")
    use_rslora: bool = Field(False, description="rsLoRA: scale by lora_alpha / sqrt(r) instead")


class Model(Section):
    base: str = Field(
        "embedded:gemma2-tiny", description="base model: a folder, a hub id, or embedded:NAME (shipped with pairclf)"
    )
    quantization: Literal["none", "nf4", "int8"] = Field("nf4", description="storage of the frozen base weights")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of computation; auto: bfloat16 if the GPU has it, else float16; float32 on a CPU"
    )
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="auto: pairclf's own, which supports padded and packed batches; others: as in transformers"
    )
    lora: Lora | None = Field(default_factory=Lora, description="LoRA adapters; null: train all weights")
    readout: Literal["head", "label_tokens", "reward"] = Field(
        "head",
        description="how states become logits: head (a classification head of our own), label_tokens (the LM head's "
        "own logits of label_words as the next token; frozen), reward (a score of each side's text alone)",
    )
    tie_model: Literal["davidson", "rao_kupper"] | None = Field(
        None,
        description="with readout=reward: probability of a tie of two rewards; null: davidson where the task has "
        "ties, else Bradley-Terry",
    )
    head: Literal["linear", "two_layer"] = Field(
        "linear", description="classification head: one linear layer, or two with a GELU between them"
    )
    head_bias: bool = Field(
        True,
        description="a bias a class in a linear head; false: none, as in transformers' classes for decoders, which "
        "`pairclf export --to transformers` writes",
    )
    pooling: Literal["last", "first", "mean", "decoder"] | None = Field(
        None,
        description="input of the head: the hidden state of the last or the first token, the mean over the sequence, "
        "or the first state of the decoder behind an encoder; null: last for a decoder, first ([CLS]) for an encoder, "
        "decoder for an encoder-decoder (T5), whose mean is the encoder's and leaves out the decoder",
    )
    label_words: dict[Label, Annotated[list[Label], BeforeValidator(as_list)]] = Field(
        {},
        description="maps each class to a word, or to synonyms, that may follow the text; with readout=head the linear "
        "head is initialised with the LM head's rows of the words",
    )
    label_scoring: Literal["trie", "joint"] = Field(
        "trie",
        description="words of several tokens with readout=label_tokens: trie (each token's probability among the "
        "labels' own tokens at its place), joint (among the whole vocabulary)",
    )

    @model_validator(mode="before")
    @classmethod
    def _trusts_nobody(cls, tree: Any) -> Any:
        """Files of older versions say `trust_remote_code: false`, which is what holds now; none may say `true`."""
        if not isinstance(tree, Mapping) or "trust_remote_code" not in tree:
            return tree
        if tree["trust_remote_code"] is not False:
            raise ValueError(
                "trust_remote_code is not a setting any more: remove this line, and give "
                f"{REMOTE_CODE} on the command line if you trust the model's code"
            )
        return {name: value for name, value in tree.items() if name != "trust_remote_code"}

    @property
    def scored_words(self) -> dict[str, list[str]]:
        """The words whose tokens are scored behind the text; none unless the readout is of label tokens."""
        return self.label_words if self.readout == "label_tokens" else {}

    @property
    def one_sided(self) -> bool:
        """Whether the model sees one of a row's two sides at a time, and so no order of them."""
        return self.readout == "reward"

    @model_validator(mode="after")
    def _legal(self) -> Model:
        if self.label_words and self.head != "linear":
            raise ValueError(f"label_words initialise a linear head, not head={self.head}; set head=linear")
        if self.readout == "head" and any(len(words) != 1 for words in self.label_words.values()):
            raise ValueError("label_words with readout=head needs one word for each class; set readout=label_tokens")
        if self.label_scoring != "trie" and self.readout != "label_tokens":
            raise ValueError(f"label_scoring changes nothing with readout={self.readout}; set readout=label_tokens")
        if self.readout == "label_tokens" and not all(self.label_words.values() or [None]):
            raise ValueError("readout=label_tokens needs label_words, a word for each class")
        legal = (None, "last", "decoder") if self.readout == "label_tokens" else (None, "last")
        if self.readout != "head" and self.pooling not in legal:
            raise ValueError(
                f"readout={self.readout} reads the last token, not pooling={self.pooling}; set pooling=last"
            )
        if self.readout == "reward" and (self.label_words or self.head != "linear"):
            raise ValueError("readout=reward has a linear head of its own, and reads neither head nor label_words")
        if self.tie_model and self.readout != "reward":
            raise ValueError(
                f"tie_model={self.tie_model} changes nothing with readout={self.readout}; set readout=reward"
            )
        return self
