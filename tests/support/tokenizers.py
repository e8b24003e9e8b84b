"""A tokenizer that is made in place."""

from __future__ import annotations

from pathlib import Path


def tiny_tokenizer(folder: Path, *, closing: bool = False) -> None:
    """A byte-level tokenizer with a few special tokens, made in place; `closing`: it ends texts, as encoders' do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end, ids = (" <eos>", [("<bos>", 1), ("<eos>", 2)]) if closing else ("", [("<bos>", 1)])
    tokenizer.post_processor = processors.TemplateProcessing(f"<bos> $A{end}", f"<bos> $A $B{end}", ids)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",  # pad == eos, the trap of FACTS: nothing here may hang on it
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
    )
    fast.save_pretrained(folder)
