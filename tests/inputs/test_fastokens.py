"""fastokens beside tokenizers: the same ids of any text, and only where that is proven."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

import pairclf
from pairclf.inputs import tokenise
from pairclf.inputs.tokenise import WORTH_TRYING, TurnTokenizer

fastokens = pytest.importorskip("fastokens")

VISIBLE = [chr(code) for code in range(33, 127)]
SPECIAL = ("<s>", "</s>", "<|im_start|>")
RANGES = (
    (0, 32), (32, 127), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE80),
    (0x1100, 0x1200), (0x1E00, 0x2070), (0x3000, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0xF900, 0xFB07),
    (0xFE00, 0xFE10), (0x1F300, 0x1FAFF), (0x10000, 0x10FFFF), (0xE0000, 0xE007F),
)  # fmt: skip
"""Of Unicode: control characters, scripts with and without blanks, combining marks, emoji, tags."""
PIECES = (
    " ", "  ", "\n", "\n\n\n", "\t", "\r\n", " \n", "\u00a0", "\u3000", "\u200b", "\u0085", "▁", "▁▁", "'s", "'LL",
    "don't", "<0x0A>", "<unk>", "Ġ", "12345", "the ", " and", "ing", "Hello", *SPECIAL,
)  # fmt: skip


def texts(count: int) -> list[str]:
    """Random texts of pieces and characters."""
    lot = random.Random(0)

    def piece() -> str:
        low, high = lot.choice(RANGES)
        letters = "".join(chr(lot.randrange(low, high)) for _ in range(lot.randint(1, 6)))
        return letters if lot.random() < 0.4 else lot.choice(PIECES) * lot.randint(1, 3)

    return ["", *("".join(piece() for _ in range(lot.randint(1, 30))) for _ in range(count))]


def of_bytes() -> Tokenizer:
    """SmolLM2's kind, with 2,048 tokens: the embedded base's."""
    folder = Path(pairclf.__file__).parent / "embedded" / "llama-tiny"
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def with_fallback(characters: Iterable[str] = VISIBLE) -> Tokenizer:
    """Mistral's kind: a blank before an input, no words, and bytes for what has no token."""
    words = ["▁", *characters, "th", "the", "▁the", "in", "ing", "▁an", "an", "▁and", "▁▁", "ll"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n"), ("in", "g"), ("a", "n"), ("▁", "an"), ("▁an", "d")]
    merges += [("▁", "▁"), ("l", "l")]
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", *SPECIAL)])
    return backend


def with_words(digits: str, trim: bool, **changes: Any) -> Tokenizer:
    """Llama-3's and Qwen-2's kinds, with another vocabulary."""
    settings = json.loads(of_bytes().to_str())
    pattern = tokenise._UP_TO_DIGITS + digits + tokenise._BEHIND_DIGITS
    settings["model"] |= changes.pop("model", {})
    words = {"pre_tokenizer": tokenise._words(pattern, trim_offsets=trim)}
    return Tokenizer.from_str(json.dumps(settings | words | changes))


def with_pieces() -> Tokenizer:
    """Gemma's kind, with tokens for white space that are no special ones."""
    backend = with_fallback()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.add_tokens([AddedToken(name, normalized=False) for name in ("\n\n", "\n\n\n", "▁▁▁", "<table>")])
    return backend


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": of_bytes,
    "fallback": with_fallback,
    "pieces": with_pieces,
    "three digits": lambda: with_words("{1,3}", trim=True, model={"ignore_merges": True}),
    "digits": lambda: with_words("", trim=False, normalizer={"type": "NFC"}),
}
TEXTS = texts(400)


def ids(turns: TurnTokenizer, special: bool) -> list[list[int]]:
    return [one.tolist() for one in turns(TEXTS, special=special)]


def faster(backend: Tokenizer) -> Any:
    """fastokens' tokenizer, if one is used."""
    turns = TurnTokenizer(backend)
    turns(["a"], special=False)
    assert turns._faster is None  # not worth a trial
    turns(["a"] * WORTH_TRYING, special=False)
    return turns._faster


def without_fastokens(backend: Tokenizer, patch: pytest.MonkeyPatch) -> TurnTokenizer:
    turns = TurnTokenizer(backend)
    with patch.context() as inner:
        inner.setattr(tokenise, "find_spec", lambda name: None)
        turns(TEXTS, special=False)
    assert turns._faster is None
    return turns


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_tokenizers(kind: str, special: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, turns = without_fastokens(KINDS[kind](), monkeypatch), TurnTokenizer(KINDS[kind]())
    assert ids(turns, special) == ids(plain, special)
    assert turns._faster is not None
    assert turns.fingerprint == plain.fingerprint
    turns._faster = of_other_merges(turns._continuing)
    assert ids(turns, special) != ids(plain, special)


def of_other_merges(backend: Tokenizer) -> Any:
    wrong = json.loads(backend.to_str())
    wrong["model"]["merges"].reverse()
    return fastokens.Tokenizer.from_json_str(json.dumps(wrong))


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_finds_other_ids(kind: str, special: bool) -> None:
    turns = TurnTokenizer(KINDS[kind]())
    backend, trials = turns._continuing, tokenise._trials(turns._continuing, turns._names)
    right = fastokens.Tokenizer.from_json_str(backend.to_str())
    assert tokenise._same(backend, right, trials, special=special)
    assert not tokenise._same(backend, of_other_merges(backend), trials, special=special)


def test_a_vocabulary_without_the_characters_of_names_is_not_used() -> None:
    """There fastokens takes the text `<0x0A>` for a line break."""
    assert faster(with_fallback(map(chr, range(97, 123)))) is None
    assert faster(with_fallback()) is not None


def test_a_text_that_fastokens_refuses_goes_to_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte without a token, of SmolLM2 0x04 for one, is left out by tokenizers."""
    settings = json.loads(of_bytes().to_str())
    model = settings["model"]
    model["vocab"]["lacking"] = model["vocab"].pop("~")
    model["merges"] = [pair for pair in model["merges"] if "~" not in "".join(pair)]
    backend = Tokenizer.from_str(json.dumps(settings))
    turns, plain = TurnTokenizer(backend), without_fastokens(backend, monkeypatch)
    batch = ["a b"] * WORTH_TRYING
    assert turns(batch, special=False)[0].tolist() == plain(batch, special=False)[0].tolist()
    with pytest.raises(ValueError, match="no token"):
        turns._faster.encode_batch_flat(["a~b"], False, True)
    batch[7] = "a~b"
    assert [one.tolist() for one in turns(batch, special=False)] == [
        one.tolist() for one in plain(batch, special=False)
    ]


def changed(**changes: Any) -> Tokenizer:
    settings = json.loads(of_bytes().to_str())
    settings["model"] |= changes.pop("model", {})
    settings["added_tokens"][0] |= changes.pop("added", {})
    return Tokenizer.from_str(json.dumps(settings | changes))


UNPROVEN = {
    "another pattern": {"pre_tokenizer": {"type": "Whitespace"}},
    "a normalizer": {"normalizer": {"type": "Lowercase"}},
    "whole words first": {"model": {"ignore_merges": True}},
    "a token that takes blanks along": {"added": {"lstrip": True}},
    "a token in normalised text": {"added": {"normalized": True}},
}


@pytest.mark.parametrize("what", UNPROVEN)
def test_what_is_not_proven_is_not_used(what: str) -> None:
    assert faster(changed()) is not None
    assert faster(changed(**UNPROVEN[what])) is None


def test_wordpiece_is_not_used() -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    assert faster(backend) is None
