"""Texts to token ids, without anything around them; and a chat template turned into plain wording."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from pairclf.config import PLACE, Template
from pairclf.errors import ConfigError, ModelError
from pairclf.inputs.chat import REMEDY, render_chat_template
from pairclf.inputs.truncate import Ids


class TurnTokenizer:
    """A fast tokenizer, reduced to what it makes of a text: no special token added, nothing cut, nothing padded.

    It works on a copy, because the tokenizer that stands with a model may truncate and pad (some checkpoints save
    it so), and asks for no offsets, which makes it a third faster than transformers' own call.

    Raises:
        ModelError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelError(
                f"{type(tokenizer).__name__} is not a fast tokenizer",
                remedy="use a base model that has a tokenizer.json",
            )
        self._set_up(Tokenizer.from_str(backend.to_str()))

    @classmethod
    def from_json(cls, text: str) -> TurnTokenizer:
        """The same tokenizer in another process: `from_json(tokenizer.to_json())`."""
        made = cls.__new__(cls)
        made._set_up(Tokenizer.from_str(text))
        return made

    def _set_up(self, backend: Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        specials = {id: token.content for id, token in backend.get_added_tokens_decoder().items() if token.special}
        self._special, self._names = frozenset(specials), tuple(specials.values())

    def to_json(self) -> str:
        return self._backend.to_str()

    @property
    def fingerprint(self) -> str:
        """Changes with whatever could change an id."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def __call__(self, texts: Sequence[str], *, special: bool) -> list[Ids]:
        """Token ids of each text, `(T,)` int32.

        Args:
            texts: any texts.
            special: whether a special token's name in a text is that token; otherwise it is plain text.
        """
        self._backend.encode_special_tokens = not special
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        found = [one.ids for one in encodings]
        if not special:
            for place, ids in enumerate(found):
                if not self._special.isdisjoint(ids):
                    found[place] = self._broken_up(texts[place])
        return [np.array(ids, dtype=np.int32) for ids in found]

    def _broken_up(self, text: str) -> list[int]:
        """Ids of a text in which the model itself knows a special token's name as a word (Unigram models may)."""
        names = "|".join(re.escape(name) for name in sorted(self._names, key=len, reverse=True))
        pieces = re.split(f"(?={names})", text)
        parts = [part for piece in pieces for part in (piece[:1], piece[1:]) if part]
        ids = [one for part in self._backend.encode_batch_fast(parts, add_special_tokens=False) for one in part.ids]
        return [one for one in ids if one not in self._special]  # a name of one character can't be broken up


def settle_template(template: Template, tokenizer: Any) -> Template:
    """The template with the tokenizer's chat template written out, and the chat model's answer opened.

    What comes of it depends on no chat template any more (nor on the date, which some put in), so a bundle keeps it.

    Raises:
        ConfigError: the tokenizer has no chat template, or it does not show the wording as it is.
    """
    if not template.chat:
        return template
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("inputs.template.chat needs a chat template, and the tokenizer has none", remedy=REMEDY)
    content = (template.instruction or "") + template.text
    text = render_chat_template(
        tokenizer,
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        date_string="26 Jul 2024",  # Llama-3's own default; later templates would put today's date
    )
    if text.count(content.strip()) != 1 or PLACE.findall(text) != PLACE.findall(content):
        raise ConfigError(
            "the tokenizer's chat template does not show the user's message once, as it is", remedy=REMEDY
        )
    if tokenizer.bos_token:  # the builder puts it first, as it does without a chat template
        text = text.removeprefix(tokenizer.bos_token)
    return template.model_copy(update={"text": text, "instruction": "", "chat": False})
