"""Label words that a tokenizer has no tokens for where the text ends, and the trie of those that it has."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pairclf.config import Inputs, resolve
from pairclf.errors import ConfigError
from pairclf.inputs.labels import LabelTrie, label_trie
from pairclf.inputs.render import BRANCH, InputBuilder
from pairclf.task import Row

TASK = {"name": "t", "fields": ["text"], "classes": ["u", "v"], "label_column": "l"}


def inputs_of(ending: str) -> Inputs:
    return resolve({"task": TASK, "inputs": {"max_length": 99, "template": {"text": "{text}" + ending}}}).inputs


def builder_of(tokenizer: PreTrainedTokenizerFast, ending: str) -> InputBuilder:
    return InputBuilder(tokenizer, resolve({"task": TASK}).task, inputs_of(ending))


def words_alone(*words: str) -> PreTrainedTokenizerFast:
    """Knows whole words between blanks alone."""
    vocabulary = {word: number for number, word in enumerate(["<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def of_bytes(*merges: tuple[str, str], ends: bool = False) -> PreTrainedTokenizerFast:
    """Bytes, and pairs of them as one token."""
    known = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(known)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if ends:
        backend.post_processor = processors.TemplateProcessing("$A <eos>", "$A $B <eos>", [("<eos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.mark.parametrize(
    ("tokenizer", "ending", "words", "message"),
    [
        (words_alone("is", "good"), "\nis\n", ["good", "bad"], r"words.v='bad' has no tokens: the tokenizer writes"),
        (of_bytes(("Ċ", "Ċ")), "\nis\n", ["A", "\nB"], r"v='\\nB' joins the text in other tokens than it has alone"),
        (of_bytes(("Ġ", "A")), "\nis ", ["A", "B"], r"u='A' joins .* end the text without its last blank, and begin"),
        (of_bytes(ends=True), "\nis\n", ["A", "B"], r"u='A' does not follow the text, which the tokenizer ends"),
        (of_bytes(), "\nis\n", ["A", "AB"], r"u='A' has the first tokens of 'AB', the word of v"),
        (of_bytes(), "\nis:", ["A", " B"], r"u='A' begins without a blank behind a text that ends in ':'; give ' A'"),
    ],
)
def test_a_word_without_tokens_of_its_own_in_this_context_is_refused(
    tokenizer: Any, ending: str, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        label_trie(builder_of(tokenizer, ending), {"u": words[:1], "v": words[1:]})
    assert str(error.value).count("label_words.") == (2 if "tokenizer ends" in message else 1), "who is at fault"
    assert "change these words or the end of inputs.template.text" in str(error.value.remedy)


def test_labels_that_share_their_first_tokens_are_branches_from_there_on() -> None:
    builder = builder_of(of_bytes(), "\nis\n")
    a, b, c, d, x = builder.tokenizer(["abcdx"], special=True)[0].tolist()
    trie = label_trie(builder, {"u": ["abc"], "v": ["abd", "x"]})
    assert trie == LabelTrie(
        nodes=((), (a,), (a, b)),
        edges=((0, a), (0, x), (1, b), (2, c), (2, d)),
        words=((0, (0, 2, 3)), (1, (0, 2, 4)), (1, (1,))),
    )
    ((encoded,),) = builder.continued_by(trie.nodes).encode([Row("0", {"text": ("hm",)})])
    assert encoded.ids[-6:].tolist() == [BRANCH, BRANCH, a, BRANCH, a, b]
    assert BRANCH not in encoded.ids[:-6]
