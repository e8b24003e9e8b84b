"""Tokenise texts without special tokens, and turn a chat template into plain wording."""

from __future__ import annotations

import hashlib
import json
import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.util import find_spec
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from pairclf.config import PLACE, Template
from pairclf.errors import ConfigError, ModelError, cut, quoted
from pairclf.inputs.chat import REMEDY, render_chat_template
from pairclf.inputs.truncate import Ids

_REMEDY = "use a base model whose tokenizer.json is as its makers published it"

TODAY = datetime(2024, 7, 26)
"""The date in a chat template that writes one: Llama-3's own default. Today's would make other ids tomorrow."""

LARGEST_ID = 1 << 24
"""Token ids are below it, and those of the largest vocabularies below a 32nd part of it. tokenizers writes a vocabulary
in steps of one id, however few of them there are."""

WORTH_TRYING = 256
"""The fewest texts of a call for which fastokens is tried."""

TRIALS = 512
"""Texts of the trial, which takes a tenth of a second."""

_WORD = re.compile(r"[^\W_]([^<>\[\]{}|｜]*)")
"""An added token that is a word: it begins with a letter or digit, and no bracket or bar is in it."""

_UP_TO_DIGITS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_BEHIND_DIGITS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Two parts of a pattern that splits words. Between them a tokenizer's pattern has the most digits of one word."""


def _words(pattern: str, *, trim_offsets: bool) -> dict[str, Any]:
    """A pre-tokenizer, as tokenizer.json has it, that splits by a pattern and reads bytes."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    of_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": trim_offsets, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, of_bytes]}


_BLANKS = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_OF_PIECES = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}

_PROVEN: tuple[dict[str, Any], ...] = (
    {  # Llama-3's
        "normalizer": None,
        "pre_tokenizer": _words(_UP_TO_DIGITS + "{1,3}" + _BEHIND_DIGITS, trim_offsets=True),
        "model": {"type": "BPE", "ignore_merges": True},
    },
    {  # Qwen-2's
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": _words(_UP_TO_DIGITS + _BEHIND_DIGITS, trim_offsets=False),
        "model": {"type": "BPE"},
    },
    {  # GPT-2's, SmolLM2's
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE"},
    },
    {  # Llama-2's, Mistral's
        "normalizer": {"type": "Sequence", "normalizers": [_BLANKS]},
        "pre_tokenizer": None,
        "model": _OF_PIECES,
    },
    {  # Gemma's
        "normalizer": _BLANKS,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "model": _OF_PIECES,
    },
)
"""Tokenizers, without vocabulary and merges, for which fastokens (0.3.5) gave the same ids as tokenizers for 20,000
turns of arena3 and arena2 and for 10,000 random texts. The vocabularies were those of SmolLM2 and Mistral v3 (for
Gemma's, too), and for the first two that of DeepSeek."""


class TurnTokenizer:
    """A fast tokenizer, reduced to what it makes of a text: no special token added, nothing cut, nothing padded.

    It works on a copy, because the tokenizer that stands with a model may truncate and pad (some checkpoints save
    it so), and asks for no offsets, which makes it a third faster than transformers' own call. The package fastokens,
    if it is installed, does the same several times as fast, and is used for the tokenizers that `_PROVEN` describes.

    A *control token* is an added token that a text of a user must not become: every special one, and every other
    added token that is neither white space, nor one character, nor a word (`<tool_call>`, `[INST]`, `|||EMAIL|||`).

    Attributes:
        control: ids of the control tokens.
        before: ids that the tokenizer itself puts before a text, most often none or its BOS.
        after: ids that the tokenizer itself puts after a text, most often none.
        unknown: the id that stands for what has none; empty: everything has one.

    Raises:
        ModelError: the tokenizer is not a fast one, or it fails. So does every call: some fail at a few texts alone.
    """

    control: frozenset[int]
    before: Ids
    after: Ids
    unknown: frozenset[int]

    def __init__(self, tokenizer: Any) -> None:
        backend = _fast(tokenizer)
        if (largest := max(backend.get_vocab(with_added_tokens=True).values(), default=0)) >= LARGEST_ID:
            raise ModelError(
                f"the tokenizer gives a token the id {largest:,}, and ids are below {LARGEST_ID:,}", remedy=_REMEDY
            )
        with _whose_failures_are_its_own():
            self._set_up(backend.to_str())

    @classmethod
    def from_json(cls, text: str) -> TurnTokenizer:
        """The same tokenizer in another process: `from_json(tokenizer.to_json())`."""
        tokenizer = cls.__new__(cls)
        tokenizer._set_up(text)
        return tokenizer

    def _set_up(self, text: str) -> None:
        settings = json.loads(text)
        for token in settings["added_tokens"]:  # `encode_special_tokens` makes text of the special ones alone
            token["special"] = token["special"] or not _is_text(token["content"])
        self._backend = self._continuing = _bare(settings)
        inner = {name: _without_prefix(settings[name]) for name in ("normalizer", "pre_tokenizer")}
        if any(settings[name] != part for name, part in inner.items()):
            self._continuing = _bare(settings | inner)
        self._faster: Any = None
        self._is_tried = False
        added = self._backend.get_added_tokens_decoder()
        self._added = frozenset(added)
        self._is_added = np.zeros(max(added, default=0) + 2, dtype=np.bool_)  # the last one for all ids beyond
        self._is_added[list(added)] = True
        control = {number: token.content for number, token in added.items() if token.special}
        self.control, self._names = frozenset(control), tuple(control.values())
        self.before, self.after = _around(self._backend)
        model = settings["model"]  # Unigram names the id, the others the token
        number = model.get("unk_id", self._backend.token_to_id(model.get("unk_token") or ""))
        self.unknown = frozenset() if number is None else frozenset({number})

    def to_json(self) -> str:
        return self._backend.to_str()

    def from_id(self, first: int) -> dict[int, str]:
        """The tokens with ids of `first` or more, by their ids."""
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        return {number: token for token, number in vocabulary.items() if number >= first}

    def names(self, ids: Ids) -> list[str]:
        """What each token is called in the vocabulary, quoted."""
        return [quoted(self._backend.id_to_token(token)) for token in ids.tolist()]

    def text(self, ids: Ids) -> str:
        """The text that tokens stand for."""
        decoded: str = self._backend.decode(ids.tolist(), skip_special_tokens=False)
        return decoded

    @property
    def fingerprint(self) -> str:
        """Changes with whatever could change an id."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def __call__(self, texts: Sequence[str], *, special: bool, start: bool = False) -> list[Ids]:
        """Token ids of each text, `(T,)` int32.

        Args:
            texts: any texts.
            special: whether a control token's name in a text is that token; otherwise it is plain text.
            start: whether an input begins with the text. Some tokenizers put a blank before an input, and none before
                the texts that follow inside it.
        """
        backend = self._backend if start else self._continuing
        with _whose_failures_are_its_own():
            encoded = self._encoded(backend, list(texts), special=special)
            for place, ids in enumerate(encoded):
                if not self._is_added.take(ids, mode="clip").any():
                    continue
                if not special and not self.control.isdisjoint(ids.tolist()):
                    encoded[place] = np.array(self._broken_up(texts[place]), dtype=np.int32)
                elif backend is not self._backend:
                    encoded[place] = np.array(self._after_added(texts[place], special=special), dtype=np.int32)
            return encoded

    def _encoded(self, backend: Tokenizer, texts: list[str], *, special: bool) -> list[Ids]:
        if len(texts) >= WORTH_TRYING and not self._is_tried:
            self._faster, self._is_tried = _faster(self._continuing, self._names), True
        backend.encode_special_tokens = not special
        if self._faster is not None and backend is self._continuing:
            with suppress(ValueError):  # a text has a byte that the vocabulary lacks: tokenizers leaves it out
                ids, ends = self._faster.encode_batch_flat(texts, False, not special)
                return np.split(np.frombuffer(ids, dtype=np.int32), np.frombuffer(ends, dtype=np.int64)[1:])[:-1]
        return [
            np.array(encoding.ids, dtype=np.int32)
            for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def _after_added(self, text: str, *, special: bool) -> list[int]:
        """A continued text, from its first added token on as at the start: behind one, too, a blank may be put."""
        self._backend.encode_special_tokens = not special
        continued, started = (
            token.encode(text, add_special_tokens=False) for token in (self._continuing, self._backend)
        )
        starts = {
            (token, at): place for place, (token, (at, _)) in enumerate(zip(started.ids, started.offsets, strict=True))
        }
        ids: list[int] = continued.ids
        for place, (token, (at, _)) in enumerate(zip(ids, continued.offsets, strict=True)):
            if token in self._added and (token, at) in starts:
                return ids[:place] + started.ids[starts[token, at] :]
        return ids

    def _broken_up(self, text: str) -> list[int]:
        """Ids of a text in which the model itself knows a control token's name as a word (Unigram models may)."""
        names = "|".join(re.escape(name) for name in sorted(self._names, key=len, reverse=True))
        pieces = re.split(f"(?={names})", text)
        ids = self._of_parts([part for piece in pieces for part in (piece[:1], piece[1:]) if part])
        if not self.control.isdisjoint(ids):  # a normalizer made the name of other characters
            ids = self._of_parts(list(text))
        return [token for token in ids if token not in self.control]  # a name of one character can't be broken up

    def _of_parts(self, parts: list[str]) -> list[int]:
        encoded = self._continuing.encode_batch_fast(parts, add_special_tokens=False)
        return [token for part in encoded for token in part.ids]


def bare_tokenizer(text: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json, without transformers, which takes seconds to import.

    Raises:
        ModelError: it can't be read.
    """
    with _whose_failures_are_its_own():
        return Tokenizer.from_str(text)


def _fast(tokenizer: Any) -> Tokenizer:
    """The tokenizer of the library tokenizers that one of transformers is made of; or it is one."""
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError(
            f"{type(tokenizer).__name__} is not a fast tokenizer", remedy="use a base model that has a tokenizer.json"
        )
    return backend


@contextmanager
def _whose_failures_are_its_own() -> Iterator[None]:
    """Turn an exception of tokenizers into a `ModelError`: an unknown token without a name, a pattern that it gives up.

    It has no exceptions of its own: they are of the class `Exception`, and panics of Rust not even that.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"the tokenizer fails: {cut(' '.join(str(error).split()))}", remedy=_REMEDY) from error


def _bare(settings: dict[str, Any]) -> Tokenizer:
    backend = Tokenizer.from_str(json.dumps(settings))
    backend.no_truncation()
    backend.no_padding()
    return backend


def _faster(backend: Tokenizer, control: Sequence[str]) -> Any:
    """fastokens' tokenizer with the same ids; None: it is not installed, or not known to give the same ids.

    `_PROVEN` says nothing about other vocabularies, so this one must pass a trial: where a vocabulary lacks the
    characters of a byte's name (`<0x0A>`), fastokens reads the name as that byte.
    """
    settings = json.loads(backend.to_str())
    model = {name: value for name, value in settings["model"].items() if value and name not in ("vocab", "merges")}
    described = {name: settings[name] for name in ("normalizer", "pre_tokenizer")} | {"model": model}
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    plain = not any(token[flag] for token in settings["added_tokens"] for flag in flags)
    if described not in _PROVEN or not plain or find_spec("fastokens") is None:
        return None
    import fastokens

    with suppress(ValueError):
        faster, trials = fastokens.Tokenizer.from_json_str(json.dumps(settings)), _trials(backend, control)
        if all(_same(backend, faster, trials, special=special) for special in (True, False)):
            return faster
    return None


def _trials(backend: Tokenizer, control: Sequence[str]) -> list[str]:
    """Random texts: of the vocabulary's tokens and their names, control tokens, blanks, and characters of Unicode."""
    draw, names = random.Random(0), sorted(backend.get_vocab(with_added_tokens=False))
    ranges = (0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x30000)
    pieces: tuple[Callable[[], str], ...] = (
        lambda: backend.decode([draw.randrange(len(names)) for _ in range(draw.randint(1, 4))]),
        lambda: draw.choice(names),
        lambda: draw.choice((" ", "\n", "\t", "\r\n", "\u00a0", *control)) * draw.randint(1, 3),
        lambda: "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randint(1, 4))),
    )
    return ["".join(draw.choice(pieces)() for _ in range(draw.randint(1, 20))) for _ in range(TRIALS)]


def _same(backend: Tokenizer, faster: Any, texts: list[str], *, special: bool) -> bool:
    """Whether both give the same ids of each text, or fastokens refuses it."""
    backend.encode_special_tokens = not special
    for text in texts:
        with suppress(ValueError):
            if faster.encode(text, False, not special).ids != backend.encode(text, add_special_tokens=False).ids:
                return False
    return True


def _is_text(content: str) -> bool:
    """Whether an added token that is not special stands for ordinary text, as the model was trained.

    >>> [_is_text(one) for one in ("\\n\\n", "▁▁", "COVID-19", "<think>", "[INST]", "|||EMAIL|||", "</s>")]
    [True, True, True, False, False, False, False]
    """
    plain = content.replace("▁", " ").strip()
    return len(plain) < 2 or _WORD.fullmatch(plain) is not None


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer, as tokenizer.json has it, without the blank that it puts before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        name = "normalizers" if "normalizers" in part else "pretokenizers"
        return {**part, name: [inner for step in part[name] if (inner := _without_prefix(step)) is not None]}
    changes = {"prepend_scheme": "never", "add_prefix_space": False}
    return part | {name: value for name, value in changes.items() if name in part}


def _around(backend: Tokenizer) -> tuple[Ids, Ids]:
    """The tokens that the tokenizer puts before and after a text: `tokenizer(text)` without the text's own tokens."""
    encoded = backend.encode(string.ascii_letters, add_special_tokens=True)
    own = [place for place, added in enumerate(encoded.special_tokens_mask) if not added]
    first, last = (own[0], own[-1] + 1) if own else (len(encoded), len(encoded))
    return np.array(encoded.ids[:first], dtype=np.int32), np.array(encoded.ids[last:], dtype=np.int32)


_RESERVED = re.compile(r"\[unused\d+\]|<unused_?\d+>")
"""Names of tokens that a vocabulary keeps free for its users, as BERT's does."""


def keeps_line_breaks(tokenizer: Any) -> bool:
    """Whether a fast tokenizer reads a line break as something else than a blank.

    Raises:
        ModelError: it is not a fast one, or it fails.
    """
    with _whose_failures_are_its_own():
        broken, blank = (_fast(tokenizer).encode(text, add_special_tokens=False).ids for text in ("a\nb", "a b"))
    return bool(broken != blank)


def add_line_break(tokenizer: Any, embeddings: int) -> None:
    """Give a fast tokenizer that reads a line break as a blank a token for it; lists, code and paragraphs hang on it.

    The tokenizer is changed, so that it is saved so. The token has an embedding that the base was never trained on: one
    that the vocabulary keeps free (`[unused0]`), or one behind its last token; where there is neither, nothing is
    changed. All other ids stay as they are.

    Args:
        tokenizer: of transformers.
        embeddings: of the base; ids are below it.

    Raises:
        ModelError: as `keeps_line_breaks`.
    """
    if keeps_line_breaks(tokenizer):
        return
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    free = min((number for name, number in vocabulary.items() if _RESERVED.fullmatch(name)), default=None)
    if free is not None:
        _rename(settings["model"], free)
    else:
        free = max(vocabulary.values()) + 1
    if free >= embeddings:
        return
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    others = [token for token in settings["added_tokens"] if token["id"] != free]
    settings["added_tokens"] = sorted([*others, {"id": free, "content": "\n", **flags}], key=lambda token: token["id"])
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(settings))  # transformers has no public way to replace it


def _rename(model: dict[str, Any], number: int) -> None:
    """Call the token of a model, as tokenizer.json has it, a line break; Unigram's vocabulary is a list of pairs."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        vocabulary[number][0] = "\n"
    else:
        name = next(name for name, place in vocabulary.items() if place == number)
        vocabulary["\n"] = vocabulary.pop(name)


def settle_template(template: Template, tokenizer: Any) -> Template:
    """The template with the tokenizer's chat template written out, and the chat model's answer opened.

    What comes of it depends on no chat template any more, so a bundle keeps it. It holds every special token that the
    chat template writes, BOS included, and no other: its ids are those of `apply_chat_template`.

    Raises:
        ConfigError: the tokenizer has no chat template, or it does not show the wording as it is.
    """
    if not template.apply_chat_template:
        return template
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "inputs.template.apply_chat_template needs a chat template, and the tokenizer has none", remedy=REMEDY
        )
    content = (template.instruction or "") + template.text
    problems = []
    for form in (content, [{"type": "text", "text": content}]):  # models of images and texts read lists of parts
        try:
            text = _rendered(tokenizer, form)
        except ConfigError as error:
            problems.append(error)
            continue
        if text.count(content.strip()) == 1 and PLACE.findall(text) == PLACE.findall(content):
            break
        what = "the tokenizer's chat template does not show the user's message once, as it is"
        problems.append(ConfigError(what, remedy=REMEDY))
    else:
        raise problems[0]
    if text.endswith("}") and text.endswith(tuple(f"{{{name}}}" for name in PLACE.findall(content))):
        raise ConfigError(
            "the tokenizer's chat template writes nothing after the user's message, whose verdict is read at its end",
            remedy="let inputs.template.text end in words of its own",
        )
    return template.model_copy(update={"text": text, "instruction": "", "apply_chat_template": False})


def _rendered(tokenizer: Any, content: str | list[dict[str, str]]) -> str:
    """The text of a chat of one message of the user, and the answer opened, as on the day `TODAY`."""
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:  # several templates, and none of them is the default
        raise ConfigError(f"the tokenizer's chat template can't be chosen: {error}", remedy=REMEDY) from error
    return render_chat_template(
        tokenizer,
        [{"role": "user", "content": content}],
        chat_template=_CLOCK + template if "strftime_now" in template else template,
        add_generation_prompt=True,
        date_string=TODAY.strftime("%d %b %Y"),
    )


def _clock() -> str:
    """A macro in place of transformers' `strftime_now`: of one day, each part of a date is one text."""
    parts = [f"%{flag}{letter}" for flag in ("-", "") for letter in "aAbBcdDeFHIjmMpSTuUVwWxXyY"]
    replaced = "".join(f"|replace({part!r},{TODAY.strftime(part)!r})" for part in parts)
    # Jinja drops a line break after a block, and so one of the template's own; after an expression it drops none.
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}{{{{ '' }}}}"


_CLOCK = _clock()
